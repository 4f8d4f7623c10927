"""Running a kernel, or, instead of a run, keeping a record of what would run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import direct
from .configs import Config
from .target import pushed, targeting

NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its grid and all its arguments by name, constexpr ones and blocks included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


_records: list[list[Launch]] = []


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Launches inside are not run but collected, as `architecture` ("sm_90") would get them; tensors may be on
    "meta"."""
    with targeting(architecture), pushed(_records, []) as launches:
        yield launches


def launch(
    kernel: Any, grid: tuple[int, ...], config: Config, given: Mapping[str, Any] = NOTHING, /, **arguments: Any
) -> None:
    """Runs `kernel` over `grid`; `config` gives its block sizes, num_warps and num_stages.

    `arguments` come before what is `given` for several kernels; both may hold more than this one takes.
    """
    if 0 in grid:
        return
    arguments = {**given, **arguments, **config.blocks}
    if _records:
        taken = {name: arguments[name] for name in kernel.arg_names}
        _records[-1].append(Launch(kernel, grid, taken, config.num_warps, config.num_stages))
    else:
        direct.run(kernel, grid, arguments, config.num_warps, config.num_stages)
