"""What was measured of a case, as a row of the table and of the JSON file."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .. import timing
from .plan import Case
from .verdict import Ratio, ratio_of, together, verdict


@dataclass(frozen=True)
class Pass:
    """The seconds per call of each tree's turns, round by round, and whether both trees' results have the same bits."""

    base: list[float]
    new: list[float]
    same_bits: bool


@dataclass
class Row:
    """A case, and the passes over it, each by processes of its own."""

    case: Case
    passes: list[Pass]

    def seconds(self, name: str) -> list[float]:
        """The times of "base" or "new" in all passes."""
        return [seconds for measured in self.passes for seconds in getattr(measured, name)]

    @property
    def ratio(self) -> Ratio:
        """new / base over all passes."""
        return ratio_of(self.seconds("base"), self.seconds("new"))

    def verdict(self, tolerance: float) -> str:
        """That of all passes together."""
        return together([verdict(ratio_of(each.base, each.new), tolerance) for each in self.passes])

    @property
    def same_bits(self) -> bool:
        return all(each.same_bits for each in self.passes)

    def as_json(self, tolerance: float) -> dict[str, Any]:
        """What the file says of it."""
        return {
            "case": self.case.name,
            "verdict": self.verdict(tolerance),
            "tolerance": tolerance,
            "ratio": _rounded(self.ratio),
            "passes": [_rounded(ratio_of(each.base, each.new)) for each in self.passes],
            "rounds": len(self.seconds("new")),
            "microseconds": {
                name: timing.spread([1e6 * seconds for seconds in self.seconds(name)]) for name in ("base", "new")
            },
            "same_bits": self.same_bits,
        }


def _rounded(ratio: Ratio) -> dict[str, float]:
    return {key: round(value, 4) for key, value in vars(ratio).items()}


def table(rows: Sequence[Row], tolerance: float) -> Iterator[str]:
    """The rows, the mean of each group, and the cases that are slower or faster."""
    width = max((len(row.case.name) for row in rows), default=0)
    for _, group in itertools.groupby(rows, key=lambda row: row.case.name.partition("/")[0]):
        yield f"\n{'':{width}}    base, µs     new, µs  new/base  95 % of its noise   bits"
        for row in group:
            base, new = (1e6 * statistics.median(row.seconds(name)) for name in ("base", "new"))
            ratio, said = row.ratio, row.verdict(tolerance)
            bits = "same" if row.same_bits else "differ"
            yield (
                f"{row.case.name:{width}}  {base:10.1f}  {new:10.1f}  {ratio.median:8.3f}  {ratio.low:8.3f} …"
                f" {ratio.high:.3f}  {bits:6}{'' if said == 'same' else f'  {said}'}"
            ).rstrip()
    yield ""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row.case.group, []).append(row.ratio.median)
    for group_name, ratios in groups.items():
        mean = statistics.geometric_mean(ratios)
        yield f"{group_name}: {mean:.3f} in the geometric mean of {len(ratios)} cases, at most {max(ratios):.3f}"
    for said in ("slower", "faster", "unclear"):
        count = sum(row.verdict(tolerance) == said for row in rows)
        yield f"{said}: {count} of {len(rows)} cases ({MEANING[said].format(f'{100 * tolerance:g} %')})"


MEANING = {
    "slower": "by more than the noise and {}, twice",
    "faster": "by more than the noise and {}, twice",
    "unclear": "too noisy to say that it is not slower by {}",
}
