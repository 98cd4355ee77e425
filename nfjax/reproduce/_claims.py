"""What the paper says about training, claim by claim, against the runs that were measured."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from nfjax.reproduce import _provenance, _records, _runs
from nfjax.reproduce._grids import BASELINE, BROCK, CONVSHORT, GRIDS, SCHEMES, TORCHVISION
from nfjax.reproduce._intervals import half_width
from nfjax.reproduce._records import Mean, Record
from nfjax.reproduce._tables import Table

COLUMNS = ("claim", "network", "runs", "held?", "test accuracy")
MARGIN = 0.01  # of accuracy: who comes this close "reaches" the other, or is "in line" with it
NOTE = (
    "Test accuracy at the end, mean ± sample standard deviation over seeds (their number). A network trains where a "
    "run ends above twice the accuracy of guessing. Networks are compared by the 95 % interval of the difference of "
    "their means (Welch's, over seeds, and the test images as a sample): where it holds both answers, where there is "
    "one seed only, or where some of the runs diverged, the claim is undecided. To reach, or to be in line, is to lack "
    "less than one point. The start is the accuracy after a twentieth of the epochs, at least one. BatchNorm is the "
    "network with identity shortcuts, at 50 layers 23.5 M parameters to ConvShort's 38.0 M. What was measured with "
    "other settings or images than the paper's is marked as found here: it tells what smaller or shorter runs point "
    "to, no more."
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


# ---------------------------------------------------------------- whether networks train


def trains(curves: Sequence[str]) -> Callable[[Networks], Verdict]:
    """Whether all runs of these curves train."""

    def judge(networks: Networks) -> Verdict:
        return _counted(networks, curves, [BASELINE] * len(curves), wanted=True)

    return judge


def fails(curves: Sequence[str], controls: Sequence[str]) -> Callable[[Networks], Verdict]:
    """Whether no run of these curves trains, while all of its control do: the same scheme with He's fan-out."""

    def judge(networks: Networks) -> Verdict:
        return _counted(networks, curves, controls, wanted=False)

    return judge


def _counted(networks: Networks, curves: Sequence[str], controls: Sequence[str], wanted: bool) -> Verdict:
    numbers = _listed(networks, dict.fromkeys([*controls, *curves]))
    good, measured = 0, []
    for curve, control in zip(curves, controls, strict=True):
        if not networks.get(curve):
            continue
        if not networks.get(control) or not all(map(_trained, networks[control])):
            missing = "does not train either" if networks.get(control) else f"is {UNMEASURED}"
            return Verdict(f"undecided: {control} {missing}", numbers)
        measured += networks[curve]
        good += sum(_trained(record) == wanted for record in networks[curve])
    held = "yes" if good == len(measured) else f"in {good} of {len(measured)} runs" if good else "no"
    return Verdict(held + _coverage(networks, curves), numbers)


def _trained(record: Record) -> bool:
    end = record.final("test_accuracy")
    return record.diverged is None and end is not None and end > 2 / record.classes


# ---------------------------------------------------------------- whether one is above the other


def reaches_baseline(networks: Networks) -> Verdict:
    """Whether ConvShort ends at batch norm's accuracy or above it."""
    held = _above(networks[CONVSHORT], networks[BASELINE], margin=MARGIN)
    return Verdict(_guarded(networks, held), _listed(networks, [BASELINE, CONVSHORT]))


def comes_second(networks: Networks) -> Verdict:
    """Whether ConvShort ends below batch norm and above all others of the figure."""
    others = [curve for curve in (*SCHEMES[1:], *BROCK) if networks.get(curve)]
    held = [_below(networks[CONVSHORT], networks[BASELINE])]
    held += [_above(networks[CONVSHORT], networks[other]) for other in others]
    everything = [BASELINE, CONVSHORT, *SCHEMES[1:], *BROCK]
    answer = _guarded(networks, _all(held)) + _coverage(networks, everything)
    return Verdict(answer, _listed(networks, everything))


def below_baseline(networks: Networks) -> Verdict:
    """Whether IdShort and LearnScalar end below batch norm."""
    return _each_below(networks, SCHEMES[1:])


def starts_slower(networks: Networks) -> Verdict:
    """Whether every proposed scheme that was measured is below batch norm at the start."""
    epochs = networks[BASELINE][0].settings["epochs"]
    return _each_below(networks, SCHEMES, max(1, round(epochs / 20)))


def in_line_with_torchvision(networks: Networks) -> Verdict:
    """Whether ConvShort comes within a point of torchvision's ResNet-50, or above it."""
    group = networks[CONVSHORT]
    measured, diverged = _accuracy(group), sum(record.diverged is not None for record in group)
    numbers = f"{_listed(networks, [CONVSHORT])}; torchvision {100 * TORCHVISION:.2f} %"
    if measured is None:
        return Verdict("no", numbers)
    answer = "yes" if measured.mean >= TORCHVISION - MARGIN else "no"
    return Verdict(f"undecided, points to {answer}" if diverged else answer + _coverage(networks, [CONVSHORT]), numbers)


def _each_below(networks: Networks, curves: Sequence[str], epoch: int | None = None) -> Verdict:
    """Whether each of the curves that were measured is below batch norm, at the end or after that epoch."""
    held = {curve: _below(networks[curve], networks[BASELINE], epoch=epoch) for curve in curves if networks.get(curve)}
    if len(set(held.values())) == 1:
        answer = next(iter(held.values()))
    else:
        answer = "; ".join(f"{curve.partition(',')[0]} {verdict}" for curve, verdict in held.items())
    where = "" if epoch is None else f" after epoch {epoch}"
    numbers = _listed(networks, [BASELINE, *curves], epoch) + where
    return Verdict(_guarded(networks, answer) + _coverage(networks, curves), numbers)


def _above(
    one: Sequence[Record], other: Sequence[Record], margin: float = 0.0, epoch: int | None = None, strict: bool = False
) -> str:
    """Whether the mean of one lies above that of the other, or less than `margin` below it: "yes", "no" or undecided.

    A network of which no run came to its end is lower than any other.
    """
    mine, theirs = _accuracy(one, epoch), _accuracy(other, epoch)
    if mine is None or theirs is None:
        return "no" if mine is None else "yes"
    difference = mine.mean - theirs.mean
    points = "yes" if difference > 0 or (difference == 0 and not strict) else "no"
    diverged = any(record.diverged is not None for record in (*one, *other))
    half = half_width(mine, theirs, one[0].images[1])
    if diverged or half is None:
        return f"undecided, points to {points}"
    if difference + half < 0:
        return "no"
    return "yes" if difference - half > -margin else f"undecided, points to {points}"


def _below(one: Sequence[Record], other: Sequence[Record], epoch: int | None = None) -> str:
    return _above(other, one, epoch=epoch, strict=True)


def _guarded(networks: Networks, answer: str) -> str:
    """Nothing is said of a comparison with a batch norm that does not train."""
    return answer if all(map(_trained, networks[BASELINE])) else "undecided: BatchNorm does not train"


def _all(answers: Sequence[str]) -> str:
    """Of a claim that holds where all its parts do."""
    if "no" in answers:
        return "no"
    if all(answer == "yes" for answer in answers):
        return "yes"
    return f"undecided, points to {'no' if any(answer.endswith('no') for answer in answers) else 'yes'}"


def _accuracy(group: Sequence[Record], epoch: int | None = None) -> Mean | None:
    """At the end of the runs that came to it, or after an epoch, from 1, of those that reached it."""
    if epoch is None:
        return _records.over_seeds(group, "test_accuracy")
    reached = [record.epochs["test_accuracy"][epoch - 1 : epoch] for record in group]
    return _records.mean(value for values in reached for value in values)


# ---------------------------------------------------------------- the table


def _claims() -> list[Claim]:
    claims = []
    reaches = "ConvShort reaches or passes BatchNorm at the end"
    slower = "Without batch norm, training starts more slowly"
    for depth, figure in ((18, "figure7"), (50, "figure3"), (101, "figure3")):
        shallow = depth == 18
        end = ("ConvShort comes second, behind BatchNorm", comes_second) if shallow else (reaches, reaches_baseline)
        brock = ("Brock's initialization trains at 18 layers", trains(BROCK))
        if not shallow:
            brock = ("Brock's initialization does not train", fails(BROCK, SCHEMES))
        claims += [
            Claim("Every proposed scheme trains with He's fan-out", figure, depth, (CONVSHORT,), trains(SCHEMES)),
            Claim(end[0], figure, depth, (CONVSHORT,), end[1]),
            Claim("IdShort and LearnScalar stay below BatchNorm", figure, depth, SCHEMES[1:2], below_baseline),
            Claim(brock[0], figure, depth, BROCK[:1], brock[1]),
            Claim(slower, figure, depth, (CONVSHORT,), starts_slower),
        ]
    claims += [
        Claim(reaches, "figure4", 50, (CONVSHORT,), reaches_baseline),
        Claim(slower, "figure4", 50, (CONVSHORT,), starts_slower),
        Claim("ConvShort is in line with torchvision's BatchNorm", "figure5", 50, (), in_line_with_torchvision),
    ]
    return sorted(claims, key=lambda claim: (claim.figure in ("figure4", "figure5"), claim.text.startswith("Brock")))


CLAIMS = _claims()


def claims_table(out: pathlib.Path) -> Table:
    """Every claim, once for each set of runs that may be compared and says something about it."""
    known = _records.groups(_records.read(out))
    used: list[str] = []  # descriptions of sets of runs, in the order in which they come up
    rows = []
    for claim in CLAIMS:
        judged = [row for group in known if (row := _row(claim, group, used)) is not None]
        network = f"{GRIDS[claim.figure].dataset}, ResNet-{claim.depth}"
        command = f"`python -m nfjax.reproduce {claim.figure} --data=DIR`"
        rows += judged or [[claim.text, network, "", UNMEASURED, command]]
    named = [f"Runs {number}: {description}." for number, description in enumerate(used, 1)]
    return Table("The paper's claims about training", COLUMNS, rows, " ".join([*named, NOTE]))


def _row(claim: Claim, group: Sequence[Record], used: list[str]) -> list[str] | None:
    grid = GRIDS[claim.figure]
    here = [record for record in group if record.depth == claim.depth]
    networks = {curve: [r for r in here if r.curve == curve] for curve in dict.fromkeys(r.curve for r in here)}
    # Each claim is about a comparison: a network that was trained for another purpose alone says nothing.
    needed = set(claim.needs) | ({BASELINE} if grid.line is None else {CONVSHORT})
    first = group[0]
    if first.dataset != grid.dataset or not needed <= networks.keys():
        return None
    verdict = claim.judge(networks)
    description = f"{first.data}, {first.counted()}; {_provenance.describe(grid.dataset, first.settings)}"
    if description not in used:
        used.append(description)
    number = str(used.index(description) + 1)
    held = verdict.held if _runs.is_the_papers(first) else f"here: {verdict.held}"
    return [claim.text, f"{grid.dataset}, ResNet-{claim.depth}", number, held, verdict.numbers]


def _coverage(networks: Networks, curves: Sequence[str]) -> str:
    """What a verdict rests on, where that is not all of it."""
    there = [networks[curve] for curve in curves if networks.get(curve)]
    parts = [f"{len(there)} of {len(curves)} networks measured"] if len(there) < len(curves) else []
    parts += ["one seed"] if all(len(group) == 1 for group in there) else []
    return f" ({', '.join(parts)})" if parts else ""


def _listed(networks: Networks, curves: Iterable[str], epoch: int | None = None) -> str:
    """ "ConvShort, He fan-out 93.1 ± 0.2 % (3)", one after the other, with the number of seeds."""

    def shown(curve: str) -> str:
        group = networks.get(curve)
        if not group:
            return f"{curve} {UNMEASURED}"
        diverged = sum(record.diverged is not None for record in group)
        measured = _accuracy(group, epoch)
        parts = [f"{measured.percent()} ({measured.n})"] if measured else []
        parts += [f"{diverged} of {len(group)} diverged"] if diverged else []
        return f"{curve} {', '.join(parts)}"

    return "; ".join(map(shown, curves))
