"""Draws command lines from the commands' own parsers, and runs them in this process: each ends in an exit status and a
few lines, never in a traceback, a gigabyte or a minute. An option that is added is drawn from then on.

    python tests/support/cli_fuzz.py FOLDER SEED CALLS      FOLDER: an empty one, to work in
    python tests/support/cli_fuzz.py FOLDER SEED 0 K        call K of that seed alone, with all that it printed

Prints what went wrong, and exits with 1 if anything did.
"""

import argparse
import contextlib
import errno
import importlib
import inspect
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch

import crossvit
from crossvit.cli import bench
from crossvit.cli.main import COMMANDS, main
from crossvit.training.loop import Trainer
from untidy import LATIN1, classes, picture, png, split

SECONDS, MEMORY = 120, 3 << 30  # that a call may take: generous, machines are busy
STATUSES = (0, 1, 2, 130, 141)
MOST_LINES = 40  # a listing of weights that do not fit, or a file each, may be long
EXPORTS = ("weights.safetensors", "weights.pth")  # the programs take seconds each

INTEGERS = ["0", "-1", "1", "2", "3", "7", "1000000", "2147483648", "9223372036854775808", "9" * 400, "9" * 5000]
INTEGERS += ["1e3", "0x10", "", " 5", "1_0", "٣", "nan", "--", "1,2", "0,1", "1,,2"]
NUMBERS = ["0", "-0.0", "1", "0.5", "0.875", "-1", "1e-300", "0.00001", "1e-45", "1e30", "1e300", "1e400", "nan", "inf"]
NUMBERS += ["-inf", "abc", "", "1_0.5", "0.9999999999999999", "5e-324"]
SIZES = ["0", "1", "7", "24", "48", "24x48", "1x1", "100000", "65535", "65536", "1x3000", "9" * 30, "-3", "24x", "²4"]
WORDS = ["", "-", "a", "auto", "none", "meta", "cpu", "cpu:0", "cpu:-1", "cuda", "cuda:99", "mps", "lazy", "a/b", "%s"]
WORDS += [
    "crossvit_tiny_240",
    "crossvit_tiny_241",
    "deit_tiny_patch16_224",
    "resnet18",
    "../x",
    "a\nb",
    LATIN1,
    "ü",
    "*",
]
JSON = ["null", "true", "0", "1", "-1", "1.5", "NaN", "1e400", "[]", "{}", '""', "[3.0,3.0]", "[3,3]", "[0,0]", "[1,1]"]
JSON += ["[[1,1,0]]", "[[1,1,0],[1,1,0]]", "[[1e9,1,0]]", "[[1000000,1,0]]", "[16,32]", "[null,null]", "x", "[1e300,1]"]
JSON += ["[1e-300,1e-300]", '["a","b"]', "[true,true]", "9" * 40, "[" * 100000, "[1000000,2000000]", '{"a":1}', "[[]]"]


class TooSlow(BaseException):
    """Raised by the clock."""


class Broken(io.RawIOBase):
    """An output that takes nothing."""

    def __init__(self, code: int) -> None:
        self.code = code

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(self.code, os.strerror(self.code))


class World:
    """Odd files and folders in the working folder, made again when a call has changed them."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.files: dict[Path, tuple[int, int]] = {}
        self.make()

    def tidy(self) -> None:
        """Removes what calls have written."""
        if self.files != self.state():
            for path in Path().iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            self.make()

    def state(self) -> dict[Path, tuple[int, int]]:
        """Size and time of all that there is."""
        found = (Path(folder, name) for folder, folders, files in os.walk(".") for name in folders + files)
        return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in found}

    def make(self) -> None:
        """Makes them."""
        torch.manual_seed(0)
        sizes: dict[str, Any] = dict(
            num_classes=3, image_size=24, patch_size=[12, 12], img_scale=[1, 1], embed_dim=[16, 32], num_heads=[2, 2]
        )
        model = crossvit.create_model("crossvit_tiny_240", depth=[[1, 1, 0]], **sizes)
        crossvit.save_checkpoint(model, "model.safetensors", classes=["a", "b", "c"])
        crossvit.save_checkpoint(model, "model.pth")
        Path("truncated.pth").write_bytes(Path("model.pth").read_bytes()[:3000])
        Path("truncated.safetensors").write_bytes(Path("model.safetensors").read_bytes()[:3000])
        torch.save({"x": 1, "position": {}}, "odd.pth")
        split(Path("data"), "a", "b", "c")
        split(Path("junk"), "a", "b", "c")
        classes(Path("junk/train"), ".ipynb_checkpoints", "__MACOSX")
        Path("junk/train/a/._0.png").write_bytes(b"\0\5")
        os.symlink("nowhere.png", "junk/train/a/dangling.png")
        os.symlink("..", "junk/train/b/loop")
        Path("junk/val/c/broken.png").write_bytes(b"\x89PNG")
        split(Path("hollow"), "a", "b")
        Path("hollow/train/c").mkdir()
        split(Path(LATIN1), LATIN1, "b", "ü")
        split(Path("labels"), "a")
        for part in ("train", "val"):
            rows = '\ufeffimage,labels\r\na/0.png,a;b\r\n\r\nimage,labels\r\nnone.png,"c"\r\n'
            Path("labels", part, "labels.csv").write_text(rows, encoding="utf-8", newline="")
        split(Path("quotes"), "a")
        Path("quotes/train/labels.csv").write_bytes(b'image,labels\na/0.png,"a\n\xff,b\n')
        Path("empty").mkdir()
        Path("empty.txt").touch()
        Path("names.txt").write_text("\ufeffa\r\n\r\nb\r\nc\r\n", encoding="utf-8")
        Path("names.json").write_text('{"0": "a", "1": ["n", "b"], "2": []}')
        Path("deep.json").write_text("[" * 100_000)
        Path("options.yaml").write_text("workers: 0\nbatch_size: 2\n")
        Path("odd.yaml").write_text(
            "set: {depth: [[1, 1, 0]], x: 2001-01-01}\nepochs: 1e3\nimage_size: [24]\n1: .nan\n"
        )
        Path("latin1.txt").write_bytes(b"caf\xe9\nb\nc\n")
        picture(Path("picture.png"))
        picture(Path("line\nbreak \x1b[31m.png"))
        picture(Path(f"{LATIN1}.png"))
        picture(Path("n" * 250 + ".png"))
        png(Path("flat.png"), 60_000, 1)
        png(Path("high.png"), 1, 60_000)
        png(Path("one.png"), 1, 1, colour=0, bits=16)
        os.symlink("nowhere", "dangling")
        os.symlink("circle", "circle")
        os.mkfifo("pipe")
        self.files = self.state()
        self.paths = [str(path) for path in sorted(Path().iterdir())]
        self.paths += [
            "/dev/null",
            "/dev/zero",
            "/dev/full",
            "/proc/nowhere/x",
            "picture.png/x",
            "nowhere/x",
            "n" * 300,
        ]
        self.paths += ["data/val", "junk/train/a", "empty/x.json", "new.json", "new.png", "*.png", "[", "cifar10:data"]


TRAIN = """data --out run --model crossvit_tiny_240 --image-size 24 --set patch_size=[12,12] --set img_scale=[1,1]
    --set embed_dim=[16,32] --set num_heads=[2,2] --set depth=[[1,1,0]] --preset small --epochs 1 --batch-size 2
    --workers 0 --device cpu""".split()  # noqa: SIM905  as it is typed
MODEL = ["--checkpoint", "model.safetensors", "--device", "cpu"]
BASES = {
    "train": TRAIN,
    "evaluate": ["data", "--workers", "0", *MODEL],
    "predict": ["picture.png", "--workers", "0", *MODEL],
    "explain": ["picture.png", "--workers", "0", *MODEL],
    "info": ["model.safetensors", "--device", "cpu"],
    "export": ["new.pth", *MODEL],
    "bench": ["--batch", "1", "--rounds", "1", *MODEL],
}  # command lines that work; of another command, none


def actions(command: str) -> list[argparse.Action]:
    """What a command takes, by its own parser."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"crossvit.cli.{command}").add_arguments(parser)
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def value(action: argparse.Action, world: World, draw: random.Random) -> str:
    """Something for an argument, mostly of the kind that it takes."""
    if action.choices and draw.random() < 0.7:
        return str(draw.choice(list(action.choices)))
    if action.dest == "set":
        known = [*inspect.signature(crossvit.CrossViT).parameters, "name", "colour", "image_size", ""]
        return f"{draw.choice(known)}={draw.choice(JSON)}" if draw.random() < 0.95 else draw.choice(WORDS)
    if action.dest == "output" and not action.option_strings and draw.random() < 0.5:
        return draw.choice(EXPORTS)
    pools = [INTEGERS, NUMBERS, SIZES, WORDS, world.paths]
    likely = pools
    if action.type is int or "N" in str(action.metavar):
        likely = [INTEGERS]
    elif action.type is float:
        likely = [NUMBERS]
    elif action.dest == "image_size":
        likely = [SIZES]
    elif action.type is None or action.type is Path:
        likely = [world.paths, world.paths, WORDS]
    return draw.choice(draw.choice(likely if draw.random() < 0.9 else pools))


def mutated(line: list[str], action: argparse.Action, world: World, draw: random.Random) -> list[str]:
    """`line` with that argument drawn."""
    if not action.option_strings:
        return [value(action, world, draw), *line[1:]]
    option = draw.choice(action.option_strings)
    if action.nargs == 0:
        return [*line, option]
    count = action.nargs if isinstance(action.nargs, int) else 1
    drawn = [value(action, world, draw) for _ in range(count)]
    return [*line, f"{option}={drawn[0]}"] if count == 1 else [*line, option, *drawn]


@contextlib.contextmanager
def streams(draw: random.Random) -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    """Standard output and error in memory, in some encoding, now and then broken; standard input of some paths."""
    out, err = io.BytesIO(), io.BytesIO()
    encoding = draw.choice(["utf-8", "utf-8", "ascii", "latin-1"])
    broken = Broken(draw.choice([errno.ENOSPC, errno.EPIPE])) if draw.random() < 0.08 else None
    given = b"\xef\xbb\xbfpicture.png\r\n\r\ncaf\xe9.png\nno\0where\n"
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(broken) if broken else out, encoding=encoding, write_through=True)
    sys.stderr = io.TextIOWrapper(err, encoding=encoding, errors="backslashreplace", write_through=True)
    try:
        yield out, err
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.detach() if stream is sys.stderr or not broken else stream.close()
        sys.stdin, sys.stdout, sys.stderr = before


def call(arguments: list[str], draw: random.Random) -> tuple[list[str], str]:
    """Runs a command line. Returns what is wrong with how it ended, and what was printed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    wrong: list[str] = []
    status: Any = None
    with streams(draw) as (out, err):
        small = draw.choice([0, 100, 4096, 20_000]) if draw.random() < 0.1 else limits[0]
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, limits[1]))
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = 0 if ended.code is None else ended.code
        except BaseException:
            wrong.append(f"it raised: {traceback.format_exc()}")
        finally:
            signal.alarm(0)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed, said = out.getvalue(), err.getvalue().decode(errors="replace")
    if not wrong and status not in STATUSES:
        wrong.append(f"its exit status is {status!r}")
    if "Traceback" in said:
        wrong.append("it showed a traceback")
    if "not enough memory" in said or "allocate" in said:
        wrong.append("it ran out of memory, or asked for too much")
    if status in (1, 2) and not said.strip():
        wrong.append("it failed without a word")
    if len(said.splitlines()) > MOST_LINES and "usage:" not in said:
        wrong.append(f"it said {len(said.splitlines())} lines")
    return wrong, f"status {status}\n{printed.decode(errors='replace')[-1500:]}\n{said[-3000:]}"


def limited() -> None:
    """Ends what would be endless: a run after six steps, a benchmark after ten turns, as Ctrl-C would."""
    step, time = Trainer._step, bench._time
    turns = 0

    def few_steps(self: Trainer, batches: Any) -> float:
        waited = step(self, batches)
        if self.run.position.steps >= 6:
            self.stop.code = 130
        return waited

    def few_turns(*arguments: Any) -> float:
        nonlocal turns
        turns += 1
        if turns % 10 == 0:
            raise KeyboardInterrupt
        return time(*arguments)

    Trainer._step = few_steps  # type: ignore[method-assign]
    bench._time, bench.TURN_SECONDS = few_turns, 0.0


def lines(seed: int, world: World) -> Iterator[tuple[list[str], random.Random]]:
    """Command lines without end: every argument of every command in turn, in a drawn order."""
    everything = [(command, action) for command in COMMANDS for action in actions(command)]
    draw = random.Random(seed)
    while True:
        draw.shuffle(everything)
        for command, action in everything:
            own = random.Random(draw.random())
            line = mutated(BASES.get(command, []), action, world, own)
            while own.random() < 0.3:
                line = mutated(line, own.choice(actions(command)), world, own)
            yield [command, *line], own


def run(folder: str, seed: int, calls: int, alone: int | None = None) -> int:
    """Runs the calls. Returns the exit status."""
    os.chdir(folder)
    world = World()
    limited()
    signal.signal(signal.SIGALRM, _too_slow)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    bad, statuses = 0, dict.fromkeys(STATUSES, 0)
    for k, (line, draw) in enumerate(lines(seed, world)):
        world.tidy()
        if k >= (calls if alone is None else alone + 1):
            break
        if alone is not None and k < alone:
            continue
        wrong, printed = call(line, draw)
        status = printed.split("\n", 1)[0].removeprefix("status ")
        statuses[int(status) if status.isdigit() else 1] += 1
        if wrong or alone is not None:
            shown = shlex.join(part[:200].encode("utf-8", "backslashreplace").decode() for part in line)
            print(f"call {k} of seed {seed}: crossvit {shown}\n" + "\n".join(wrong) + f"\n{printed}\n", flush=True)
            bad += bool(wrong)
    print(json.dumps({"calls": sum(statuses.values()), "wrong": bad, "statuses": statuses}))
    return 1 if bad else 0


def _too_slow(*_: object) -> None:
    raise TooSlow


if __name__ == "__main__":
    run_arguments: Callable[..., int] = run
    sys.exit(run_arguments(sys.argv[1], *map(int, sys.argv[2:])))
