"""benchmarks.tables: the figures of README and docs/performance.md are those of benchmarks/results."""

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from benchmarks import tables

if not all(path.is_file() for path in tables.PAGES):
    pytest.skip("no source tree beside the tests", allow_module_level=True)


def measured_anew() -> bool:
    """Whether results differ from the committed ones, as they do after `make bench`."""
    command = ["git", "status", "--porcelain", "benchmarks/results"]
    return bool(subprocess.run(command, cwd=tables.ROOT, capture_output=True, text=True).stdout)


def test_the_pages_have_the_figures_of_the_results() -> None:
    if measured_anew():
        pytest.skip("benchmarks/results was measured anew; python -m benchmarks.tables writes the pages")
    assert tables.main(["--check"]) == 0, "python -m benchmarks.tables writes them anew"


def test_every_table_is_on_a_page() -> None:
    text = "".join(path.read_text() for path in tables.PAGES)
    assert {found[2] for found in tables.BLOCK.finditer(text)} == set(tables.TABLES)


def test_a_figure_that_was_changed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(tables.written_anew("before\n<!-- results: training -->\n<!-- end of results -->\nbehind\n"))
    monkeypatch.setattr(tables, "PAGES", (page,))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 0
    right = page.read_text()
    page.write_text(right.replace(" 4.77 ", " 9.99 "))
    assert page.read_text() != right
    assert tables.main(["--check"]) == 1
    assert "page.md" in capsys.readouterr().out
    assert tables.main([]) == 0
    assert page.read_text() == right


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (0.6407, "0.641"),
        (1.609, "1.61"),
        (9.381, "9.38"),
        (89.25, "89.2"),
        (170.5, "170"),
        (12283.0, "12,280"),
    ],
)
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert tables.figure(value) == text


def test_models_have_the_papers_names() -> None:
    assert tables.name_of("crossvit_15_dagger_240") == "CrossViT-15†"
    assert tables.name_of("crossvit_small_240") == "CrossViT-S"
    assert tables.name_of("deit_tiny_patch16_224") == "`deit_tiny_patch16_224`"
