"""`crossvit --print-completion`: what the shells offer, asked of bash itself."""

import shutil
import subprocess
from pathlib import Path

import pytest

import crossvit
from commands import command

ASK = """source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
_shtab_crossvit crossvit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = command("--print-completion", "bash")
    assert done.status == 0, done.err
    path = tmp_path_factory.mktemp("shell") / "crossvit.bash"
    path.write_text(done.out)
    return path


@pytest.mark.parametrize(
    "words, offered",
    [
        ("crossvit ex", {"explain", "export"}),
        ("crossvit --print-completion ''", {"bash", "zsh"}),
        ("crossvit train data --optimizer ''", {"adamw", "sgd"}),
        ("crossvit train --warmup", {"--warmup-epochs", "--warmup-lr"}),
        ("crossvit bench --model crossvit_9", {"crossvit_9_240", "crossvit_9_dagger_240"}),
        ("crossvit train --model ''", set(crossvit.list_models())),
        ("crossvit info crossvit_ti", {"crossvit_tiny_240"}),
        ("crossvit predict a.png --kernels t", {"triton"}),
        ("crossvit evaluate --device c", {"cpu", "cuda"}),
    ],
)
def test_bash_offers(words: str, offered: set[str], script: Path) -> None:
    done = subprocess.run(["bash", "-c", ASK.format(script=script, words=words)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == offered


def test_bash_offers_files_where_they_are_meant(script: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").touch()
    (tmp_path / "weights").mkdir()
    for words, offered in (
        ("crossvit info --checkpoint wei", {"weights.pth", "weights"}),
        ("crossvit train --config wei", {"weights.pth", "weights"}),
        ("crossvit train --out wei", {"weights"}),
        ("crossvit train wei", {"weights"}),
        ("crossvit predict wei", {"weights.pth", "weights"}),
    ):
        asked = ["bash", "-c", ASK.format(script=script, words=words)]
        done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True)
        assert set(done.stdout.split()) == offered, words


def test_for_zsh(tmp_path: Path) -> None:
    """It is a completion function for the command that names every model; zsh itself reads it, where there is one."""
    done = command("--print-completion", "zsh")
    assert done.status == 0
    assert done.out.startswith("#compdef crossvit\n")
    assert all(name in done.out for name in crossvit.list_models())
    (tmp_path / "_crossvit").write_text(done.out)
    if zsh := shutil.which("zsh"):
        assert subprocess.run([zsh, "-n", tmp_path / "_crossvit"], capture_output=True).stderr == b""


def test_other_shells_are_refused() -> None:
    done = command("--print-completion", "fish")
    assert done.status == 2
    assert "argument --print-completion: invalid choice: 'fish'" in done.err
