"""A run's files: checkpoints, the log of metrics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from ..system.files import patient_file, replacing, write_text
from ..weights.checkpoint_file import UNREADABLE, RefusedError, reason, unpickle


def save(content: dict[str, Any], path: Path) -> None:
    """Writes plain Python values and tensors, as `load` reads them."""
    with replacing(path) as temporary, patient_file(temporary) as file:
        torch.save(content, file)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote of a run, on the CPU; no code in the file is run. Raises ValueError for a file that is none of
    ours, OSError for one that cannot be read.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"expected a checkpoint's file, {path} is none")
    alone = f"{path} holds weights alone, no training run (start from them with --checkpoint)"
    if path.suffix == ".safetensors" and path.exists():
        raise ValueError(alone)
    try:
        content = unpickle(path, path)
    except (RefusedError, *UNREADABLE):
        raise
    except Exception as error:  # of damaged bytes torch raises whatever comes up
        raise ValueError(f"{path} is truncated, or no checkpoint: {reason(error)}") from error
    if not isinstance(content, dict) or "position" not in content:
        raise ValueError(alone)
    return content


class Log:
    """Metrics as JSON lines, appended and flushed one by one.

    path: the file; lines past `step`, of a run that went further than its last checkpoint, and what a kill left of a
    line are removed first. tensorboard: a folder, written to if TensorBoard is installed. `None` as path: nothing is.
    """

    def __init__(self, path: Path | None, step: int = 0, tensorboard: Path | None = None) -> None:
        self.path = path
        self.file: IO[str] | None = None
        self.board: Any = None
        if path is None:
            return
        kept = [line for line in read_lines(path) if 0 < line["step"] <= step] if path.exists() else []
        write_text(path, "".join(map(_line, kept)))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close
        if tensorboard is not None and (writer := _tensorboard()) is not None:
            self.board = writer(str(tensorboard), purge_step=step + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends {"kind", "step", **values}. Raises OSError, naming the file, where the disk is full."""
        if self.file is None:
            return
        try:
            self.file.write(_line({"kind": kind, "step": step} | values))
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log."""
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # a line that a full disk or a power cut left
            break
    return lines


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def _tensorboard() -> Callable[..., Any] | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter
