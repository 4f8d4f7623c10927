"""Arguments at their extremes: each is refused by its name in one line, before anything is built or allocated."""

import os
from pathlib import Path

import pytest
import torch

import crossvit
from commands import command, save_small
from crossvit.system import failures, memory
from crossvit.system.failures import CommandError, guarded
from crossvit.training.loading import EpochSampler
from crossvit.training.recipes import recipe
from untidy import picture, split

TINY = ["bench", "--model", "crossvit_tiny_240"]
SINGLE = ["bench", "--model", "deit_tiny_patch16_224"]
HUGE = "9" * 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def eight_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory, on any machine."""
    monkeypatch.setattr(memory, "machine_memory", lambda: 8 << 30)


def refused(*arguments: str | Path) -> str:
    """The one line that a command says, with status 2."""
    done = command(*arguments)
    said = done.err[done.err.index("crossvit ", 0 if not done.err.startswith("usage") else done.err.index("\ncross")) :]
    assert (done.status, done.out, said.strip().count("\n")) == (2, "", 0), done
    return said.strip()


@pytest.mark.parametrize(
    "line, reason",
    [
        ([*TINY, "--device", "meta"], "--device meta: "),
        ([*TINY, "--device", "cuda:99"], "--device cuda:99: "),
        ([*TINY, "--device", ""], "--device : "),
        ([*TINY, "--image-size", "100000"], "expected sides from 1 to 65535, got '100000'"),
        ([*TINY, "--image-size", "0"], "expected sides from 1 to 65535, got '0'"),
        ([*TINY, "--image-size", HUGE], "expected sides from 1 to 65535"),
        ([*TINY, "--image-size", "65535"], "most of them by image_size and patch_size ("),
        ([*SINGLE, "--image-size", "65535"], "most of them by image_size and patch_size ("),
        ([*TINY, "--set", "num_heads=[3.0,3.0]"], "num_heads must have integers as entries, got [3.0, 3.0]"),
        ([*TINY, "--set", "num_heads=[true,true]"], "num_heads must have integers as entries, got [True, True]"),
        ([*TINY, "--set", "embed_dim=[96.5,192]"], "embed_dim must have integers as entries, got [96.5, 192]"),
        ([*TINY, "--set", "patch_size=[null,16]"], "patch_size must have integers as entries, got [None, 16]"),
        ([*TINY, "--set", "patch_size=ab"], "patch_size must be a sequence with an entry per branch, got 'ab'"),
        ([*TINY, "--set", "img_scale=[NaN,1]"], "img_scale must have a positive entry for each of the 2 branches"),
        ([*TINY, "--set", "mlp_ratio=[1e400,1]"], "mlp_ratio must have a positive entry per branch"),
        ([*TINY, "--set", "mlp_ratio=[1e-9,1]"], "mlp_ratio must make an MLP at least 1 wide, got 1e-09"),
        ([*TINY, "--set", "depth=3"], "depth must have rows of 2 branch depths and the fusion's, none negative, got 3"),
        ([*TINY, "--set", "depth=[[1.5,1,0]]"], "none negative, in integers, got [[1.5, 1, 0]]"),
        ([*TINY, "--set", "depth=[[1000000,1,0]]"], "depth must make at most 1,000 blocks, got 1000001"),
        ([*SINGLE, "--set", "depth=1000000"], "depth must make at most 1,000 blocks, got 1000000"),
        ([*SINGLE, "--set", "mlp_ratio=x"], "mlp_ratio must be a number, got 'x'"),
        ([*SINGLE, "--set", "embed_dim=true"], "embed_dim must be an int for a model of one branch, got True"),
        ([*TINY, "--set", "embed_dim=[300000,300000]"], "most of them by embed_dim and mlp_ratio ("),
        ([*TINY, "--set", f"num_classes={HUGE}"], "most of them by num_classes (over 10^32 numbers)"),
        ([*TINY, "--set", f"in_chans={HUGE}"], "most of them by in_chans and patch_size (over 10^34 numbers)"),
        ([*TINY, "--set", "num_classes=1.5"], "num_classes must be an integer, got 1.5"),
        ([*TINY, "--set", "in_chans=null"], "in_chans must be an integer, got None"),
        ([*TINY, "--set", "drop_rate=a"], "drop_rate must be a number between 0 and 1, got 'a'"),
        ([*TINY, "--set", "drop_rate=NaN"], "drop_rate must be between 0 and 1, got nan"),
        ([*TINY, "--set", "pos_std=1e400"], "pos_std must be more than 0, got inf"),
        ([*TINY, "--set", "qkv_bias=2"], "qkv_bias must be True or False, got 2"),
        ([*TINY, "--set", "multi_conv=[1]"], "multi_conv must be True or False, got [1]"),
        ([*TINY, "--set", "fusion=[]"], "fusion must be one of"),
        ([*TINY, "--set", "name=x"], "name has an option of its own, --model"),
        ([*TINY, "--set", "depth=" + "[" * 100_000], "expected a value of depth that is not nested so deep"),
        ([*TINY, "--batch", "1000000000"], "--batch 1000000000: its images would take 691 TB, but there are 8.59 GB"),
        ([*TINY, "--rounds", "-1"], "--rounds must be at least 1, got -1"),
    ],
)
def test_of_models(line: list[str], reason: str) -> None:
    assert reason in refused(*line)


@pytest.mark.parametrize("ratio", ["1e-300", "0.00001", "5e-324"])
def test_crop_ratios(ratio: str, checkpoint: Path, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    for name in ("predict", "explain"):
        given = ("--checkpoint", checkpoint, "--workers", "0")
        said = refused(name, path, *given, "--crop-ratio", ratio, *["--output", tmp_path / "x"] * (name == "explain"))
        assert "--crop-ratio must be at least 0.001" in said
    data = split(tmp_path / "data", "a", "b")
    assert "--crop-ratio must be at least 0.001" in refused(
        "train", data, "--out", tmp_path / "x", "--crop-ratio", ratio
    )


@pytest.mark.parametrize(
    "name, reason",
    [
        ("/dev/zero", "expected a file, it is a device"),
        ("/dev/null", "expected a file, it is a device"),
        (".", "expected a file, it is a folder"),
        ("pipe", "0 class names were given, but the model has 3 classes"),
        ("large", "expected a file of names, it has more than 64 MB"),
        ("nowhere", "No such file or directory"),
        ("zeros", "expected text, got bytes that are zero"),
        ("latin1", "expected text in UTF-8, got the byte 0xe9"),
        ("deep", "expected a JSON list or object of names, got one nested too deep"),
        ("odd", "expected names, got '[]'"),
        ("gap", "expected an entry for every index from 0, there is no '1'"),
    ],
)
def test_files_of_classes(name: str, reason: str, checkpoint: Path, tmp_path: Path) -> None:
    """A pipe that nobody writes to is not waited for."""
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "zeros").write_bytes(bytes(10))
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "odd").write_text('["a", [], "c"]')
    (tmp_path / "gap").write_text('{"0": "a", "2": "b"}')
    assert reason in refused("info", "--checkpoint", checkpoint, "--classes", tmp_path / name)


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--lr", "inf"], "--lr must be a number up to 1e+30, got inf"),
        (["--weight-decay", "nan"], "--weight-decay must be a number up to 1e+30, got nan"),
        (["--betas", "nan", "0.9"], "--betas must be a number up to 1e+30, got (nan, 0.9)"),
        (["--layer-decay", "1e300"], "--layer-decay must be a number up to 1e+30, got 1e+300"),
        (["--color-jitter", "-1"], "--color-jitter must be at least 0, got -1.0"),
        (["--epochs", HUGE], "--epochs must be a number up to 2.14748e+09"),
        (["--epochs", "9" * 400], "--epochs must be a number up to 2.14748e+09"),
        (["--epochs", "-1"], "--epochs must be at least 1, got -1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--resume", "pipe"], "expected a checkpoint's file, "),
        (["--resume", "/dev/zero"], "expected a checkpoint's file, /dev/zero is none"),
        (["--out", "file"], "--out file: Not a directory"),
    ],
)
def test_of_training(options: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    split(tmp_path / "data", "a", "b")
    os.mkfifo("pipe")
    Path("file").touch()
    tiny = [
        "--model",
        "crossvit_tiny_240",
        "--image-size",
        "24",
        "--batch-size",
        "2",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    assert reason in refused("train", "data", *tiny, *options)
    assert not Path("run", "last.pth").exists()


def test_repeats_past_the_number_of_images() -> None:
    """Draw the first image again and again, without a list of billions; fewer draw what they did."""
    sampler = EpochSampler(10, 4, repeats=2**31 - 1)
    sampler.start(0)
    assert len(set(sampler.order(0).tolist())) == 1
    assert [len(batch) for batch in sampler] == [4, 4]
    for repeats in (1, 3, 4, 10):
        order = EpochSampler(10, 4, repeats=repeats).order(1).tolist()
        whole = EpochSampler(10, 4).order(1).tolist()
        assert order == [index for index in whole for _ in range(repeats)][:10]


def test_a_short_trial_of_a_long_recipe_warms_up_in_proportion() -> None:
    assert recipe("paper", epochs=30).warmup_epochs == 3.0
    assert recipe("paper", epochs=10**9).warmup_epochs == 30.0


def test_more_workers_than_batches_are_not_started(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossvit.cli import pictures

    asked: list[int] = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *arguments: object, num_workers: int, **named: object) -> None:
            asked.append(num_workers)
            super().__init__(*arguments, num_workers=0, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, "DataLoader", Loader)
    files = [picture(tmp_path / f"{k}.png") for k in range(3)]
    given = ("--checkpoint", checkpoint, "--workers", "1000000", "--batch-size")
    assert command("predict", *files, *given, "2").status == 0
    assert command("predict", *files, *given, HUGE).status == 0
    assert asked == [2, 0]


def test_what_is_asked_of_the_memory_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fits into one machine's memory is refused on a smaller one, and never on the meta device."""
    monkeypatch.setattr(memory, "machine_memory", lambda: 20_000_000)
    with pytest.raises(ValueError, match=r"the model's weights, .* would take 24.8 MB, but there are 20 MB of memory"):
        crossvit.create_model("crossvit_tiny_240")
    with torch.device("meta"):
        crossvit.create_model("crossvit_tiny_240")


@pytest.mark.parametrize(
    "error, status, line",
    [
        (CommandError("--x must be y, got z"), 2, "crossvit test: error: --x must be y, got z"),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, "error: [Errno 2] No such file or directory: 'x'"),
        (ValueError("x must be y, got z"), 1, "crossvit test: error: x must be y, got z"),
        (MemoryError(), 1, "crossvit test: error: not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 1, "not enough memory: CUDA out of memory. Tried"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 9"),
            1,
            "crossvit test: error: not enough memory: DefaultCPUAllocator: can't allocate memory: 9",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "worker (pid 7) is killed"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), 1, "crossvit test: error: 'utf-8' codec can't decode"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_how_an_exception_becomes_a_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(options: object) -> int:
        raise error

    assert guarded("test", fails, None) == status  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == (1 if line else 0)


def test_a_fault_of_our_own_shows_where(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does any failure, on request."""

    def fails(options: object) -> int:
        return {}[0]  # type: ignore[no-any-return]

    def is_told(options: object) -> int:
        raise CommandError("no")

    assert guarded("test", fails, None) == 1  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith(f"crossvit test: error: KeyError: 0; {failures.REPORT}\n")
    monkeypatch.setenv("CROSSVIT_TRACEBACK", "1")
    assert guarded("test", is_told, None) == 2  # type: ignore[arg-type]
    assert capsys.readouterr().err.startswith("Traceback")


def test_exit_statuses_are_in_the_help() -> None:
    for name in ("train", "evaluate", "predict", "explain", "info", "export", "bench"):
        assert "Exit status: 0; 1 where a part failed" in " ".join(command(name, "--help").out.split())
