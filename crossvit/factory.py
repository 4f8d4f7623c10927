"""Models by name, and by the file that holds one."""

import inspect
from fnmatch import fnmatch
from os import PathLike
from typing import Any, cast

from .models.crossvit import CrossViT
from .models.variants import VARIANTS, canonical_name
from .weights.checkpoint import load_checkpoint, load_state
from .weights.checkpoint_file import read_checkpoint
from .weights.identify import identify
from .weights.notes import class_of, read_notes


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows, without aliases, that match a shell-style `pattern`."""
    return [name for name in VARIANTS if fnmatch(name, pattern)]


def create_model(
    name: str,
    *,
    checkpoint: str | PathLike[str] | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    image_size: int | tuple[int, int] | None = None,
    fusion: str = "cross_attention",
    global_pool: str = "token",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    kernels: str = "auto",
    **overrides: Any,
) -> CrossViT:
    """A model of the paper by its name in timm or in the authors' code, with initial weights or those of `checkpoint`.

    Args:
        name: one of `list_models()`, or the authors' name of one. Those that start with deit_ are the paper's
            single-branch baselines and give a `VisionTransformer`, with the same methods.
        checkpoint: what `load_checkpoint` takes. Positions are resampled to `image_size`, first convolutions adapted to
            `in_chans`, and a head of another `num_classes` is left out for a new one, which a warning says; under
            torch.device("meta") a warning says that nothing is loaded.
        num_classes: how many logits the model returns; 0: it has no head and returns pooled features.
        in_chans: the channels of an image.
        image_size: the input's side or (height, width); None: the variant's.
        fusion: a key of `FUSIONS`.
        global_pool: "token" or "avg".
        drop_rate: dropout in front of the head.
        drop_path_rate: stochastic depth of the last block.
        kernels: which backend the ops use, see `crossvit_kernels.backends`.
        **overrides: any other argument of the class, such as depth, embed_dim, num_heads, patch_size, mlp_ratio,
            multi_conv, pos_std.

    Returns:
        the model, in training mode.

    Raises:
        ValueError, TypeError: an unknown name, option or unfit size, by the argument's name; and what `load_checkpoint`
            raises.
    """
    name = canonical_name(name)
    variant = VARIANTS[name]
    model_class = class_of(variant)
    arguments = variant.arguments | dict(
        num_classes=num_classes,
        in_chans=in_chans,
        global_pool=global_pool,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        kernels=kernels,
    )
    if image_size is not None:
        arguments["image_size"] = image_size
    if not variant.single_branch:
        arguments["fusion"] = fusion
    elif fusion != "cross_attention":
        raise ValueError(f"fusion={fusion!r} needs branches to fuse: {name} has one")
    known = inspect.signature(model_class).parameters
    if unknown := [key for key in overrides if key not in known]:
        hint = " (the input's size is image_size)" if "img_size" in unknown else ""
        hint = " (weights are a checkpoint, a file's or a Hub model's name)" if "pretrained" in unknown else hint
        raise TypeError(f"create_model: {name} has no argument {', '.join(unknown)}{hint}; it has {', '.join(known)}")
    model = model_class(**(arguments | overrides))
    model.variant = name
    model.arguments = dict(in_chans=in_chans, fusion=fusion) | overrides
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, adapt=True)
    return cast(CrossViT, model)


def load_model(
    checkpoint: str | PathLike[str],
    *,
    name: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    kernels: str = "auto",
    **overrides: Any,
) -> tuple[CrossViT, dict[str, Any]]:
    """The model that a checkpoint holds, with its weights, and what the file says of it beside them: "classes", their
    names, "crop_ratio" and "multi_label", each if it is there.

    What to build is read from the file's notes (`checkpoint.notes`), else recognised from the weights' names and
    shapes.

    Args:
        checkpoint: what `load_checkpoint` takes.
        name: which model it is, where that is not what the file says.
        image_size: in place of the file's; positions are resampled.
        kernels: which backend the ops use, see `crossvit_kernels.backends`.
        **overrides: as in `create_model`, in place of what the file says. A warning says if a head of another
            `num_classes` is left out, and if an override makes another function of the weights, such as `num_heads`.

    Returns:
        the model, and what the file says beside the weights.

    Raises:
        ValueError: the file names no model and the weights are none of `list_models()`; and what `create_model` and
            `load_checkpoint` raise.
    """
    state, metadata = read_checkpoint(checkpoint)
    notes, arguments = read_notes(metadata), {}
    if "variant" in notes and (name is None or canonical_name(name) == notes["variant"]):
        name, arguments = notes["variant"], notes.get("arguments", {})
        if image_size is None and "image_size" in notes:
            height, width = map(int, notes["image_size"].split("x"))
            image_size = (height, width)
    elif name is None:
        name = identify(state).partition(" for images of")[0]
        if name not in VARIANTS:
            raise ValueError(f"{checkpoint} holds {name}: say which model it is for, and with which arguments")
    heads = [value.shape[0] for key, value in state.items() if key.startswith("head.") and key.endswith("weight")]
    arguments = {"num_classes": heads[0] if heads else 0} | arguments | overrides
    try:
        model = create_model(name, image_size=image_size, kernels=kernels, **arguments)
    except (ArithmeticError, LookupError, AttributeError) as error:  # of values that no argument can have
        raise ValueError(f"{checkpoint}: {name} cannot be made with the arguments {arguments}: {error}") from error
    load_state(model, state, metadata, checkpoint, adapt=True, asked=overrides)
    return model, notes
