"""`make demo`: a small CrossViT from scratch on real images, by the commands that a user has.

scikit-learn's 1,797 handwritten digits, written out as a folder of PNGs, are learnt twice from one seed: with the
kernels and on the plain PyTorch reference. Both are evaluated, single images predicted, attention and curves drawn;
then the five fusion schemes are compared at an equal number of steps, beside the paper's Table 6. All goes into demo/.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import crossvit.cli.evaluate  # with the rest, so that importing is not timed
import crossvit.cli.explain
import crossvit.cli.predict
import crossvit.cli.train
from crossvit.cli.main import main as command
from crossvit.system.files import write_text
from crossvit.training.curves import draw_curves

SIDE = 32
HELD_OUT = 0.2
MODEL = """--model crossvit_tiny_240 --image-size 24 --set patch_size=[4,6] --set img_scale=[1,1]
    --set embed_dim=[48,96] --set num_heads=[3,3] --set depth=[[1,2,0]] --set pos_std=0.5""".split()  # noqa: SIM905
RECIPE = """--preset small --batch-size 32 --lr 1.5e-3 --betas 0.9 0.98 --warmup-epochs 2 --clip-grad 1
    --weight-decay 0.01 --ema 0.99 --ema-warmup --label-smoothing 0.05 --drop-path 0 --flip 0 --color-jitter 0
    --crop-scale 0.8 --crop-ratio 1 --precision bfloat16 --device cpu --workers 1
    --log-every 11""".split()  # noqa: SIM905
EPOCHS, FUSION_EPOCHS = 36, 14
# What a fusion does to the patches shows in the next stage alone: with one stage class_token and pairwise are the same.
STAGES = ("--set", "depth=[[1,1,0],[1,1,0]]")
# Table 6 of the paper: CrossViT-S on ImageNet, top-1 in %, 10⁹ multiply-adds, 10⁶ parameters
PAPER = {
    "none": (80.2, 5.3, 23.7),
    "all_attention": (80.0, 7.6, 27.7),
    "class_token": (80.3, 5.4, 24.2),
    "pairwise": (80.3, 5.5, 24.2),
    "cross_attention": (81.0, 5.6, 26.7),
}


def write_digits(root: Path, seed: int = 0) -> None:
    """Writes root/train and root/val, each with a folder per digit of 32 × 32 grey PNGs, a fifth of every digit's to
    val, drawn by `seed`. The pictures are scikit-learn's 8 × 8 of 17 greys, enlarged (bicubic).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    for digit in range(10):
        indices = rng.permutation(np.flatnonzero(digits.target == digit))
        held_out = round(HELD_OUT * len(indices))
        for k, index in enumerate(indices):
            folder = root / ("val" if k < held_out else "train") / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.rint(digits.images[index] * (255 / 16)).astype(np.uint8)
            image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            image.save(folder / f"{index:04}.png")


def run(*arguments: str | Path) -> None:
    """A command of `crossvit`, shown as it is typed. Raises SystemExit with its status if it fails."""
    print("\n$ crossvit", *arguments, flush=True)
    if status := command([str(argument) for argument in arguments]):
        raise SystemExit(status)


def train(data: Path, out: Path, *options: str, epochs: int) -> dict[str, float]:
    """Trains and evaluates: {"top1", "seconds"}, the best epoch's accuracy on val/ in percent, and training's time."""
    started = time.perf_counter()
    run("train", data, "--out", out, *MODEL, *RECIPE, "--epochs", str(epochs), *options)
    seconds = time.perf_counter() - started
    run(
        *("evaluate", data, "--checkpoint", out / "best.pth", "--workers", "0"),
        *("--json", out / "evaluation.json", "--confusion", out / "confusion.png"),
    )
    return {"top1": json.loads((out / "evaluation.json").read_text())["top1"], "seconds": round(seconds, 1)}


def compare_fusions(data: Path, root: Path, epochs: int) -> list[dict[str, Any]]:
    """Each fusion scheme, trained alike: its figures, and the paper's for CrossViT-S on ImageNet."""
    rows = []
    for fusion, (top1, giga, million) in PAPER.items():
        found = train(data, root / fusion, "--set", f"fusion={fusion}", *STAGES, epochs=epochs)
        model, _ = crossvit.load_model(root / fusion / "best.pth")
        described = model.describe()
        paper = {"top1": top1, "multiply_adds": giga * 1e9, "parameters": million * 1e6}
        counts = {"parameters": described.parameters, "multiply_adds": described.multiply_adds}
        rows.append({"fusion": fusion, **found, **counts, "epochs": epochs, "paper_imagenet_crossvit_s": paper})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The fusions' figures beside the paper's."""
    lines = [
        f"{'fusion':16} {'digits: top-1 %':>15} {'params':>9} {'10⁶ MACs':>9} {'seconds':>8}   "
        f"{'paper (ImageNet, CrossViT-S): top-1 %':>37} {'10⁶ params':>10} {'10⁹ MACs':>8}"
    ]
    for row in rows:
        paper = row["paper_imagenet_crossvit_s"]
        lines.append(
            f"{row['fusion']:16} {row['top1']:15.2f} {row['parameters']:9,} {row['multiply_adds'] / 1e6:9.2f} "
            f"{row['seconds']:8.1f}   {paper['top1']:37.1f} {paper['parameters'] / 1e6:10.1f} "
            f"{paper['multiply_adds'] / 1e9:8.1f}"
        )
    return "\n".join(lines)


def pictured(out: Path) -> str:
    """The pictures of a demo."""
    return ", ".join(str(path.relative_to(out)) for path in sorted([out / "curves.png", *out.glob("attention/*.png")]))


def main() -> None:
    """Everything, into the folder --out, which is emptied first of what an earlier demo left there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--fusion-epochs", type=int, default=FUSION_EPOCHS)
    options = parser.parse_args()
    started = time.perf_counter()
    out, data = options.out, options.out / "digits"
    for name in ("digits", "runs", "attention"):
        shutil.rmtree(out / name, ignore_errors=True)
    torch.set_num_threads(1)  # of two cores one computes and one reads; a model this small gains nothing from a second
    write_digits(data)
    results: dict[str, Any] = {}
    for name, kernels in (("kernels", "auto"), ("reference", "reference")):
        results[name] = train(data, out / "runs" / name, "--kernels", kernels, epochs=options.epochs)
    logs = {name: out / "runs" / name / "metrics.jsonl" for name in results}
    draw_curves(logs, out / "curves.png")
    best = out / "runs" / "kernels" / "best.pth"
    pictures = [min((data / "val" / str(digit)).iterdir()) for digit in (0, 3, 8)]
    run("predict", *pictures, "--checkpoint", best, "--top", "3", "--workers", "0")
    run("explain", *pictures, "--checkpoint", best, "--output", out / "attention", "--workers", "0")
    results["fusions"] = compare_fusions(data, out / "runs" / "fusions", options.fusion_epochs)
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    print("\n" + table(results["fusions"]))
    for name in ("kernels", "reference"):
        print(f"{name}: {results[name]['top1']:.2f} % of the held-out digits, trained in {results[name]['seconds']} s")
    print(f"pictures in {out}: {pictured(out)}; everything took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
