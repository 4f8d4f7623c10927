"""What the shape of the code is held to: `make check` runs it, and CONTRIBUTING has its table.

    python tests/support/house.py [--details]

Prints one line for each rule with the number of places that break it, and ends with 1 where that is more than LIMITS
allows. Cycles and imports that run up are import-linter's to find; its contracts are in pyproject.toml.
"""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lizard

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("crossvit", "crossvit_kernels", "benchmarks")
FOLDERS = (*PACKAGES, "examples", "csrc")
CODE = (".py", ".cpp", ".h", ".cu", ".cuh")
MOST_LINES, MOST_BODY, MOST_PARAMETERS, MOST_OF_A_KERNEL = 300, 100, 12, 20
TORCH_INTERNALS = "torch_internals.py"
# An op's function in Python takes its schema's arguments one by one.
OPS = {path.stem for path in (ROOT / "crossvit_kernels" / "ops").glob("[a-z]*.py")} | {"transformer_block"}
PRIVATE_TORCH = re.compile(
    r"\btorch(?:\.\w+)*\._(?!_)|\b(?:from|import) torch(?:\.\w+)*\._(?!_)|\bfrom torch[.\w]* import _(?!_)"
)
# How many places may break each rule: a number here may only become smaller.
LIMITS = {
    "files over 300 lines": 1,
    "Python functions over 100 lines": 0,
    "Python functions over 12 parameters": 2,
    "C++ functions over 100 lines": 1,
    "C++ functions over 12 parameters": 1,
    "private names imported from another module": 0,
    "uses of private torch outside torch_internals.py": 0,  # in the two packages; benchmarks look into torch
}


def sources() -> list[Path]:
    """The code that is in the repository, tests apart, relative to its root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [Path(name) for name in listed if name.endswith(CODE) and name.split("/")[0] in FOLDERS]


def long_files(paths: list[Path]) -> Iterator[str]:
    """Files of more than MOST_LINES lines."""
    for path in paths:
        if (lines := len((ROOT / path).read_text().splitlines())) > MOST_LINES:
            yield f"{path}: {lines} lines"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a module."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many lines a function has, without its decorators, its signature and its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters a function has."""
    given = function.args
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)


def private_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names with a leading underscore that a module takes from another of this project, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] in PACKAGES):
            for alias in node.names:
                if alias.name.startswith("_") and alias.name != "_C":
                    yield node.lineno, alias.name


def cpp_functions(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """The place, name, lines and parameters of every function of a C++ or CUDA source."""
    source = (ROOT / path).read_text()
    for found in lizard.analyze_file.analyze_source_code(f"{path.stem}.cpp", source).function_list:
        name = found.name.rpartition("::")[2]
        yield f"{path}:{found.start_line} {name}", name, found.length, len(found.full_parameters)


def look(paths: list[Path]) -> dict[str, list[str]]:
    """The places that break each rule."""
    found: dict[str, list[str]] = {rule: [] for rule in LIMITS}
    found["files over 300 lines"] += long_files(paths)
    for path in (path for path in paths if path.suffix != ".py"):
        for where, name, lines, parameters in cpp_functions(path):
            if lines > MOST_BODY:
                found["C++ functions over 100 lines"].append(f"{where}: {lines}")
            if parameters > MOST_PARAMETERS and name.removesuffix("_backward") not in OPS:
                found["C++ functions over 12 parameters"].append(f"{where}: {parameters}")
    for path in (path for path in paths if path.suffix == ".py"):
        text = (ROOT / path).read_text()
        tree = ast.parse(text)
        for function in functions(tree):
            where = f"{path}:{function.lineno} {function.name}"
            if (lines := lines_of(function)) > MOST_BODY:
                found["Python functions over 100 lines"].append(f"{where}: {lines}")
            if (parameters := parameters_of(function)) > MOST_PARAMETERS and not exempt(path, function):
                found["Python functions over 12 parameters"].append(f"{where}: {parameters}")
        for line, name in private_imports(tree):
            found["private names imported from another module"].append(f"{path}:{line} {name}")
        if path.name != TORCH_INTERNALS and path.parts[0] != "benchmarks":
            for number, line_text in enumerate(text.splitlines(), 1):
                if PRIVATE_TORCH.search(line_text.partition("#")[0]):
                    place = f"{path}:{number} {line_text.strip()}"
                    found["uses of private torch outside torch_internals.py"].append(place)
    return found


def exempt(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a contract or a compiler asks for the parameters: an op's public function and its reference take the op's
    arguments one by one, and a Triton kernel what it is compiled for, each block size for itself."""
    if path.parent == Path("crossvit_kernels", "ops"):
        return True
    compiled = any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
    return compiled and parameters_of(function) <= MOST_OF_A_KERNEL


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where a rule is broken in more places than LIMITS allows."""
    parser = argparse.ArgumentParser(prog="python tests/support/house.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--details", action="store_true", help="name every place, also where they are allowed")
    options = parser.parse_args(arguments)
    status = 0
    for rule, places in look(sources()).items():
        over = len(places) > LIMITS[rule]
        status |= over
        print(f"{rule}: {len(places)}, at most {LIMITS[rule]} allowed{' - too many' if over else ''}")
        if over or options.details:
            print(*(f"    {place}" for place in places), sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
