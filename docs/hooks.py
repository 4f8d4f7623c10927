"""What the documentation needs beyond its Markdown: formulas as MathML, which a browser typesets without a script or a
network, the plots of benchmarks/results as files of the site, and a look at whether the reference is complete."""

import ast
import re
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES = ROOT / "examples"
# Packages whose exported names the API reference has, but for modules among them.
EXPORTING = ("crossvit", "crossvit_kernels", "crossvit_kernels/backends", "crossvit/attention")
# What pymdownx.arithmatex makes of $...$ and of $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
MATHML = "http://www.w3.org/1998/Math/MathML"
SHORT_CELL = re.compile(r"<td>([^<]{1,22})</td>")  # of a table, which is not to be broken into two lines
# What is not to be a product of single letters: a space in text mode, and where the two converters differ.
REWRITTEN = {r"\mathrel{+}=": r"\mathrel{+=}"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside of docs: the plots as results/<name>, the examples with their page as examples/<name>."""
    outside = {f"results/{path.name}": path for path in sorted(RESULTS.glob("*.png"))}
    outside |= {f"examples/{path.name}": path for path in sorted(EXAMPLES.iterdir()) if path.is_file()}
    for name, path in outside.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pages name a plot by its place in the repository, so that they show it there too."""
    return markdown.replace("](../benchmarks/results/", "](results/")


def overlined(mathml: str) -> str:
    r"""MathML with the rows under an \overline as rows of a class, which the style sheet draws the line over: browsers
    do not stretch the accent that the converter puts there."""
    ElementTree.register_namespace("", MATHML)
    tree = ElementTree.fromstring(mathml)
    for over in tree.iter(f"{{{MATHML}}}mover"):
        if len(over) == 2 and over[1].text == "\N{HORIZONTAL BAR}":
            over.tag = f"{{{MATHML}}}mrow"
            over.set("class", "overline")
            over.remove(over[1])
    return ElementTree.tostring(tree, encoding="unicode")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Formulas as MathML, and a class for short cells of tables. A command that the converter does not know ends the
    build."""

    def mathml(found: re.Match[str]) -> str:
        kind, inline, block = found.groups()
        formula = unescape(inline or block).strip()
        for before, after in REWRITTEN.items():
            formula = formula.replace(before, after)
        made = overlined(convert(formula, display="inline" if block is None else "block"))
        if "\\" in made or "merror" in made:
            raise PluginError(f"{page.file.src_uri}: the formula {formula!r} has a command that is not known")
        return f'<{kind} class="formula">{made}</{kind}>'

    return SHORT_CELL.sub(r'<td class="short">\1</td>', FORMULA.sub(mathml, html))


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Every exported name has its place in the API reference, or the build ends."""
    pages = "".join(path.read_text() for path in Path(config.site_dir, "api").glob("*.html"))
    documented = {name.rpartition(".")[2] for name in re.findall(r'<h\d id="([\w.]+)"', pages)}
    for package in EXPORTING:
        tree = ast.parse((ROOT / package / "__init__.py").read_text())
        exported = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
        missing = [name for name in exported if name not in documented and not (ROOT / package / name).is_dir()]
        if missing:
            raise PluginError(f"docs/api has no entry for {', '.join(missing)} of {package}")
