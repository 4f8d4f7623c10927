"""Use one op and one module of crossvit_kernels inside a model of your own, and check them against plain PyTorch.

    python examples/one_op_in_your_model.py
    python examples/one_op_in_your_model.py --kernels triton --device cuda

The model is a small vision transformer: patches, two pre-norm blocks (`crossvit_kernels.nn.Block`), and a learned query
that reads the patches (`crossvit_kernels.cls_cross_attention`) in front of a classifier. Only the weights are its own.
"""

import argparse

import torch
from torch import Tensor, nn

import crossvit_kernels
from crossvit_kernels.nn import Block


class Classifier(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes)."""

    def __init__(self, kernels: str, width: int = 96, heads: int = 3, patch: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.heads, self.kernels = heads, kernels
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, kernels=kernels) for _ in range(2)))
        self.query = nn.Parameter(torch.randn(width))
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.blocks(self.patches(images).flatten(2).transpose(1, 2))  # (B, N, D)
        pooled = crossvit_kernels.cls_cross_attention(
            self.query.expand(len(tokens), -1),  # (B, D): the same question for every image
            tokens,
            *(self.norm.weight, self.norm.bias),
            *(self.q.weight, self.q.bias),
            *(self.k.weight, self.k.bias),
            *(self.v.weight, self.v.bias),
            num_heads=self.heads,
            eps=self.norm.eps,
            kernels=self.kernels,
        )  # (B, D); keys and values are never formed
        return self.head(pooled)


def run(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The logits and every gradient, by name."""
    logits = model(images)
    nn.functional.cross_entropy(logits, targets).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach(), **gradients}


def main() -> None:
    """Compares the logits and all gradients with those of the reference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernels", default="auto", help="auto, cpu, triton, cuda or reference (%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images (%(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, 64, 64, device=options.device)
    targets = torch.randint(10, (options.batch,), device=options.device)

    ours = Classifier(options.kernels).to(options.device)
    plain = Classifier("reference").to(options.device)
    plain.load_state_dict(ours.state_dict())

    found, expected = run(ours, images, targets), run(plain, images, targets)
    print(f"{'largest difference':>50}   of the largest value")
    for name, value in expected.items():
        difference = (found[name] - value).abs().max()
        if name == "k.bias":  # It adds the same to every score, so its gradient is zero: nothing to divide by.
            print(f"{name:32}{difference:18.1e}   absolute, of a gradient that is zero")
        else:
            print(f"{name:32}{difference / value.abs().max():18.1e}")


if __name__ == "__main__":
    main()
