"""Parameters and multiply-adds, per part of a model.

Multiply-adds are counted as the paper counts its "FLOPs" for one image: every matrix multiplication and convolution,
the two of each attention included, keys and values projected for every token; norms, activations, softmax and resizing
are left out. The fused kernels do less in cross-attention (they never form keys and values): this is the model's size,
not the kernels' work.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from crossvit_kernels.nn import AttentionBlock, PatchEmbed


@dataclass(frozen=True)
class Part:
    """One row: a part of the model, its parameters and its multiply-adds for one image, `attention` of them in
    softmax(q kᵀ) v.
    """

    name: str
    parameters: int
    multiply_adds: int = 0
    attention: int = 0


@dataclass(frozen=True, repr=False)
class Description:
    """What `describe()` returns: the parts, their sums, and as text (`str`, `print`, or at the prompt) a table."""

    title: str
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        """The number of parameters of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all parts for one image."""
        return sum(part.multiply_adds for part in self.parts)

    @property
    def attention(self) -> int:
        """Those of the multiply-adds that are in softmax(q kᵀ) v."""
        return sum(part.attention for part in self.parts)

    def __str__(self) -> str:
        total = Part("total", self.parameters, self.multiply_adds, self.attention)
        width = max(len(part.name) for part in self.parts)
        head = f"{'part':<{width}}  {'parameters':>12}  {'M':>8}  {'G multiply-adds':>15}  {'in attention':>12}"
        lines = [self.title, head, "-" * len(head)]
        for part in (*self.parts, total):
            if part is total:
                lines.append("-" * len(head))
            lines.append(
                f"{part.name:<{width}}  {part.parameters:>12,}  {part.parameters / 1e6:>8.3f}  "
                f"{part.multiply_adds / 1e9:>15.4f}  {part.attention / 1e9:>12.4f}"
            )
        return "\n".join(lines)

    __repr__ = __str__


def count_parameters(*modules: nn.Module) -> int:
    """The number of parameters inside `modules`."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def linear_multiply_adds(*modules: nn.Module) -> int:
    """Multiply-adds of one token through every Linear inside `modules`."""
    return sum(m.weight.numel() for module in modules for m in module.modules() if isinstance(m, nn.Linear))


def attention_multiply_adds(blocks: Iterable[AttentionBlock], tokens: int) -> int:
    """Multiply-adds of q kᵀ and of the weighted sum of v, over `tokens` tokens, in all `blocks`."""
    return sum(2 * tokens**2 * block.attn.proj.in_features for block in blocks)


def embed_multiply_adds(embed: PatchEmbed) -> int:
    """Multiply-adds of the convolutions that make an image's patches."""
    size, total = embed.image_size, 0
    for conv in embed.proj.modules():
        if isinstance(conv, nn.Conv2d):
            kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
            size = ((size[0] + 2 * padding - kernel) // stride + 1, (size[1] + 2 * padding - kernel) // stride + 1)
            total += size[0] * size[1] * conv.weight.numel()
    return total
