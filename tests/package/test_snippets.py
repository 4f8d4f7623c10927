"""Every snippet of README.md, CONTRIBUTING.md and docs/ runs, or is on the list of those that cannot.

tests/support/snippets.py has the list, with what is checked instead, and the way they are run.
"""

import re
from pathlib import Path

import pytest
import torch

for package in ("sybil", "timm", "torchvision", "sklearn"):
    pytest.importorskip(package)

import snippets
from benchmarks.demo import write_digits

if not (snippets.ROOT / "Makefile").is_file():
    pytest.skip("no source tree beside the tests", allow_module_level=True)
PAGES = [page for page in snippets.pages() if page not in snippets.ELSEWHERE]
KEPT = 8  # digits of each kind in train/, three in val/
NAMED = ("0274.png", "1790.png")  # pictures that a page names
COMMAND = re.compile(r"^\s*(\$ |>>> |python3? -|pip |make [a-z]|torchrun |crossvit [a-z]+ -)", re.MULTILINE)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves in demo/digits, with few of the pictures."""
    root = tmp_path_factory.mktemp("snippets")
    write_digits(root)
    for folder in root.glob("*/*"):
        files = sorted(folder.iterdir())
        for file in files[KEPT if folder.parent.name == "train" else 3 :]:
            if file.name not in NAMED:
                file.unlink()
    return root


@pytest.fixture
def sandbox(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a page's snippets run in: it holds demo/digits, and a file that is no picture."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "digits").symlink_to(digits)
    (tmp_path / "notes.jpg").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore")
def test_every_snippet_of_the_page_runs(page: str, sandbox: Path) -> None:
    torch.manual_seed(0)
    for example in snippets.parse(page):
        example.evaluate()


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_passed_over(page: str) -> None:
    """A block is an example, or its language says that nothing in it runs, and then there is no command in it."""
    document = snippets.parse(page)
    examples = [example.region for example in document]
    for fence in snippets.fences(document):
        language, place = fence.lexemes["language"], document.line_column(fence.start)
        if any(fence.start <= example.start < fence.end for example in examples):
            continue
        assert language in snippets.NO_CODE, f"{page}, {place}: nobody runs a block of {language or 'no language'!r}"
        found = COMMAND.search(fence.lexemes["source"])
        assert not found, f"{page}, {place}: nobody runs {found[0]!r} in a block of {language!r}"


def test_the_list_of_what_is_not_run_is_no_longer_than_it_has_to_be() -> None:
    """Every entry stands for a command of a page, every page and language on it exists."""
    used, languages = set(), set()
    for page in PAGES:
        document = snippets.parse(page)
        languages |= {fence.lexemes["language"] for fence in snippets.fences(document)}
        for example in document:
            if example.region.lexemes.get("arguments") in snippets.SHELLS:
                used |= {snippets.not_run(command) for command in snippets.shell_commands(example.parsed)}
    assert used >= set(snippets.NOT_RUN)
    assert languages >= snippets.NO_CODE.keys()
    for page, test in snippets.ELSEWHERE.items():
        assert (snippets.ROOT / page).is_file()
        assert Path(page).name in (snippets.ROOT / test).read_text()


@pytest.mark.parametrize(
    "block, said",
    [
        ("```python\n1 / 0\n```\n", "division by zero"),
        ("```python\n>>> 1 + 1\n3\n```\n", "Expected"),
        ("```bash\npython -m crossvit predict nothing.png --checkpoint nothing.pth\n```\n", "nothing.pth"),
        ("```bash\nls nothing # here\n```\n", "nothing"),
        ("```console\n$ ls nothing\nls: cannot access 'nothing'\n```\n", "nothing"),
        ("```bash\nmake nothing\n```\n", "nothing"),
        ("```bash\nmake gpu NOTHING=1\n```\n", "NOTHING"),
        ("```bash\npip install crossvit-kernels[nothing]\n```\n", "nothing"),
        ("```bash\npip install --nothing .\n```\n", "nothing"),
        ("```bash\npip install torcj\n```\n", "torcj"),
        ("```bash\npython -m benchmarks.ops --nothing\n```\n", "nothing"),
        ("```bash\ntorchrun --nproc-per-node 8 -m crossvit train imagenet --nothing\n```\n", "nothing"),
    ],
)
def test_a_wrong_snippet_fails(block: str, said: str, sandbox: Path) -> None:
    (sandbox / "page.md").write_text(block)
    (example,) = snippets.SYBIL.parse(sandbox / "page.md")
    with pytest.raises((AssertionError, ArithmeticError), match=said):
        example.evaluate()
