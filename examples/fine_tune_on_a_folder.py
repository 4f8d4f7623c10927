"""Fine-tune a CrossViT on a folder of images, one folder per class, and evaluate what was saved.

    python examples/fine_tune_on_a_folder.py
    python examples/fine_tune_on_a_folder.py --data pets --model crossvit_9_240 --checkpoint nine.pth --image-size 240

Without --data it makes a small folder: crops of three photographs, whose names are the classes. Without --checkpoint
the weights are random. `crossvit train` has the paper's recipe, resuming, several processes and more.
"""

import argparse
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import crossvit
from crossvit.data.datasets import open_dataset
from crossvit.data.transforms import evaluation_transform, training_transform
from crossvit.training.state import seed_generators


def make_folder(root: Path) -> None:
    """Writes root/train and root/val, each with a folder per photograph and random crops of it."""
    rng = np.random.default_rng(0)
    for split, count in ("train", 24), ("val", 10):
        for name in ("astronaut", "chelsea", "coffee"):
            picture = Image.fromarray(getattr(skimage.data, name)())
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                side = rng.uniform(0.4, 0.9) * min(picture.size)
                left, top = (rng.uniform(0, length - side) for length in picture.size)
                crop = picture.resize((96, 96), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
                crop.save(root / split / name / f"{k}.png")


def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """The share of images whose class comes first, in percent."""
    model.eval()
    with torch.inference_mode():
        right = torch.cat([model(images).argmax(dim=1) == targets for images, targets in loader])
    return 100 * right.float().mean().item()


def main() -> None:
    """Fine-tunes, saves, loads and evaluates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder with train/ and val/; without, one is made in --out")
    parser.add_argument("--out", type=Path, default=Path("fine_tuned"), help="where everything goes (%(default)s)")
    parser.add_argument("--model", default="crossvit_tiny_240", help="one of crossvit.list_models() (%(default)s)")
    parser.add_argument("--checkpoint", help="weights to start from: a file of ours, timm's or the authors'")
    parser.add_argument("--image-size", type=int, default=48, help="side of the model's input (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="(%(default)s)")
    options = parser.parse_args()
    seed_generators(0)  # of torch, and of random and numpy, from which the augmentation draws
    data = options.data or options.out / "photographs"
    if options.data is None:
        make_folder(data)

    training, validation = open_dataset(data, "train"), open_dataset(data, "val")
    training.transform = training_transform(  # crops and flips
        options.image_size, crop_scale=0.5, auto_augment="none", color_jitter=0, erasing=0
    )
    validation.transform = evaluation_transform(options.image_size, crop_ratio=1.0)
    batches, validation_batches = DataLoader(training, 12, shuffle=True, drop_last=True), DataLoader(validation, 30)
    print(f"{len(training)} images of {len(training.classes)} classes, {len(validation)} to validate")

    # Positions are resampled to image_size; a head for another number of classes starts anew.
    model = crossvit.create_model(
        options.model, checkpoint=options.checkpoint, num_classes=len(training.classes), image_size=options.image_size
    )
    # No weight decay where it does harm; where there is something to keep, smaller steps next to the image.
    groups = model.parameter_groups(weight_decay=0.05, layer_decay=0.75 if options.checkpoint else 1.0)
    rates = [5e-4 * group["lr_scale"] for group in groups]
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=options.epochs * len(batches))
    print(f"before: {accuracy(model, validation_batches):.1f} % right")
    for epoch in range(options.epochs):
        model.train()
        for images, targets in batches:
            loss = nn.functional.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: {accuracy(model, validation_batches):.1f} % right")

    path = options.out / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    crossvit.save_checkpoint(model, path, classes=training.classes, crop_ratio=1.0)
    loaded, notes = crossvit.load_model(path)  # the file says what it is a model of, and of which classes
    print(f"{path}, {', '.join(notes['classes'])}: {accuracy(loaded, validation_batches):.1f} % right")


if __name__ == "__main__":
    main()
