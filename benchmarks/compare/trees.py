"""A commit's files in a folder of their own, with its extension built there, once."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

PACKAGE = "crossvit_kernels"
RECORD = Path(PACKAGE, "_build.json")
EMULATION = "tests/cuda_emulation"
SOURCES = ("csrc", "setup.py", EMULATION)  # what the extension is built from


class CommitError(ValueError):
    """There is no such commit, or it cannot be built; the message says why, in a line."""


def git(root: Path, *words: str) -> str:
    """What git prints; raises CommitError with its last line where it fails."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CommitError(f"git does not run: {error}") from None
    if done.returncode:
        raise CommitError((done.stderr.strip().splitlines() or [f"git {words[0]} ended with {done.returncode}"])[-1])
    return done.stdout.strip()


def commit(root: Path, name: str) -> str:
    """The full name of a commit. Raises CommitError where there is none of this name."""
    git(root, "rev-parse", "--git-dir")
    try:
        return git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except CommitError:
        raise CommitError(f"there is no commit {name!r} in {root}") from None


def described(root: Path) -> str:
    """The commit that is checked out, with "+changes" where files in it were changed."""
    return git(root, "rev-parse", "--short=12", "HEAD") + "+changes" * bool(git(root, "status", "--porcelain", "-uno"))


def built(root: Path, sha: str, with_cuda: bool, say: Callable[[str], None]) -> Path:
    """A folder with the commit's files and its extension, built for this Python and torch; kept in build/compare for
    the next time. Where the commit has the sources of the working tree's extension, that is copied instead of built. A
    build that was interrupted goes on where it ended.

    `with_cuda`: CUDA kernels too. Raises CommitError where they do not compile.
    """
    folder = root / "build" / "compare" / sha
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds take turns
        if fits(folder, with_cuda):
            return folder
        tree = folder.with_suffix(".part")
        export(root, sha, tree)
        if same_sources(root, sha) and fits(root, with_cuda):
            for path in (*(root / PACKAGE).glob("*.so"), root / RECORD):
                shutil.copy2(path, tree / PACKAGE)
        else:
            say(f"Building {sha[:12]}, once (minutes)")
            compile_in(tree, with_cuda)
        if folder.exists():  # of another torch, or without CUDA
            shutil.rmtree(folder)
        tree.rename(folder)
    return folder


def export(root: Path, sha: str, folder: Path) -> None:
    """The commit's files in a new folder."""
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        git(root, "archive", "--format=tar", f"--output={archive.name}", sha)
        with tarfile.open(archive.name) as files:
            checked = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 or newer has it
            files.extractall(folder, **checked)


def fits(tree: Path, with_cuda: bool) -> bool:
    """Whether the tree's extension was built, against this torch and Python."""
    try:
        record = json.loads((tree / RECORD).read_text())
    except (OSError, ValueError):
        return False
    abi = sysconfig.get_config_var("SOABI")
    if record.get("torch") != str(torch.__version__) or record.get("abi", abi) != abi or record.get("missing"):
        return False
    return not (with_cuda and record.get("cuda", {"missing": "no record"})["missing"])


def same_sources(root: Path, sha: str) -> bool:
    """Whether the working tree's extension is made of the same files as the commit's."""
    changed = git(root, "diff", "--name-only", sha, "--", *SOURCES)
    return not changed and not git(root, "ls-files", "--others", "--exclude-standard", "--", *SOURCES)


def compile_in(tree: Path, with_cuda: bool) -> None:
    """Builds the extension in place; raises CommitError with the compiler's first complaint where it fails."""
    shutil.rmtree(tree / EMULATION, ignore_errors=True)  # its kernels are not timed
    environment = os.environ | {"CROSSVIT_KERNELS_CUDA": str(int(with_cuda))}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not fits(tree, with_cuda):
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"setup.py ended with {done.returncode}"]
        shutil.rmtree(tree)
        complaint = next((line for line in lines if "error:" in line), lines[-1])
        raise CommitError(f"the base does not compile: {complaint.strip()[:300]}")
    shutil.rmtree(tree / "build", ignore_errors=True)  # its objects
