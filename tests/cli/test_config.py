"""--config: a file's options stand where the command line says nothing, and what does not fit is refused by name."""

import json
from pathlib import Path

import pytest

from commands import command, photograph, save_small
from crossvit.cli import train as train_command
from crossvit.cli.config import parse, to_yaml
from crossvit.system.failures import Parser
from training_runs import TINY, make_images, train


def options(*words: str | Path) -> dict:
    """What `crossvit train` makes of a command line, apart from --config itself."""
    parser = Parser("crossvit train")
    train_command.add_arguments(parser)
    found = vars(parse(parser, parser, [str(word) for word in words]))
    return {name: value for name, value in found.items() if name != "config"}


def written(folder: Path, text: str) -> Path:
    """A file of options."""
    path = folder / "options.yaml"
    path.write_text(text)
    return path


LINES = {
    "nothing": ["data"],
    "the tests' own": ["data", *TINY],
    "all kinds": """data --out some/where --image-size 384x288 --betas 0.9 0.98 --lr 1e-5 --weight-decay 0 --no-augment
        --ema-warmup --deterministic --precision bfloat16 --workers 0 --checkpoint-every 7 --resume auto
        --set fusion=none --set depth=[[1,2,0]] --set pos_std=0.5 --set qkv_bias=false --set x=null""".split(),  # noqa: SIM905
    "odd names": ["caf\udce9/\n: {}", "--out", "2024", "--model", "null", "--checkpoint", "*a", "--teacher", "1e-3"],
}


@pytest.mark.parametrize("line", LINES.values(), ids=list(LINES))
def test_options_go_through_a_file_and_back(line: list[str], tmp_path: Path) -> None:
    """Each has the value and the type that it had, also what YAML would take for a number, a null or an alias."""
    expected = options(*line)
    parser = Parser("crossvit train")
    train_command.add_arguments(parser)
    text = to_yaml(parser.parse_args(line))
    found = options("--config", written(tmp_path, text))
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {n: type(value) for n, value in expected.items()}


def test_a_run_writes_its_options(tmp_path: Path) -> None:
    """args.yaml in the run's folder says the same again, is not touched by a run that is refused, and starts one."""
    data, out = make_images(tmp_path / "data", 8, 3), tmp_path / "run"
    line = ["--epochs", "1", "--set", "pos_std=0.5"]
    assert train(data, out, *line)[0] == 0
    file = out / "args.yaml"
    assert options("--config", file) == options(data, "--out", out, *TINY, *line)
    before = file.read_bytes()
    status, printed = train(data, out, "--epochs", "2")
    assert status == 2
    assert "holds a run already" in printed
    assert file.read_bytes() == before
    done = command("train", "--config", file, "--out", tmp_path / "again")
    assert (done.status, done.err) == (0, "")
    assert options("--config", tmp_path / "again" / "args.yaml") == options(
        "--config", file, "--out", tmp_path / "again"
    )


def test_the_command_line_wins(tmp_path: Path) -> None:
    text = "data: theirs\nepochs: 5\nlr: 1e-3\nbatch-size: 16\naugment: false\nset: {fusion: none, pos_std: 0.5}\n"
    found = options(
        "mine", "--epochs", "7", "--augment", "--set", "fusion=all_attention", "--config", written(tmp_path, text)
    )
    assert (found["data"], found["epochs"], found["augment"]) == ("mine", 7, True)
    assert (found["lr"], found["batch_size"]) == (1e-3, 16)
    assert dict(found["set"]) == {"fusion": "all_attention", "pos_std": 0.5}
    assert options("--config", written(tmp_path, "data: theirs\n"))["data"] == "theirs"


def test_of_other_commands(tmp_path: Path) -> None:
    checkpoint, picture = save_small(tmp_path), tmp_path / "cat.png"
    photograph("cat").save(picture)
    files = {"images": [str(picture)], "checkpoint": str(checkpoint)}
    text = json.dumps(files | {"top": 1, "workers": 0, "format": "json"})  # JSON is YAML
    done = command("predict", "--config", written(tmp_path, text))
    assert (done.status, done.err) == (0, "")
    (row,) = json.loads(done.out)
    assert (row["file"], len(row["predictions"])) == (str(picture), 1)
    done = command("bench", "--config", written(tmp_path, f"checkpoint: {checkpoint}\nbatch: 1,2\nrounds: 0\n"))
    assert done.status == 2
    assert done.err.endswith("crossvit bench: error: --rounds must be at least 1, got 0\n")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("epoch: 3", "there is no option 'epoch': did you mean epochs?"),
        ("config: x", "there is no option 'config'"),
        ("3: x", "there is no option 3"),
        ("epochs: 3\nepochs: 4", "'epochs' is there twice"),
        ("batch_size: 3\nbatch-size: 4", "batch_size is there twice"),
        ("epochs: many", "epochs must be an integer, got 'many'"),
        ("epochs: 3.0", "epochs must be an integer, got 3.0"),
        ("epochs: true", "epochs must be an integer, got True"),
        ("epochs: '3'", "epochs must be an integer, got '3'"),
        ("lr: fast", "lr must be a number, got 'fast'"),
        ("lr: [1]", "lr must be a number, got [1]"),
        ("model: 3", "model must be text, got 3"),
        ("model: null", "model must be text, got None"),
        ("out: 2024", "out must be text, got 2024"),
        ("precision: half", "precision must be one of float32, bfloat16, float16, got 'half'"),
        ("augment: maybe", "augment must be true or false, got 'maybe'"),
        ("deterministic: 1", "deterministic must be true or false, got 1"),
        ("betas: 0.9", "betas must be a list of 2, got 0.9"),
        ("betas: [0.9]", "betas must be a list of 2, got [0.9]"),
        ("image_size: big", "image_size: expected a side or HEIGHTxWIDTH, such as 240 or 384x288, got 'big'"),
        ("set: fusion=none", "set must be values by name, as in 'set: {fusion: none}', got 'fusion=none'"),
        ("set: {image_size: 24}", "set: image_size has an option of its own, --image-size"),
        ("set: {depth: 2001-01-01}", "set: expected a plain value of depth, got datetime.date(2001, 1, 1)"),
        ("- epochs", "expected options by name, as in 'epochs: 30', got ['epochs']"),
        ("epochs: [", "expected the node content"),
        ("epochs: &a 3\nrepeats: *a", "expected values, got an alias of one"),
        ("epochs: !!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("epochs: 2001-99-99", "month must be in 1..12"),
        ("epochs: " + "9" * 5000, "Exceeds the limit"),
        ("[" * 5000, "it is nested too deep"),
        ("a" * 300_000, "expected a file of options, it has more than 256 kB"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(text: str, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    done = command("train", "data", "--config", path)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"crossvit train: error: --config {path}: ")
    assert done.err.count("\n") == 1
    assert reason in done.err


@pytest.mark.parametrize(
    "name, reason",
    [
        ("nowhere", "No such file or directory"),
        (".", "it is a folder"),
        ("/dev/zero", "it is a device"),
        ("latin1", "0xe9"),
    ],
)
def test_files_that_cannot_be_read(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes(b"data: caf\xe9")
    done = command("train", "data", "--config", tmp_path / name)
    assert done.status == 2
    assert reason in done.err
    done = command("train", "data", "--config")
    assert done.status == 2
    assert "argument --config: expected one argument" in done.err
