"""The files that a repository's visitors and tools look for: they are well-formed, and say what the package says."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import crossvit
import crossvit_kernels

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "CITATION.cff").is_file():
    pytest.skip("no source tree beside the tests", allow_module_level=True)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def test_the_version_has_one_source() -> None:
    """pyproject.toml reads it from where both packages have theirs."""
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "crossvit_kernels.version.VERSION"}
    assert crossvit.__version__ is crossvit_kernels.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?[a-z]+\d+)?", crossvit.__version__)


def test_the_citation() -> None:
    """What the Citation File Format asks for, of this version and license, with the paper."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0"
    assert (str(cited["version"]), cited["license"]) == (crossvit.__version__, PROJECT["project"]["license"])
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert "2103.14899" in paper["doi"]
    assert [author["family-names"] for author in paper["authors"]] == ["Chen", "Fan", "Panda"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path: Path) -> None:
    """A name, a description, and fields with a label each, known by names that are told apart."""
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields
    assert all(field["type"] in ("textarea", "input", "dropdown", "checkboxes") for field in fields)
    assert all(field["attributes"]["label"] for field in fields)
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)


def test_workflows_run_what_is_here() -> None:
    """Their jobs wait for jobs that exist; scripts, make's targets and tests that they name are in the tree."""
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert paths
    makefile = (ROOT / "Makefile").read_text()
    for path in paths:
        workflow = yaml.safe_load(path.read_text())
        jobs = workflow["jobs"]
        assert workflow["permissions"] == {"contents": "read"}
        for job in jobs.values():
            needs = job.get("needs", [])
            assert {needs} <= jobs.keys() if isinstance(needs, str) else set(needs) <= jobs.keys()
            commands = "\n".join(step.get("run", "") for step in job["steps"])
            assert all("run" in step or "uses" in step for step in job["steps"])
            for script in re.findall(r"(?:^|\s)(\.ci/[\w-]+|tests/[\w/]+\.py)", commands):
                assert (ROOT / script).is_file(), f"{path.name}: {script}"
            for targets in re.findall(r"^make (.*)$", commands, re.MULTILINE):
                for target in (word for word in shlex.split(targets) if "=" not in word):
                    assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path.name}: make {target}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on the PATH")
def test_make_installs_the_pytorch_that_it_is_told(tmp_path: Path) -> None:
    """In one command with torchvision, which would bring the newest one; the workflows say which by TORCH."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for given, expected in (((), "torch>=2.11"), (("TORCH=torch==2.11.* numpy<2.4",), "numpy<2.4")):
        command = ["make", "--dry-run", ".venv/.tools", *given]
        told = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        (line,) = (line for line in told.splitlines() if "torchvision" in line)
        assert {expected, "torchvision"} <= set(shlex.split(line))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())["jobs"]["test"]
    assert "make test TORCH='${{ matrix.torch }}'" in [step.get("run") for step in workflow["steps"]]


def test_what_an_index_shows() -> None:
    """Authors, keywords, addresses and classifiers; every Python that the workflows try has its classifier."""
    project = PROJECT["project"]
    assert all(project[name] for name in ("authors", "keywords", "urls", "description", "readme", "license"))
    tried = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())["jobs"]["test"]["strategy"]
    pythons = tried["matrix"]["python"]
    assert f">={pythons[0]}" == project["requires-python"]
    assert all(f"Programming Language :: Python :: {python}" in project["classifiers"] for python in pythons)


def test_nobody_is_sent_to_an_address_that_was_made_up() -> None:
    """No e-mail address at all, and of other places the paper's, the covenant's and timm's alone."""
    papers = [
        "CITATION.cff",
        "SECURITY.md",
        "CODE_OF_CONDUCT.md",
        *(str(path) for path in (ROOT / ".github").rglob("*.*")),
    ]
    for name in papers:
        text = (ROOT / name).read_text()
        assert not re.search(r"[\w.]+@[\w-]+\.\w", text), name
        for place in re.findall(r"https?://([\w.-]+)", text):
            assert place in ("arxiv.org", "www.contributor-covenant.org"), name
