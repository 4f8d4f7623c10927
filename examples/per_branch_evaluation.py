"""How often is each branch of a CrossViT right alone, and the model, which is their mean? (The paper's Table 6.)

    python examples/per_branch_evaluation.py
    python examples/per_branch_evaluation.py --checkpoint fine_tuned/model.safetensors --data fine_tuned/photographs/val

Without --checkpoint it first trains a model of a third of a million parameters on scikit-learn's handwritten digits for
a few seconds. `crossvit evaluate` prints the same table, and a confusion matrix.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

import crossvit
from crossvit.data.datasets import open_folder
from crossvit.data.transforms import evaluation_transform


def digits(side: int) -> TensorDataset:
    """The 1,797 digits as images (3, side, side) from -1 to 1, with their classes."""
    found = load_digits()
    grey = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images = nn.functional.interpolate(grey, size=side, mode="bicubic", align_corners=False)
    return TensorDataset(images.expand(-1, 3, -1, -1).contiguous(), torch.tensor(found.target))


def train(model: nn.Module, data: Dataset, epochs: int) -> None:
    """AdamW at a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    loader = DataLoader(data, batch_size=32, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for images, targets in loader:
            loss = nn.functional.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def main() -> None:
    """Counts the right answers of the branches and of their mean."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", help="a file that crossvit.save_checkpoint wrote")
    parser.add_argument("--data", type=Path, help="with --checkpoint: a folder with one folder of images per class")
    parser.add_argument("--epochs", type=int, default=6, help="without --checkpoint: of training (%(default)s)")
    options = parser.parse_args()
    if (options.checkpoint is None) != (options.data is None):
        parser.error("--checkpoint and --data belong together")
    torch.manual_seed(0)
    if options.checkpoint is None:
        branches: dict[str, Any] = dict(img_scale=(1, 1), patch_size=(4, 6), embed_dim=(48, 96), num_heads=(3, 3))
        shape: dict[str, Any] = dict(image_size=24, num_classes=10, depth=((1, 2, 0),), pos_std=0.5)
        model = crossvit.create_model("crossvit_tiny_240", **shape, **branches)
        training, held_out = random_split(digits(24), (0.8, 0.2))
        train(model, training, options.epochs)
        validation: Dataset = held_out
    else:
        model, notes = crossvit.load_model(options.checkpoint)
        folder = open_folder(options.data, notes.get("classes"))
        folder.transform = evaluation_transform(model.image_size, notes.get("crop_ratio", 0.875))
        validation = folder

    model.eval()
    right: list[Tensor] = []  # for each batch (branches + 1, B)
    with torch.inference_mode():
        for images, targets in DataLoader(validation, batch_size=64):
            logits = model.forward_branches(images)  # (B, classes) of every branch
            logits.append(torch.stack(logits).mean(dim=0))  # what model(images) returns
            right.append(torch.stack([own.argmax(dim=1) == targets for own in logits]))
    counts = torch.cat(right, dim=1).float().mean(dim=1).mul(100).tolist()
    names = [f"branch {b}, patches of {patch} pixels" for b, patch in enumerate(model.patch_size)]
    print(f"top-1 on {sum(len(part[0]) for part in right)} images")
    for name, share in zip([*names, "the model, their mean"], counts):
        print(f"{name:32}{share:6.1f} %")


if __name__ == "__main__":
    main()
