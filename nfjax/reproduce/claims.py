"""What the paper says about training, claim by claim, against the runs that were measured."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from nfjax.reproduce import records, runs, training
from nfjax.reproduce.grids import BASELINE, BROCK, CONVSHORT, GRIDS, SCHEMES, TORCHVISION
from nfjax.reproduce.records import Mean, Record
from nfjax.reproduce.tables import Table

COLUMNS = ("claim", "network", "measured with", "held?", "test accuracy")
NOTE = (
    "Test accuracy at the end, mean ± sample standard deviation over seeds (their number). A network trains where no "
    "run diverged and the mean is more than twice that of guessing. Two networks differ where their means are more "
    "than two standard errors of the difference apart: what is closer, or has one seed only, is undecided. The start "
    "is the accuracy after a twentieth of the epochs, at least one. What was measured with other "
    "settings than the paper's is marked as found here: it tells what smaller or shorter runs point to, no more."
)
UNMEASURED = "not measured yet"

Networks = Mapping[str, Sequence[Record]]  # by curve, of one depth, on equal terms


@dataclasses.dataclass(frozen=True)
class Verdict:
    """held: "yes", "no", or what stands between. numbers: those that say so."""

    held: str
    numbers: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the paper claims of one depth. figure: the name in `GRIDS` that measures it. needs: curves without which
    nothing can be said.
    """

    text: str
    figure: str
    depth: int
    needs: Sequence[str]
    judge: Callable[[Networks], Verdict]


def trains(curves: Sequence[str], wanted: bool = True) -> Callable[[Networks], Verdict]:
    """Whether all that were measured of these curves train, or with `wanted` False whether none does."""

    def judge(networks: Networks) -> Verdict:
        if not _trains(networks[BASELINE]):
            return Verdict("undecided: BatchNorm does not train either", _listed(networks, [BASELINE, *curves]))
        there = [curve for curve in curves if networks.get(curve)]
        good = [curve for curve in there if _trains(networks[curve]) == wanted]
        held = "yes" if len(good) == len(there) else f"{len(good)} of {len(there)}" if good else "no"
        if len(there) < len(curves):
            held += f" ({len(there)} of {len(curves)} measured)"
        return Verdict(held, _listed(networks, curves))

    return judge


def reaches_baseline(networks: Networks) -> Verdict:
    """Whether ConvShort ends at batch norm's accuracy or above it."""
    return _compared(networks, [CONVSHORT], above=True)


def below_baseline(networks: Networks) -> Verdict:
    """Whether IdShort and LearnScalar end below batch norm."""
    return _compared(networks, SCHEMES[1:], above=False)


def starts_slower(networks: Networks) -> Verdict:
    """Whether every proposed scheme is below batch norm at the start."""
    return _compared(networks, SCHEMES, above=False, value=_start, where=f" after epoch {_early(networks)}")


def in_line_with_torchvision(networks: Networks) -> Verdict:
    """Whether ConvShort comes within a point of torchvision's ResNet-50, or above it."""
    measured = _end(networks[CONVSHORT])
    numbers = f"{_listed(networks, [CONVSHORT])}; torchvision {100 * TORCHVISION:.2f} %"
    if measured is None:
        return Verdict("no", numbers)
    return Verdict("yes" if measured.mean >= TORCHVISION - 0.01 else "no", numbers)


def _claims() -> list[Claim]:
    claims = []
    reaches = "ConvShort reaches or passes BatchNorm at the end"
    second = f"{reaches} (at 18 layers it comes second, the paper says in its appendix)"
    for depth, figure in ((18, "figure7"), (50, "figure3"), (101, "figure3")):
        brock = "Brock's initialization does not train" if depth > 18 else "Brock's initialization trains at 18 layers"
        claims += [
            Claim("Every proposed scheme trains with He's fan-out", figure, depth, (CONVSHORT,), trains(SCHEMES)),
            Claim(reaches if depth > 18 else second, figure, depth, (CONVSHORT,), reaches_baseline),
            Claim("IdShort and LearnScalar stay below BatchNorm", figure, depth, SCHEMES[1:2], below_baseline),
            Claim(brock, figure, depth, BROCK[:1], trains(BROCK, wanted=depth == 18)),
            Claim("Without batch norm, training starts more slowly", figure, depth, (CONVSHORT,), starts_slower),
        ]
    slower = "Without batch norm, training starts more slowly"
    claims += [
        Claim(reaches, "figure4", 50, (CONVSHORT,), reaches_baseline),
        Claim(slower, "figure4", 50, (CONVSHORT,), starts_slower),
        Claim("ConvShort is in line with torchvision's BatchNorm", "figure5", 50, (), in_line_with_torchvision),
    ]
    return sorted(claims, key=lambda claim: (claim.figure in ("figure4", "figure5"), claim.text.startswith("Brock")))


CLAIMS = _claims()


def claims_table(out: pathlib.Path) -> Table:
    """Every claim, once for each set of runs that may be compared and says something about it."""
    known = records.groups(records.read(out))
    rows = []
    for claim in CLAIMS:
        judged = [row for group in known if (row := _row(claim, group)) is not None]
        network = f"{GRIDS[claim.figure].dataset}, ResNet-{claim.depth}"
        command = f"`python -m nfjax.reproduce {claim.figure} --data=DIR`"
        rows += judged or [[claim.text, network, UNMEASURED, "", command]]
    return Table("The paper's claims about training", COLUMNS, rows, NOTE)


def _row(claim: Claim, group: Sequence[Record]) -> list[str] | None:
    grid = GRIDS[claim.figure]
    here = [record for record in group if record.depth == claim.depth]
    networks = {curve: [r for r in here if r.curve == curve] for curve in dict.fromkeys(r.curve for r in here)}
    # Each claim is about a comparison: a network that was trained for another purpose alone says nothing.
    needed = set(claim.needs) | ({BASELINE} if grid.line is None else {CONVSHORT})
    if group[0].dataset != grid.dataset or not needed <= networks.keys():
        return None
    verdict = claim.judge(networks)
    measured = f"{group[0].data}, {training.described(grid.dataset, group[0].settings)}"
    held = f"here: {verdict.held}" if runs.deviations(grid.dataset, group[0].settings) else verdict.held
    return [claim.text, f"{grid.dataset}, ResNet-{claim.depth}", measured, held, verdict.numbers]


def _compared(
    networks: Networks,
    curves: Sequence[str],
    above: bool,
    value: Callable[[Sequence[Record]], Mean | None] | None = None,
    where: str = "",
) -> Verdict:
    """Whether each of the curves that were measured ends `above` batch norm, or below it."""
    value = value or _end
    there = [curve for curve in curves if networks.get(curve)]
    baseline = value(networks[BASELINE])
    verdicts = [_higher(value(networks[curve]), baseline) for curve in there]
    wanted = "yes" if above else "no"
    held = [verdict.replace("?", "") == wanted for verdict in verdicts]
    if all(verdict == wanted for verdict in verdicts):
        answer = "yes"
    elif all(verdict == ("no" if above else "yes") for verdict in verdicts):
        answer = "no"
    elif all("?" in verdict for verdict in verdicts):
        points = "yes" if all(held) else "no" if not any(held) else "both ways"
        answer = f"undecided, points to {points}"
    else:
        firm = sum(verdict == wanted for verdict in verdicts)
        answer = f"{firm} of {len(verdicts)}"
    return Verdict(answer, _listed(networks, [BASELINE, *curves], value) + where)


def _higher(one: Mean | None, other: Mean | None) -> str:
    """ "yes" or "no", with a question mark where the difference is within the noise, or nobody knows how large it is.

    A network of which no run came to its end is lower than any other.
    """
    if one is None or other is None:
        return "no" if one is None else "yes"
    answer = "yes" if one.mean >= other.mean else "no"
    error = (one.error**2 + other.error**2) ** 0.5
    firm = min(one.n, other.n) > 1 and abs(one.mean - other.mean) > 2 * error
    return answer if firm else f"{answer}?"


def _trains(group: Sequence[Record]) -> bool:
    measured = _end(group)
    whole = all(record.diverged is None for record in group)
    return whole and measured is not None and measured.mean > 2 / group[0].classes


def _end(group: Sequence[Record]) -> Mean | None:
    return records.over_seeds(group, "test_accuracy")


def _start(group: Sequence[Record]) -> Mean | None:
    early = _early({"": group}) - 1
    reached = [record.epochs["test_accuracy"][early : early + 1] for record in group]
    return records.mean(value for values in reached for value in values)


def _early(networks: Networks) -> int:
    """The epoch at which a start is judged, from 1."""
    epochs = next(record.settings["epochs"] for group in networks.values() for record in group)
    return max(1, round(epochs / 20))


def _listed(networks: Networks, curves: Sequence[str], value: Callable[[Sequence[Record]], Mean | None] = _end) -> str:
    """ "ConvShort, He fan-out 93.1 ± 0.2 % (3)", one after the other, with the number of seeds."""

    def shown(curve: str) -> str:
        group = networks.get(curve)
        if not group:
            return f"{curve} {UNMEASURED}"
        diverged = sum(record.diverged is not None for record in group)
        measured = value(group)
        parts = [f"{measured.percent()} ({measured.n})"] if measured else []
        parts += [f"{diverged} of {len(group)} diverged"] if diverged else []
        return f"{curve} {', '.join(parts)}"

    return "; ".join(map(shown, curves))
