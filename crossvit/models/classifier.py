"""What the models share: the checks on their input, and what timm's users expect of a model beside its forward."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from crossvit_kernels.nn import KernelModule, PatchEmbed, check_rates, set_kernels

from .checks import check_integer, check_number, check_rate
from .describe import Description
from .intermediates import Indices, describe_features, take_indices
from .variants import IMAGENET_MEAN, IMAGENET_STD, default_crop_ratio

POOLS = ("token", "avg")
INITIAL_DEVIATION = 0.02


def to_size(image_size: int | tuple[int, int], name: str = "image_size") -> tuple[int, int]:
    """(height, width) of an int or a pair. Raises TypeError or ValueError naming the argument."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise TypeError(f"{name} must be an int or (height, width), got {image_size!r}")
    if min(size) < 1:
        raise ValueError(f"{name} must be positive, got {image_size!r}")
    return size


def check_pool(global_pool: str) -> str:
    """`global_pool` itself. Raises ValueError unless it is "token" or "avg"."""
    if global_pool not in POOLS:
        raise ValueError(f"global_pool must be one of {POOLS}, got {global_pool!r}")
    return global_pool


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """The stochastic depth rates of `depth` blocks, from 0 to `rate` in equal steps."""
    return cast(list[float], torch.linspace(0, rate, depth, device="cpu").tolist())


def init_weights(module: nn.Module) -> None:
    """The authors' initial weights: Linear normal of deviation 0.02 with bias 0, LayerNorm 1 and 0; convolutions keep
    PyTorch's.
    """
    if isinstance(module, nn.Linear):
        # Theirs is truncated at ±2, which is a hundred deviations away.
        nn.init.normal_(module.weight, std=INITIAL_DEVIATION)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class Classifier(KernelModule):
    """Base of the models. A subclass sets `embed_dim`, `patch_embed`, `blocks`, `norm` and `head`, and gives the
    methods that raise here.
    """

    blocks: Any  # the stages, or the blocks where there is one branch
    norm: Any  # the final LayerNorm, or one for every branch
    feature_info: list[dict[str, Any]]  # timm's description of the intermediates
    variant: str | None = None  # the name it was created by
    arguments: dict[str, Any] = {}  # noqa: RUF012  and what else create_model was given to make it

    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        *,
        kernels: str,
        pos_std: float,
        **rates: float,
    ) -> None:
        super().__init__(kernels=kernels)
        check_integer("in_chans", in_chans, 1)
        check_integer("num_classes", num_classes, 0)
        check_number("pos_std", pos_std)
        for name, rate in rates.items():
            check_rate(name, rate)
        check_rates(**rates)
        self.image_size = to_size(image_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = check_pool(global_pool)
        self.pos_std = pos_std
        self.drop_rate = rates["drop_rate"]
        self.grad_checkpointing = False

    def check_images(self, images: Tensor | torch.fx.Proxy) -> None:
        """Raises TypeError or ValueError unless `images` is (B, in_chans, *image_size); what torch.fx traces with has
        no size to look at.
        """
        if isinstance(images, torch.fx.Proxy):
            return
        if not images.is_floating_point():
            raise TypeError(f"images must be a floating point tensor, got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must be (B, {self.in_chans}, H, W), got {tuple(images.shape)}")
        height, width = images.shape[2:]
        if (height, width) != self.image_size:
            raise ValueError(
                f"images are {height}×{width} but this model takes {self.image_size[0]}×{self.image_size[1]}: resize "
                f"them, or create the model with image_size=({height}, {width}) (weights load with resampled positions)"
            )

    def set_kernels(self, kernels: str) -> None:
        """Makes every op of the model use `kernels`. Raises ValueError for an unknown name, RuntimeError with the
        reason for an absent backend.
        """
        set_kernels(self, kernels)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only each transformer block's input and computes the block again for the backward."""
        self.grad_checkpointing = enable

    def describe(self) -> Description:
        """Parameters and multiply-adds per part, for one image; `print` it for a table."""
        raise NotImplementedError

    def position_grids(self, image_size: tuple[int, int] | None = None) -> dict[str, tuple[int, int]]:
        """Rows and columns of every branch's patches, by the name of its position embedding, for the model's own or
        another image size.
        """
        raise NotImplementedError

    def first_convolutions(self) -> list[str]:
        """The names of the convolutions that read the image, one per branch."""
        return [
            next(f"{name}.{inner}" for inner, module in embed.named_modules() if isinstance(module, nn.Conv2d))
            for name, embed in self.named_modules()
            if isinstance(embed, PatchEmbed)
        ]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new head of `num_classes` in (0: none, the model then returns features), and optionally another
        pooling.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        if global_pool is not None:
            self.global_pool = check_pool(global_pool)
        self.num_classes = num_classes
        self.head = self.build_head()
        self.head.train(self.training)

    def build_head(self) -> nn.Module:
        """A new, initialised head of `num_classes` on the device and in the dtype of the final norm."""
        raise NotImplementedError

    def new_linear(self, in_features: int) -> nn.Module:
        """A Linear to `num_classes` with initial weights, an Identity for none."""
        if self.num_classes == 0:
            return nn.Identity()
        like = next(p for part in (self.norm, self) for p in part.parameters())  # no norm if pruned
        head = nn.Linear(in_features, self.num_classes, device=like.device, dtype=like.dtype)
        init_weights(head)
        return head

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's description of the model: its input, how images are prepared, and the names of its first convolutions
        and of its classifiers.
        """
        classifiers = [name for name, m in self.named_modules() if name.startswith("head") and isinstance(m, nn.Linear)]
        branches = isinstance(self.patch_embed, nn.ModuleList)
        return dict(
            architecture=self.variant,
            input_size=(self.in_chans, *self.image_size),
            fixed_input_size=True,
            num_classes=self.num_classes,
            pool_size=None,
            crop_pct=default_crop_ratio(self.variant),
            crop_mode="center",
            interpolation="bicubic",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            first_conv=tuple(self.first_convolutions()) if branches else self.first_convolutions()[0],
            classifier=tuple(classifiers) if branches else "".join(classifiers),
        )

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """`default_cfg`, under the name by which timm's `resolve_data_config` asks for it."""
        return self.default_cfg

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the intermediates `indices`, counted as in `forward_intermediates`, do not need: all behind
        them, the final norm with `prune_norm`, and the head with `prune_head`.

        Returns the indices of the same intermediates in the model as it is then; `feature_info` describes those. Raises
        ValueError for indices out of range.
        """
        info, before = self.feature_info, len(self.blocks)
        taken = take_indices(indices, len(info))
        after = 1 + max(i % before for i in taken)
        self.blocks = self.blocks[:after]
        self.feature_info = describe_features(
            [i["num_chs"] for i in info[::before]], [i["reduction"] for i in info[::before]], after
        )
        if prune_norm:
            several = isinstance(self.norm, nn.ModuleList)
            self.norm = nn.ModuleList(nn.Identity() for _ in self.norm) if several else nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return [i // before * after + i % before for i in taken]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the recipe exempts from weight decay beside biases and norms: CLS tokens and
        positions.
        """
        return {name for name, _ in self.named_parameters() if name.startswith(("cls_token", "pos_embed"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers: the stem, each stage (with the last one, the final norm), and the head."""
        return dict(stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    def layer_of(self, name: str) -> int:
        """The layer that parameter `name` belongs to: 0 the stem, 1 … the stages, with the final norm in the last, then
        the head.
        """
        depth = len(cast(nn.ModuleList, self.blocks))
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            return 0
        if name.startswith("blocks."):
            return 1 + int(name.split(".")[1])
        return depth if name.startswith("norm") else depth + 1

    def parameter_groups(
        self, lr: float | None = None, weight_decay: float = 0.05, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimizer: no weight decay on biases, norms and `no_weight_decay()`, layer-wise
        learning rates.

        Layer i of L has `lr_scale` = layer_decay ** (L - i), the head 1, as timm's `param_groups_layer_decay`; where
        `lr` is given each group also has its own `lr`, scaled. Parameters that need no gradient are left out.
        """
        exempt, last = self.no_weight_decay(), len(cast(nn.ModuleList, self.blocks)) + 1
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            decay = 0.0 if parameter.dim() <= 1 or name in exempt else weight_decay
            scale = layer_decay ** (last - self.layer_of(name))
            group = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
            if lr is not None:
                group["lr"] = lr * scale
            group["params"].append(parameter)
        return list(groups.values())

    def apply_init(self, *embeddings: nn.Parameter) -> None:
        """The authors' initial weights for the whole model, with positions of deviation `pos_std`; `embeddings` are its
        CLS tokens and positions.
        """
        positions = [getattr(self, name) for name in self.position_grids()]
        for embedding in embeddings:
            is_position = any(embedding is position for position in positions)
            nn.init.normal_(embedding, std=self.pos_std if is_position else INITIAL_DEVIATION)
        self.apply(init_weights)
