"""Whether one network is above another, by more than seeds and test images explain."""

from __future__ import annotations

from collections.abc import Sequence

from scipy import stats

from nfjax.reproduce import _records
from nfjax.reproduce._records import Mean, Record

CONFIDENCE = 0.95


def half_width(one: Mean, other: Mean, images: int) -> float | None:
    """Of the interval of the difference of two means, each of n runs on the same number of test images.

    The variance of a mean is that over seeds, s²/n, and that of drawing the test images, p(1 - p)/images; the degrees
    of freedom are Welch's. None where a network has one run only.
    """
    if min(one.n, other.n) < 2:
        return None
    seeds = [value.error**2 for value in (one, other)]
    drawn = [value.mean * (1 - value.mean) / images for value in (one, other)]
    variance = sum(seeds) + sum(drawn)
    if variance == 0:
        return 0.0
    spread = sum(v**2 / (value.n - 1) for v, value in zip(seeds, (one, other), strict=True))
    freedom = variance**2 / spread if spread else float("inf")
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * variance**0.5


def difference(one: Sequence[Record], other: Sequence[Record]) -> int:
    """1 where the test accuracy of one is surely above the other's at the end, -1 where it is surely below, and 0 where
    that is not sure, as with a single run or one that diverged.
    """
    if not one or not other or any(record.diverged is not None for record in (*one, *other)):
        return 0
    mine, theirs = (_records.over_seeds(group, "test_accuracy") for group in (one, other))
    half = half_width(mine, theirs, one[0].images[1])
    if half is None or abs(mine.mean - theirs.mean) <= half:
        return 0
    return 1 if mine.mean > theirs.mean else -1


def rank_correlation(groups: Sequence[Sequence[Record]]) -> tuple[float, int] | None:
    """How far two seeds put networks into the same order: Spearman's coefficient between their test accuracies at the
    end, averaged over the pairs of seeds, and the least number of networks that such a pair has in common. None where
    no two seeds have three.

    Args:
        groups: The runs of each network; those that diverged are left out.
    """
    ends = [{run.seed: run.final("test_accuracy") for run in group if run.diverged is None} for group in groups]
    seeds = sorted(set().union(*ends))
    found, least = [], len(groups)
    for place, first in enumerate(seeds):
        for second in seeds[place + 1 :]:
            both = [(end[first], end[second]) for end in ends if first in end and second in end]
            if len(both) < 3 or any(len(set(column)) == 1 for column in zip(*both, strict=True)):
                continue  # too few, or all alike: there is no order
            found.append(float(stats.spearmanr(both).statistic))
            least = min(least, len(both))
    return (sum(found) / len(found), least) if found else None
