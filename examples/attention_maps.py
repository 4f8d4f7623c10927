"""Draw what a CrossViT looks at: the attention of each branch's CLS token, of the fusion, and attention rollout.

    python examples/attention_maps.py
    python examples/attention_maps.py cat.jpg --checkpoint fine_tuned/model.safetensors --out cat.png

Random weights, which it takes without --checkpoint, look everywhere alike: each map is stretched from its smallest to
its largest weight. `crossvit explain` draws head by head, stage by stage, for many pictures.
"""

import argparse
from pathlib import Path

import skimage.data
import torch
from PIL import Image

import crossvit
from crossvit.attention import attention_maps, attention_rollout
from crossvit.attention.drawing import Panel, draw_panels
from crossvit.data.images import load_image
from crossvit.data.transforms import evaluation_transform


def main() -> None:
    """Computes the maps of the last stage, and rollout, and draws them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("image", nargs="?", help="a picture; without, scikit-image's cat")
    parser.add_argument("--model", default="crossvit_tiny_240", help="with random weights (%(default)s)")
    parser.add_argument("--checkpoint", help="a file that crossvit.save_checkpoint wrote, instead of --model")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="the picture (%(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    picture = load_image(options.image) if options.image else Image.fromarray(skimage.data.chelsea())
    if options.checkpoint is None:
        model = crossvit.create_model(options.model)
    else:
        model, _ = crossvit.load_model(options.checkpoint)
    model.eval()
    images = evaluation_transform(model.image_size, crop_ratio=1.0)(picture)[None]  # (1, 3, H, W)

    last = [found for found in attention_maps(model, images) if found.stage == len(model.blocks) - 1]
    rollout = attention_rollout(model, images)

    rows: dict[str, list[Panel]] = {"self": [Panel("the picture")], "cross": [], "rollout": []}
    for found in last:
        for reads, heads in zip(found.reads, found.pictures()):  # heads (1, H, rows, columns)
            mean = heads[0].mean(dim=0)
            title = f"branch {found.branch} reads {'itself' if reads == found.branch else f'branch {reads}'}"
            print(f"{title}: {mean.shape[0]} × {mean.shape[1]} patches, {mean.min():.2%} to {mean.max():.2%} each")
            rows.setdefault(found.kind, []).append(Panel(title, mean))
    for branch, sources in enumerate(rollout):
        for source, share in enumerate(sources):  # share (1, rows, columns)
            print(f"branch {branch} is made of branch {source}'s patches to {share.sum():.1%}")
            rows["rollout"].append(Panel(f"rollout: branch {branch}, patches of {source}", share[0]))

    # What the model saw: the centre of the picture.
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    seen = picture.crop((left, top, left + side, top + side))
    draw_panels(seen, [row for row in rows.values() if row], f"{model.variant}", options.out)
    print(f"drawn in {options.out}")


if __name__ == "__main__":
    main()
