"""What a comparison's rounds say: the ratio of two times, its noise, and whether it is beyond that and a tolerance."""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios new / base, and between which two values it lies with CONFIDENCE."""

    median: float
    low: float
    high: float


def ratio_of(base: Sequence[float], new: Sequence[float]) -> Ratio:
    """The ratio of the times of rounds in which both trees took a turn.

    The interval is that of the order statistics: whatever the noise's distribution, the chance that the true median
    lies outside the k-th smallest and the k-th largest ratio is the chance of fewer than k heads, or tails, in as many
    throws of a coin as there are rounds. Raises ValueError for lists of different lengths and for empty ones.
    """
    if not len(base) == len(new) > 0:
        raise ValueError(f"base and new: expected as many times of each, at least one, got {len(base)} and {len(new)}")
    ratios = sorted(after / before for before, after in zip(base, new))
    k = rank(len(ratios))
    return Ratio(statistics.median(ratios), ratios[k - 1], ratios[-k])


@functools.cache
def rank(rounds: int) -> int:
    """The largest k for which the k-th smallest and the k-th largest of so many values hold their median between them
    with CONFIDENCE; 1 where there are too few of them for that."""
    k, outside = 1, 2 / 2**rounds
    while (outside := outside + 2 * math.comb(rounds, k) / 2**rounds) <= 1 - CONFIDENCE:
        k += 1
    return k


def verdict(ratio: Ratio, tolerance: float) -> str:
    """ "slower" or "faster" where the ratio is off 1 by more than the noise and by more than the tolerance (0.03 is 3 %
    of the time), "unclear" where the noise is too large to say that it is not slower by so much, else "same"."""
    if ratio.low > 1 and ratio.median > 1 + tolerance:
        return "slower"
    if ratio.high < 1 and ratio.median < 1 / (1 + tolerance):
        return "faster"
    return "unclear" if ratio.low < 1 and ratio.high > 1 + tolerance else "same"


def together(verdicts: Sequence[str]) -> str:
    """The verdict over runs in new processes: "slower" and "faster" need all of them, as where the memory of a process
    happens to lie moves times by several percent."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return "unclear" if "slower" in verdicts else "same"
