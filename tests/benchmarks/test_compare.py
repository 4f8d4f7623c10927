"""benchmarks.compare: what it decides from given times, what it compares with, and a run against a copy of the tree."""

import json
import math
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare import job, process, trees
from benchmarks.compare.plan import chosen, every_case
from benchmarks.compare.process import TreeError
from benchmarks.compare.verdict import Ratio, rank, ratio_of, together, verdict

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("rounds", range(1, 40))
def test_noise_is_the_narrowest_interval_of_order_statistics_that_holds_the_median(rounds: int) -> None:
    """In at least 95 % of all outcomes; the next narrower one in less. Below six rounds there is none."""

    def covered(k: int) -> float:
        return 1 - 2 * sum(math.comb(rounds, heads) for heads in range(k)) / 2**rounds

    k = rank(rounds)
    assert 2 * k <= rounds + 1
    assert covered(k) >= 0.95 or (k == 1 and rounds < 6)
    assert covered(k + 1) < 0.95


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """Not the ratio of medians: a machine that is slow in some rounds is slow for both trees in them."""
    base = [1.0, 5.0, 1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0]
    factors = [1.1, 1.0, 1.3, 0.5, 1.2, 1.1, 1.1, 9.0, 1.05]
    ratio = ratio_of(base, [seconds * factor for seconds, factor in zip(base, factors)])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.1, 1.0, 1.3))
    for wrong in ([], [1.0]):
        with pytest.raises(ValueError, match="as many times of each, at least one"):
            ratio_of([], wrong)


@pytest.mark.parametrize(
    "ratio, tolerance, expected",
    [
        ((1.05, 1.02, 1.08), 0.03, "slower"),
        ((1.05, 0.99, 1.08), 0.03, "unclear"),  # within the noise
        ((1.02, 1.01, 1.03), 0.03, "same"),  # within the tolerance
        ((1.02, 1.01, 1.03), 0.01, "slower"),
        ((1.02, 1.01, 1.06), 0.03, "same"),  # slower for certain, by 2 %
        ((1.00, 0.98, 1.02), 0.03, "same"),
        ((1.00, 0.90, 1.10), 0.03, "unclear"),
        ((0.95, 0.93, 0.98), 0.03, "faster"),
        ((0.95, 0.93, 1.01), 0.03, "same"),
        ((0.98, 0.97, 0.99), 0.03, "same"),
    ],
)
def test_a_case_is_slower_beyond_noise_and_tolerance(
    ratio: tuple[float, float, float], tolerance: float, expected: str
) -> None:
    assert verdict(Ratio(*ratio), tolerance) == expected


@pytest.mark.parametrize(
    "verdicts, expected",
    [
        (["slower"], "slower"),
        (["slower", "slower"], "slower"),
        (["slower", "same"], "unclear"),
        (["slower", "faster"], "unclear"),
        (["faster", "faster"], "faster"),
        (["faster", "unclear"], "same"),
    ],
)
def test_new_processes_have_to_agree(verdicts: list[str], expected: str) -> None:
    assert together(verdicts) == expected


def test_cases_are_chosen_by_regular_expressions() -> None:
    cases = list(every_case("cpu", 2))
    assert len({case.name for case in cases}) == len(cases)
    assert chosen(cases, "", "") == cases
    assert {case.op for case in chosen(cases, "^layer_norm", "")} == {"layer_norm_linear", "layer_norm_mlp"}
    assert {case.group for case in chosen(cases, "", "^(model|train)/")} == {"model", "train"}
    assert all("b1/" in case.name for case in chosen(cases, "", "b1/bfloat16$"))
    assert "cls_fusion" not in {case.op for case in chosen(cases, "", "backward")}
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        chosen(cases, "(", "")


# --- the run, with scripted times ---


class Scripted:
    """In place of a process: a call takes what `seconds` says of (tree, case, how many pairs were started before)."""

    seconds: Callable[[str, str, int], float] = staticmethod(lambda which, case, number: 1.0)
    started = 0

    def __init__(self, tree: Path, *words: object) -> None:
        self.tree = "new" if tree == ROOT else "base"
        self.number = Scripted.started // 2
        Scripted.started += 1

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def ask(self, prepare: str | None = None, turn: int = 0, **more: object) -> dict[str, Any]:
        self.case = prepare or self.case
        return {"seconds": Scripted.seconds(self.tree, self.case, self.number), "digest": "0"}


CASES = "^host/.*_fusion|^host/linear_residual/forward$"  # two


def run_scripted(
    path: Path, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, str, int], float]
) -> tuple[int, dict[str, Any]]:
    """The exit status, and the rows by case."""
    monkeypatch.setattr(job, "Process", Scripted)
    monkeypatch.setattr(Scripted, "seconds", staticmethod(seconds))
    monkeypatch.setattr(Scripted, "started", 0)
    status = job.main(["--tree", str(path), "--cases", CASES, "--rounds", "9", "--json", str(path / "rows.json")])
    return status, {row["case"]: row for row in json.loads((path / "rows.json").read_text())}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder that looks like a tree."""
    (tmp_path / "crossvit_kernels").mkdir()
    (tmp_path / "crossvit_kernels" / "__init__.py").touch()
    return tmp_path


def test_slower_in_two_pairs_of_processes_fails(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def seconds(which: str, case: str, number: int) -> float:
        return 1.25 if which == "new" and "fusion" in case else 1.0

    status, rows = run_scripted(tree, monkeypatch, seconds)
    assert status == 1
    assert {case: row["verdict"] for case, row in rows.items()} == {
        "host/cls_fusion/forward": "slower",
        "host/linear_residual/forward": "same",
    }
    slower = rows["host/cls_fusion/forward"]
    assert slower["ratio"] == {"median": 1.25, "low": 1.25, "high": 1.25}
    assert (len(slower["passes"]), slower["rounds"]) == (2, 18)
    assert len(rows["host/linear_residual/forward"]["passes"]) == 1
    printed = capsys.readouterr().out
    assert "slower: 1 of 2 cases (by more than the noise and 3 %, twice)" in printed


def test_slower_in_one_pair_of_processes_does_not_fail(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, rows = run_scripted(tree, monkeypatch, lambda which, case, number: 1 + (which == "new" and number == 0))
    assert status == 0
    assert {row["verdict"] for row in rows.values()} == {"unclear"}


def test_a_case_that_fails_in_the_working_tree_fails(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def seconds(which: str, case: str, number: int) -> float:
        if which == "new" and "fusion" in case:
            raise TreeError("DisagreementError: output is off")
        return 1.0

    status, rows = run_scripted(tree, monkeypatch, seconds)
    assert status == 1
    assert set(rows) == {"host/linear_residual/forward"}
    assert "left out: host/cls_fusion/forward: in the working tree: Disagreement" in capsys.readouterr().out


def test_ctrl_c_leaves_what_was_measured(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def seconds(which: str, case: str, number: int) -> float:
        if "linear" in case:
            raise KeyboardInterrupt
        return 1.0

    status, rows = run_scripted(tree, monkeypatch, seconds)
    assert status == 130
    assert set(rows) == {"host/cls_fusion/forward"}
    assert "host/cls_fusion/forward " in capsys.readouterr().out


# --- what it compares with ---


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this tree is no git checkout")
def test_a_base_that_does_not_exist_is_named_in_a_line(capsys: pytest.CaptureFixture) -> None:
    assert job.main(["--base", "no-such-commit"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.strip().splitlines()[-1].endswith(f"there is no commit 'no-such-commit' in {ROOT}")
    assert printed.err.strip().count("\n") == 0


@pytest.mark.parametrize(
    "arguments",
    [["--tree", "/nonexistent"], ["--rounds", "8"], ["--threads", "0"], ["--tolerance", "-1"], ["--kernels", "gpu"]],
)
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        job.main(arguments)
    assert f"argument {arguments[0]}" in capsys.readouterr().err


SETUP = """
import json, os, pathlib, sys
with open(os.environ["BUILDS"], "a") as file:
    file.write("built ")
if "broken" in pathlib.Path("csrc/op.cpp").read_text():
    sys.exit("csrc/op.cpp:1:1: error: it is broken")
pathlib.Path("crossvit_kernels/_C.so").write_text(pathlib.Path("csrc/op.cpp").read_text())
pathlib.Path("crossvit_kernels/_build.json").write_text(os.environ["RECORD"])
"""
RECORD = json.dumps({"torch": str(torch.__version__), "abi": sysconfig.get_config_var("SOABI"), "missing": None})


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with an extension that is built at once, into whose file BUILDS each build writes a word."""
    monkeypatch.setenv("BUILDS", str(tmp_path / "builds"))
    (tmp_path / "builds").touch()
    monkeypatch.setenv("RECORD", RECORD)
    root = tmp_path / "repository"
    for folder in ("csrc", "crossvit_kernels"):
        (root / folder).mkdir(parents=True)
    (root / "setup.py").write_text(SETUP)
    (root / ".gitignore").write_text("build/\n*.so\n_build.json\n")
    (root / "crossvit_kernels" / "__init__.py").touch()
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    for source in ("first", "second", "broken", "last"):
        (root / "csrc" / "op.cpp").write_text(source)
        (root / "crossvit_kernels" / "op.py").write_text(f"source = {source!r}")
        author = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        subprocess.run(["git", "add", "."], cwd=root, check=True)
        subprocess.run(["git", *author, "commit", "-q", "-m", source], cwd=root, check=True)
    return root


def test_a_commit_is_built_once(repository: Path, tmp_path: Path) -> None:
    """Its own files, beside the working tree, which stays as it is; anew for another torch."""
    said: list[str] = []
    sha = trees.commit(repository, "HEAD~2")
    folder = trees.built(repository, trees.commit(repository, "HEAD~3"), False, said.append)
    assert (folder / "crossvit_kernels" / "op.py").read_text() == "source = 'first'"
    for _ in range(2):
        folder = trees.built(repository, sha, False, said.append)
    assert folder == repository / "build" / "compare" / sha
    assert (folder / "crossvit_kernels" / "op.py").read_text() == "source = 'second'"
    assert (folder / "crossvit_kernels" / "_C.so").read_text() == "second"
    assert len(said) == (tmp_path / "builds").read_text().count("built") == 2
    (folder / "crossvit_kernels" / "_build.json").write_text('{"torch": "2.11.0", "missing": null}')
    assert trees.built(repository, sha, False, said.append) == folder
    assert len(said) == 3
    assert len(list(folder.parent.glob("*/"))) == 2
    assert trees.git(repository, "status", "--porcelain") == ""


def test_the_same_sources_are_not_built_again(repository: Path) -> None:
    """The working tree's libraries are copied where no source of theirs differs, committed or not."""
    package, said = repository / "crossvit_kernels", []
    (package / "_build.json").write_text(RECORD)
    (package / "_C.so").write_text("of the working tree")
    (package / "op.py").write_text("changed")
    sha = trees.commit(repository, "HEAD")
    assert trees.same_sources(repository, sha)
    folder = trees.built(repository, sha, False, said.append)
    assert said == []
    assert (folder / "crossvit_kernels" / "_C.so").read_text() == "of the working tree"
    assert (folder / "crossvit_kernels" / "op.py").read_text() == "source = 'last'"
    (repository / "csrc" / "new.h").touch()
    assert not trees.same_sources(repository, sha)
    assert trees.described(repository).endswith("+changes")


def test_a_base_that_does_not_compile_says_why(repository: Path) -> None:
    sha = trees.commit(repository, "HEAD~1")
    with pytest.raises(trees.CommitError, match=r"does not compile: csrc/op\.cpp:1:1: error: it is broken"):
        trees.built(repository, sha, False, lambda line: None)
    assert [path.name for path in (repository / "build" / "compare").iterdir()] == [f"{sha}.lock"]
    with pytest.raises(trees.CommitError, match="not a git repository"):
        trees.commit(repository.parent, "HEAD")


# --- processes ---

PARROT = """
import json, os, sys
print(json.dumps({"tree": sys.argv[1]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "die" in request:
        print("it was asked to", file=sys.stderr)
        os._exit(3)
    print(json.dumps(request), flush=True)
"""


def test_a_process_that_dies_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "WORKER", ("-c", PARROT, str(tmp_path.resolve())))
    with process.Process(tmp_path, "cpu", 1, "auto") as worker:
        assert worker.ask(turn=1) == {"turn": 1}
        with pytest.raises(TreeError, match=r"^why$"):
            worker.ask(error="why")
        with pytest.raises(TreeError, match="the process ended with 3: it was asked to"):
            worker.ask(die=True)
        assert worker.ask(turn=2) == {"turn": 2}
        folder = Path(worker.folder.name)
    assert not folder.exists()


def test_a_process_that_imports_another_tree_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would where Python's path has the packages before the tree's."""
    monkeypatch.setattr(process, "WORKER", ("-c", PARROT, "/elsewhere"))
    with (
        process.Process(tmp_path, "cpu", 1, "auto") as worker,
        pytest.raises(TreeError, match="of /elsewhere instead of"),
    ):
        worker.ask(turn=1)


BROKEN = """
def linear_residual(*args, **kwargs):
    raise RuntimeError("out of order")
"""


def test_two_trees_are_timed_by_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A copy of this tree in which one op raises: the other op is timed in both, with the same bits."""
    for package in ("crossvit", "crossvit_kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with (tmp_path / "crossvit_kernels" / "__init__.py").open("a") as file:
        file.write(BROKEN)
    monkeypatch.setattr(job, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(job, "WARM_UP_SECONDS", 0.0)
    words = ["--kernels", "reference", "--threads", "1", "--rounds", "9", "--tolerance", "1e9"]
    cases = "^host/(linear_residual|self_attention)/forward$"
    path = tmp_path / "rows.json"
    assert job.main(["--tree", str(tmp_path), "--cases", cases, "--json", str(path), *words]) == 0
    (row,) = json.loads(path.read_text())
    assert (row["case"], row["rounds"], row["same_bits"]) == ("host/self_attention/forward", 9, True)
    assert all(0 < times["min"] <= times["median"] <= times["max"] for times in row["microseconds"].values())
    assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert {"base", "new", "kernels", "device", "threads", "versions"} <= row.keys()
    assert "left out: host/linear_residual/forward: in the base: RuntimeError: out of order" in capsys.readouterr().out
