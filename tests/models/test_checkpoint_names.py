"""Weights under the names that wrappers and training programs give them, averaged ones, tensors of several names."""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

import crossvit
from commands import SMALL, command, small_model
from crossvit.weights.checkpoint import read_checkpoint
from crossvit.weights.checkpoint_file import read_contents
from crossvit.weights.wording import describe

NAME = "crossvit_tiny_240"


def blank(**overrides: Any) -> crossvit.CrossViT:
    """A model for files to be loaded into."""
    return crossvit.create_model(NAME, **(SMALL | overrides))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The weights of a small model."""
    return dict(small_model().state_dict())


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of the same model."""
    return {key: value + 1 for key, value in state.items()}


def assert_loads(path: Path, state: dict[str, Tensor]) -> None:
    model = blank()
    crossvit.load_checkpoint(model, path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "_orig_mod._orig_mod.module.module.",
    "model.",
    "model.model.",
    "model._orig_mod.",
    "module.model._orig_mod.",
    "_orig_mod.model.module.",
    "_forward_module.model.",
    "_fsdp_wrapped_module.",
    "net.",
    "backbone.module.",
]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(prefix: str, suffix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    """They are taken off until none is left, whatever their order, in timm's names and the authors'."""
    names = {key: key.replace("pos_embed_", "pos_embed.").replace("cls_token_", "cls_token.") for key in state}
    for k, own in enumerate(({key: key for key in state}, names)):
        named = {prefix + own[key]: value for key, value in state.items()}
        path = tmp_path / f"{k}{suffix}"
        if suffix == ".pth":
            torch.save({"state_dict": named, "epoch": 3}, path)
        else:
            save_file(named, path)
        assert_loads(path, state)


def test_wrappers_that_exist(state: dict[str, Tensor], tmp_path: Path) -> None:
    """What torch's own wrappers leave, also of blocks inside a model, and of an averaged model with its counter."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def parts(model: Any) -> nn.Module:
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
        model.head[1] = nn.DataParallel(model.head[1])
        return model

    wrapped: dict[str, Callable[[nn.Module], nn.Module]] = {
        "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item,return-value]
        "parallel": nn.DataParallel,
        "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
        "averaged": torch.optim.swa_utils.AveragedModel,
        "recomputed": checkpoint_wrapper,
        "parts": parts,
    }
    for name, wrap in wrapped.items():
        model = blank()
        model.load_state_dict(state)
        torch.save(wrap(model).state_dict(), tmp_path / f"{name}.pth")
        assert_loads(tmp_path / f"{name}.pth", state)


def test_what_lies_beside_a_prefix_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    """A loss function's buffer beside Lightning's "model." is all that is unexpected; two values of one name raise."""
    named = {f"model.{key}": value for key, value in state.items()}
    torch.save({"state_dict": named | {"criterion.weight": torch.ones(3)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"as it was:\n  1 unexpected: criterion.weight$"):
        crossvit.load_checkpoint(blank(), tmp_path / "x.pth")
    torch.save(state | {"module.norm.0.weight": torch.ones(48)}, tmp_path / "y.pth")
    with pytest.raises(ValueError, match=r"same weight more than once: norm.0.weight as norm.0.weight and module.norm"):
        crossvit.load_checkpoint(blank(), tmp_path / "y.pth")


AVERAGED = {
    "timm": lambda raw, mean: {"epoch": 3, "arch": NAME, "state_dict": raw, "state_dict_ema": mean},
    "DeiT": lambda raw, mean: {"model": raw, "model_ema": mean, "args": argparse.Namespace(lr=0.1)},
    "ours": lambda raw, mean: {"model": raw, "ema": mean, "epoch": 3},
    "wrapped": lambda raw, mean: {"model": raw, "model_ema": {f"module.{key}": value for key, value in mean.items()}},
    "nested": lambda raw, mean: {"model": raw, "ema": {"module": mean, "decay": 0.999}},
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_averaged_weights_come_first(kind: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    """Where a training checkpoint has them, as timm's own loader takes them; where the entry is empty the raw ones."""
    torch.save(AVERAGED[kind](other(state), state), tmp_path / "x.pth")
    assert_loads(tmp_path / "x.pth", state)
    if kind in ("timm", "DeiT"):
        from timm.models import load_state_dict

        theirs = load_state_dict(str(tmp_path / "x.pth"))
        assert all(torch.equal(value, state[key]) for key, value in theirs.items())
    for nothing in (None, {}):
        content = AVERAGED[kind](state, nothing) if kind not in ("wrapped", "nested") else {"model": state, "ema": None}
        torch.save(content, tmp_path / "raw.pth")
        assert_loads(tmp_path / "raw.pth", state)


def test_info_says_what_else_a_file_holds(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Which entry the weights are, whether averaged, and in words what lies beside them."""
    content = AVERAGED["timm"](state, other(state)) | {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(5)}},
            "param_groups": [{"lr": 1}],
        },
        "metric": 71.25,
        "metrics": {"top1": 71.25, "loss": None},
        "args": argparse.Namespace(model=NAME, lr=0.1),
        "amp_scaler": {},
    }
    torch.save(content, tmp_path / "x.pth")
    numbers = sum(value.numel() for value in state.values())
    done = command("info", "--checkpoint", tmp_path / "x.pth", "--json")
    found = json.loads(done.out)["checkpoint"]
    assert (found["weights"], found["averaged"]) == ("state_dict_ema", True)
    assert found["beside"] == {
        "epoch": "3",
        "arch": NAME,
        "state_dict": f"{len(state)} tensors, {numbers:,} numbers",
        "optimizer": "2 tensors, 6 numbers",
        "metric": "71.25",
        "metrics": "top1 71.25, loss None",
        "args": "2 arguments of a command line",
        "amp_scaler": "0 entries",
    }
    done = command("info", "--checkpoint", tmp_path / "x.pth")
    assert "  the weights are its state_dict_ema, averaged over steps\n  it also holds\n    epoch: 3\n" in done.out
    save_file(state, tmp_path / "x.safetensors", {"format": "pt", "trained on": "pets"})
    done = command("info", "--checkpoint", tmp_path / "x.safetensors")
    assert "  it also holds\n    trained on: pets\n" in done.out
    assert "the weights are" not in done.out
    assert describe("a" * 200) == "a" * 79 + "…"


def tied() -> crossvit.CrossViT:
    """A model in which two blocks are one and two norms share a weight."""
    model: Any = small_model(depth=((1, 2, 0),) * 2)
    model.blocks[0].blocks[1][1] = model.blocks[0].blocks[1][0]
    model.blocks[1].blocks[1][0].norm1.weight = model.blocks[1].blocks[1][0].norm2.weight
    return model


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tied_weights(suffix: str, tmp_path: Path) -> None:
    """They are saved under each of their names, exactly, and load into a model that ties them, which still does, and
    into one that does not.
    """
    made, path = tied(), tmp_path / f"x{suffix}"
    crossvit.save_checkpoint(made, path)
    stored = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert all(torch.equal(stored[key], value) for key, value in made.state_dict().items())
    model: Any = tied()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    crossvit.load_checkpoint(model, path)
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.blocks[0].blocks[1][0].mlp.fc1.weight is model.blocks[0].blocks[1][1].mlp.fc1.weight
    loose = blank(depth=((1, 2, 0),) * 2)
    crossvit.load_checkpoint(loose, path)
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in loose.state_dict().items())


def test_views_of_one_memory_save(tmp_path: Path) -> None:
    """Parameters that lie in one buffer, as optimizers and averages arrange them."""
    made = small_model()
    flat = torch.cat([parameter.detach().flatten() for parameter in made.parameters()])
    place = 0
    for parameter in made.parameters():
        parameter.data = flat[place : place + parameter.numel()].view(parameter.shape)
        place += parameter.numel()
    crossvit.save_checkpoint(made, tmp_path / "x.safetensors")
    assert_loads(tmp_path / "x.safetensors", dict(made.state_dict()))


def test_names_that_safetensors_left_out(tmp_path: Path) -> None:
    """Its save_model keeps one name of a tied tensor: the others are there again, for tied models and loose ones; so
    are those that a file of torch's lacks, for a tied model.
    """
    made = tied()
    save_model(made, str(tmp_path / "x.safetensors"))
    assert len(load_file(tmp_path / "x.safetensors")) < len(made.state_dict())
    for model in (tied(), blank(depth=((1, 2, 0),) * 2)):
        crossvit.load_checkpoint(model, tmp_path / "x.safetensors")
        assert all(torch.equal(value, made.state_dict()[key]) for key, value in model.state_dict().items())
    left = {key: value for key, value in made.state_dict().items() if not key.startswith("blocks.0.blocks.1.1.")}
    torch.save(left, tmp_path / "x.pth")
    crossvit.load_checkpoint(tied(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"12 missing: blocks\.0\.blocks\.1\.1\.norm1\.weight"):
        crossvit.load_checkpoint(blank(depth=((1, 2, 0),) * 2), tmp_path / "x.pth")


def test_different_values_for_a_tied_tensor_are_refused(tmp_path: Path) -> None:
    made = small_model(depth=((1, 2, 0),) * 2)
    torch.save(made.state_dict(), tmp_path / "x.pth")
    model = tied()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"13 one tensor in the model, but different ones in the file: blocks\.0\."):
        crossvit.load_checkpoint(model, tmp_path / "x.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_files(dtype: torch.dtype, suffix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    """Their values come back in the model's dtype, exactly; positions of another size are resampled in it."""
    half = {key: value.to(dtype) for key, value in state.items()}
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save(half, path)
    else:
        save_file(half, path)
    assert_loads(path, {key: value.float() for key, value in half.items()})
    if dtype != torch.float8_e4m3fn:
        large, exact = blank(image_size=96), blank(image_size=96)
        crossvit.load_checkpoint(large, path)
        torch.save({key: value.float() for key, value in half.items()}, tmp_path / "exact.pth")
        crossvit.load_checkpoint(exact, tmp_path / "exact.pth")
        torch.testing.assert_close(large.pos_embed_0, exact.pos_embed_0, atol=2e-2, rtol=0)


def test_contents_of_a_raw_state_dict(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pth")
    contents = read_contents(tmp_path / "x.pth")
    assert (contents.source, contents.averaged, contents.beside, contents.metadata) == ("", False, {}, {})
    assert read_checkpoint(tmp_path / "x.pth")[0].keys() == state.keys()
