"""accelerate and restore while a forward runs: it finishes as what it began as.

The change comes from a hook inside of the forward, which is where another thread's would be met at the latest.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossvit_kernels import accelerate, restore
from timm_models import build, images

# The module during whose forward the change happens: inside a stage, a block whose other half is still to come, ...
PLACES = {
    "crossvit_9_240": ("blocks.0.blocks.0", "blocks.0.blocks.1.0.norm1", "blocks.0.fusion.0.attn.wk", "patch_embed.0"),
    "deit_tiny_patch16_224": ("blocks.1.norm1", "blocks.0.attn.qkv"),
    "cait_xxs24_224": ("blocks_token_only.0.norm1", "blocks.0.attn"),
    "siglip": ("attn_pool.proj", "blocks.0.norm1"),
}
CASES = [(name, place) for name, places in PLACES.items() for place in places]


def once(change: Callable[[nn.Module], Any], model: nn.Module) -> Callable[..., None]:
    called: list[bool] = []

    def hook(*_: Any) -> None:
        if not called:
            called.append(True)
            thread = threading.Thread(target=change, args=(model,))
            thread.start()
            thread.join()

    return hook


@pytest.mark.parametrize("name, place", CASES)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_running_forward_finishes(name: str, place: str, gradients: bool) -> None:
    """With the logits of timm's model, whether it was restored meanwhile or accelerated."""
    model = build(name)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
    for change in (restore, lambda m: accelerate(m, "reference", verbose=False)):
        for before in (lambda m: accelerate(m, verbose=False), restore):
            before(model)
            handle = model.get_submodule(place).register_forward_hook(once(change, model))
            with torch.set_grad_enabled(gradients):
                found: Tensor = model(x)
            handle.remove()
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    restore(model)
    assert not any(key.startswith("_crossvit") for m in model.modules() for key in m.__dict__)


def test_many_changes_beside_many_forwards() -> None:
    """Two threads run the model while a third accelerates and restores it as fast as it can."""
    model = build("crossvit_9_240", depth=((1, 1, 0),)).eval()
    x = images(model)
    with torch.no_grad():
        expected = model(x)
    failures: list[Any] = []
    done = threading.Event()

    def run() -> None:
        try:
            with torch.no_grad():
                for _ in range(15):
                    assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        except BaseException as error:
            failures.append(error)

    def change() -> None:
        while not done.is_set():
            accelerate(model, verbose=False)
            restore(model)

    threads = [threading.Thread(target=run) for _ in range(2)]
    changing = threading.Thread(target=change)
    for thread in (changing, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    changing.join()
    assert not failures
