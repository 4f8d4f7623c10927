"""README, CONTRIBUTING and docs as texts: lines can be read, the environment variables in them are those that the code
reads, and formulas become MathML or an error."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("no source tree beside the tests", allow_module_level=True)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LONGEST = 160
# Where programs are found, and what tests read or set for themselves: nothing that a user sets for this package.
NOT_OURS = {
    "PATH",
    "PYTHONPATH",
    "PYTEST_CURRENT_TEST",
    "PYTEST_XDIST_WORKER_COUNT",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_can_be_read(page: Path) -> None:
    """Tables are as wide as they are, and an address cannot be broken."""
    lines = page.read_text().splitlines()
    long = [number for number, line in enumerate(lines, 1) if len(line) > LONGEST and not line.startswith("|")]
    assert not [number for number in long if not re.search(r"https?://\S{80}", lines[number - 1])], page


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def environment_calls(tree: ast.AST) -> Iterator[ast.expr]:
    """What is looked up in os.environ, or by os.getenv."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            yield node.slice
        elif isinstance(node, ast.Call) and node.args:
            if ast.unparse(node.func) in ("os.environ.get", "os.environ.setdefault", "os.getenv"):
                yield node.args[0]
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            yield node.left


def variables_read() -> set[str]:
    """The names of the variables that the sources, the tests and what builds them read."""
    found: set[str] = set()
    for path in (ROOT / "setup.py", *(p for top in TOPS for p in (ROOT / top).rglob("*.py"))):
        tree = ast.parse(path.read_text())
        constants = {
            target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for key in environment_calls(tree):
            name = key.value if isinstance(key, ast.Constant) else constants.get(ast.unparse(key))
            if isinstance(name, str):
                found.add(name)
    for top in ("csrc", "tests/cuda_emulation"):
        for path in (p for p in (ROOT / top).rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")):
            found |= set(re.findall(r'\b(?:getenv|environment)\("(\w+)"', path.read_text()))
    return found - NOT_OURS


TOPS = ("crossvit", "crossvit_kernels", "benchmarks", "csrc", "tests")


def test_the_environment_variables_are_those_that_the_code_reads() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    ours, others = page.split("## Of other programs")
    first_cells = re.findall(r"^\| (`.+?) \|", ours, re.MULTILINE)
    listed = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    read = variables_read()
    assert "CROSSVIT_KERNELS_ISA" in read  # of C++
    assert "CROSSVIT_TEST_SHARE" in read  # by a constant's name
    assert read <= listed, f"docs/environment.md does not list {sorted(read - listed)}"
    prefixed = {name for name in listed if name.startswith("CROSSVIT_")}
    assert prefixed <= read, f"nothing reads {sorted(prefixed - read)}"
    sources = (
        "\n".join(p.read_text() for top in TOPS for p in (ROOT / top).rglob("*.py")) + (ROOT / "setup.py").read_text()
    )
    assert all(name in sources for name in listed - prefixed)
    assert not set(re.findall(r"`(CROSSVIT_\w+)`", others))


def test_every_variable_that_a_page_names_is_in_the_table() -> None:
    listed = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "environment.md").read_text()))
    for page in PAGES:
        named = set(re.findall(r"\b(CROSSVIT_(?:KERNELS|TESTS|TEST|FUZZ|HOSTILE|TRACEBACK)\w*)\b", page.read_text()))
        assert named <= listed, page


@pytest.mark.parametrize(
    "formula, made",
    [
        (r'<span class="arithmatex">\(\hat x_n\)</span>', "<msub>"),
        (r'<div class="arithmatex">\[a &lt; \frac{1}{D}\]</div>', "<mfrac>"),
        (r'<span class="arithmatex">\(\overline{d \hat x}\)</span>', 'class="overline"'),
        (r'<span class="arithmatex">\(\unheardof x\)</span>', None),
    ],
)
def test_formulas_become_mathml(formula: str, made: str | None) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    from mkdocs.exceptions import PluginError

    hooks: dict = {"__file__": str(ROOT / "docs" / "hooks.py")}
    exec(compile((ROOT / "docs" / "hooks.py").read_text(), "docs/hooks.py", "exec"), hooks)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    if made is None:
        with pytest.raises(PluginError, match="unheardof"):
            hooks["on_page_content"](formula, page=page)
    else:
        html = hooks["on_page_content"](formula, page=page)
        assert made in html
        assert "arithmatex" not in html
