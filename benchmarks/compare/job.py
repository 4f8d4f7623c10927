"""Time of ops and models in the working tree over that in another commit, round by round in turn.

python -m benchmarks.compare [--base HEAD~1 | --tree DIR] [--ops REGEX] [--cases REGEX] [--rounds 15] [--tolerance 3]
    [--kernels auto] [--device cpu] [--json PATH]

Each tree has a process of its own; they take turns, and a round is a turn of each. A case whose ratio is beyond its
noise and the tolerance is measured once more by two new processes, and counts as slower where both say so. Ends with 1
where a case is slower, or fails in the working tree.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .. import timing
from ..devices import DEVICES, no_gpu, use
from ..session import KERNELS, check_device, rounds
from . import trees
from .plan import Case, chosen, every_case
from .process import Process, TreeError
from .rows import Pass, Row, table

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 15
TURN_SECONDS = 0.05  # how long a tree's turn lasts at least
WARM_UP_SECONDS = 0.15
NAMES = ("base", "new")


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a case is slower or fails in the working tree; 2 where there is nothing to compare with; 130 after
    Ctrl-C."""
    options = _parse(arguments)
    use(options.device)
    try:
        new = "the working tree" if options.tree is not None else trees.described(ROOT)
        if options.tree is None:
            sha = trees.commit(ROOT, options.base)
            folder, base = trees.built(ROOT, sha, no_gpu() is None, lambda line: print(line, flush=True)), sha[:12]
        else:
            folder, base = options.tree, str(options.tree)
    except trees.CommitError as error:
        print(f"python -m benchmarks.compare: {error}", file=sys.stderr)
        return 2
    facts = {
        "base": base,
        "new": new,
        "kernels": options.kernels,
        **DEVICES[options.device].facts(),
        "threads": options.threads,
        "versions": DEVICES[options.device].versions(),
    }
    comparison = Comparison(folder, options)
    try:
        comparison.run(facts)
    except KeyboardInterrupt:
        comparison.interrupted = True
    finally:
        comparison.bar.close()
    print(f"{new} over {base}; {DEVICES[options.device].environment()}, {options.threads} threads")
    for line in table(list(comparison.rows.values()), options.tolerance / 100):
        print(line)
    for name, reason in comparison.left_out.items():
        print(f"left out: {name}: {reason}")
    if comparison.rows:
        print(f"Written: {options.json}")
    if comparison.interrupted:
        print("Interrupted: whole cases until then are kept; none or not all of them were measured a second time.")
    return comparison.exit_status()


class Comparison:
    """The rows of a comparison as they are measured. `left_out` says why a case has none."""

    def __init__(self, base: Path, options: argparse.Namespace) -> None:
        self.trees = {"base": base, "new": ROOT}
        self.options = options
        self.tolerance: float = options.tolerance / 100
        self.rows: dict[str, Row] = {}
        self.left_out: dict[str, str] = {}
        self.failed = self.interrupted = False
        self.bar = tqdm(unit="round", dynamic_ncols=True, total=0)

    def run(self, facts: dict[str, object]) -> None:
        """Measures all cases, and those again whose ratio is not that of the same speed."""
        self._measure(self.options.chosen, facts, NAMES)
        again = [row.case for row in self.rows.values() if row.verdict(self.tolerance) in ("slower", "faster")]
        self._measure(again, facts, NAMES[::-1])

    def exit_status(self) -> int:
        """0, 1 or 130."""
        if self.interrupted:
            return 130
        slower = any(row.verdict(self.tolerance) == "slower" for row in self.rows.values())
        return int(self.failed or slower)

    def _measure(self, cases: Sequence[Case], facts: dict[str, object], order: Sequence[str]) -> None:
        if not cases:
            return
        self.bar.total += len(cases) * self.options.rounds
        options = self.options
        words = (options.device, options.threads, options.kernels)
        with Process(self.trees["base"], *words) as base, Process(self.trees["new"], *words) as new:
            for case in cases:
                self.bar.set_description(case.name)
                try:
                    measured = self._turns(case, {"base": base, "new": new}, order)
                    self.rows.setdefault(case.name, Row(case, [])).passes.append(measured)
                except TreeError as error:
                    self.left_out[case.name] = str(error)
                    self.bar.total -= options.rounds
                rows = [row.as_json(self.tolerance) | facts for row in self.rows.values()]
                timing.write_json(options.json, rows)

    def _turns(self, case: Case, processes: dict[str, Process], order: Sequence[str]) -> Pass:
        """The rounds of a case; the tree that begins changes from one to the next."""
        prepared = {name: self._ask(name, processes[name], prepare=case.name, warm=WARM_UP_SECONDS) for name in order}
        fastest = min(answer["seconds"] for answer in prepared.values())
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        for number in range(self.options.rounds):
            calls = max(1, math.ceil(TURN_SECONDS / fastest))
            for name in order if number % 2 == 0 else order[::-1]:
                seconds[name].append(self._ask(name, processes[name], turn=calls)["seconds"])
            fastest = min(seconds[name][-1] for name in NAMES)  # of this round: a machine may become busy
            self.bar.update()
        return Pass(**seconds, same_bits=prepared["base"]["digest"] == prepared["new"]["digest"])

    def _ask(self, name: str, process: Process, **request: object) -> dict:
        """The answer; a TreeError says which of the trees failed."""
        try:
            return process.ask(**request)
        except TreeError as error:
            self.failed |= name == "new"
            raise TreeError(f"in {'the base' if name == 'base' else 'the working tree'}: {error}") from None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.partition("\n")[0])
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base", default="HEAD~1", help="the commit to compare with, as git names it (HEAD~1)")
    base.add_argument("--tree", type=Path, help="a folder with built files to compare with instead")
    parser.add_argument("--ops", default="", help="a regular expression: ops alone, whose name it is found in")
    parser.add_argument("--cases", default="", help="a regular expression: cases whose name it is found in")
    parser.add_argument("--rounds", type=rounds, default=ROUNDS, help=f"at least {timing.MIN_ROUNDS} ({ROUNDS})")
    parser.add_argument("--tolerance", type=float, default=3.0, help="percent by which a case may be slower (3)")
    parser.add_argument("--kernels", choices=KERNELS, default="auto")
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "compare" / "comparison.json")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    if options.threads < 1:
        parser.error(f"argument --threads: expected at least 1, got {options.threads}")
    if not 0 <= options.tolerance < math.inf:
        parser.error(f"argument --tolerance: expected at least 0, got {options.tolerance}")
    if options.tree is not None and not (options.tree / trees.PACKAGE / "__init__.py").exists():
        parser.error(f"argument --tree: there is no {trees.PACKAGE} in {options.tree}")
    try:
        options.chosen = chosen(list(every_case(options.device, options.threads)), options.ops, options.cases)
    except ValueError as error:
        parser.error(str(error))
    if not options.chosen:
        parser.error(f"no case has {options.cases!r} in its name and {options.ops!r} in its op's; --list names them")
    if options.list:
        print(*(case.name for case in options.chosen), sep="\n")
        parser.exit()
    return options
