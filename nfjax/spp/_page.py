"""A report in one HTML file, for a colleague: verdict, cause, what to try, pictures, tables, how it was measured."""

from __future__ import annotations

import datetime
import html
import importlib.metadata
import math
import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np

import nfjax
from nfjax import storage
from nfjax.spp import _page_pictures as pictures
from nfjax.spp import _panels as panels
from nfjax.spp._diagnosis import Diagnosis, Direction
from nfjax.spp._page_style import CSS
from nfjax.spp._panels import SingularValues, Style
from nfjax.spp._plotting import by_name
from nfjax.spp._profile import Profile
from nfjax.spp._theory import Prediction

# Columns of the table in words, in this order; others follow under their own names.
_COLUMNS = {
    "forward_var": "activation variance",
    "backward_var": "gradient variance",
    "similarity": "cosine of two inputs",
    "branch_share": "branch's share",
    "dead": "dead units",
    "saturated": "saturated units",
    "largest": "largest singular value",
    "root_mean_square": "rms singular value",
    "channel_sq_mean": "squared channel mean",
    "channel_var": "variance in channels",
    "branch_var": "branch's, in channels",
}
_SHARES = ("branch_share", "dead", "saturated")  # shown in percent
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_VERBS = {"exploding": "explode", "vanishing": "vanish", "non-finite": "become infinite or NaN"}


def write_report(
    path: str | pathlib.Path,
    profiles: Profile | Mapping[str, Profile],
    predictions: Prediction | Mapping[str, Prediction | None] | None = None,
    *,
    jacobians: SingularValues | Mapping[str, SingularValues] | None = None,
    title: str | None = None,
    tolerance: float = 10.0,
    date: datetime.date | str | None = None,
) -> None:
    """Writes a report that can be mailed: one HTML file, which loads nothing and runs nothing.

    The verdict comes first, in words; then its causes and what to try, pictures, a table of the blocks, the kernels,
    and how it was measured. It can be read on a phone, in the dark, and printed. The same arguments give the same file,
    byte by byte. It is written whole or not at all.

    Args:
        path: Of the file.
        profiles: One, or several by name, which are compared.
        predictions: Of `spp.predict`, as for `spp.plot`.
        jacobians: Of `spp.jacobians`, as for `spp.plot`.
        title: At its top; left out, "Signal propagation".
        tolerance: Of the verdict, as for `Profile.diagnose`.
        date: That the report shows; left out, it shows none.

    Raises:
        ValueError: As `spp.plot` does, likewise TypeError.
        OSError: It cannot be written.
    """
    profiles, predictions, jacobians = by_name(profiles, predictions, jacobians)
    known = {key: panels.columns(profile, jacobians.get(key)) for key, profile in profiles.items()}
    diagnoses = {key: profile.diagnose(tolerance) for key, profile in profiles.items()}
    style = panels.styles(list(profiles))
    drawn = pictures.draw(profiles, predictions, known, diagnoses, style, tolerance)
    parts = [
        _header(title, profiles, diagnoses),
        _verdicts(profiles, diagnoses, style, tolerance),
        _causes(diagnoses),
        _pictures(drawn, diagnoses, style),
        *(_blocks(key, profile, known[key], diagnoses[key]) for key, profile in profiles.items()),
        *(_kernels(key, profile) for key, profile in profiles.items()),
        _method(profiles, tolerance, date),
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # A report shows names from somebody's model. Should one of them ever get past the escaping, it can do nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title or 'Signal propagation')}</title>\n<style>{CSS}</style>\n</head>\n"
    )
    body = "\n".join(filter(None, parts))
    storage.write_text(pathlib.Path(path), f"{head}<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n")


# ---------------------------------------------------------------- sections


def _header(title: str | None, profiles: Mapping[str, Profile], diagnoses: Mapping[str, Diagnosis]) -> str:
    top = (
        f'<p class="kicker">Signal propagation</p>\n<h1>{_text(title)}</h1>' if title else "<h1>Signal propagation</h1>"
    )
    if len(profiles) == 1:
        (profile,), (diagnosis,) = profiles.values(), diagnoses.values()
        headline = _headline(profile, diagnosis)
    else:
        whole = sum(d.forward.verdict == d.backward.verdict == "preserved" for d in diagnoses.values())
        number = "none" if not whole else "all" if whole == len(profiles) else str(whole)
        headline = f"The signal survives in both directions in {number} of {len(profiles)} networks."
    return f'<header>\n{top}\n<p class="headline">{headline}</p>\n</header>'


def _headline(profile: Profile, diagnosis: Diagnosis) -> str:
    ways = [("activations", diagnosis.forward), ("gradients", diagnosis.backward)]
    bad = [(name, way) for name, way in ways if way.verdict != "preserved"]
    if not bad:
        more = ", with a reservation" if diagnosis.notes else ""
        return f"The signal survives, forward and backward{more}."
    clauses = []
    for name, way in ways:
        if way.verdict == "preserved":
            clauses.append(f"{name} are preserved")
        else:
            clauses.append(f"{name} {_VERBS[way.verdict]} from {_place(profile, way)} on")
    if len(bad) == 1:
        clauses.sort(key=lambda clause: clause.endswith("preserved"))
    return f"The signal does not survive: {'; '.join(clauses)}."


def _verdicts(
    profiles: Mapping[str, Profile],
    diagnoses: Mapping[str, Diagnosis],
    style: Mapping[str, Style],
    tolerance: float,
) -> str:
    """Of one profile two cards; of several a table, one row for each."""
    if len(profiles) == 1:
        (profile,), (diagnosis,) = profiles.values(), diagnoses.values()
        cards = [
            f'<div class="card {way.verdict}"><h3>{heading} {_badge(way.verdict)}</h3><p>'
            f"{_sentence(profile, way, tolerance)}</p>{_stages(way)}</div>"
            for heading, way in (("Activations", diagnosis.forward), ("Gradients", diagnosis.backward))
        ]
        return _section("", f'<div class="grid">{"".join(cards)}</div>')
    rows = []
    for key, profile in profiles.items():
        cells = "".join(
            f'<td class="text">{_badge(way.verdict)}<br><span class="small">{_short(profile, way)}</span></td>'
            for way in (diagnoses[key].forward, diagnoses[key].backward)
        )
        rows.append(f'<tr><th class="text name">{pictures.swatch(style[key])} {_text(key)}</th>{cells}</tr>')
    head = _head([("network", True), ("activations", True), ("gradients", True)])
    return _section("", _table(head, [rows]))


def _causes(diagnoses: Mapping[str, Diagnosis]) -> str:
    names_of: dict[str, list[str]] = {}  # networks of which the same is to be said are named together
    for key, diagnosis in diagnoses.items():
        if inside := _cause(diagnosis):
            names_of.setdefault(inside, []).append(key)
    parts = [
        (f"<h3>{_text(', '.join(names))}</h3>" if len(diagnoses) > 1 else "") + inside
        for inside, names in names_of.items()
    ]
    return _section("Why, and what to try", "\n".join(parts)) if parts else ""


def _cause(diagnosis: Diagnosis) -> str:
    causes, ways = diagnosis.causes, (diagnosis.forward, diagnosis.backward)
    items = [
        f"<li><strong>{_text(cause.what)}</strong><p>{_text(cause.evidence)}</p>{_remedy(_text(cause.remedy))}</li>"
        for cause in causes
        if not cause.in_notes  # which follow
    ]
    inside = f"<ol>{''.join(items)}</ol>" if items else ""
    if not causes and any(way.verdict != "preserved" for way in ways):
        inside += "<p>No cause stands out in what was measured.</p>"
        if all(math.isfinite(way.total) and way.total > 0 for way in ways):
            inside += _remedy(
                "<code>nfjax.rescale.balance</code>, which finds one factor for each kernel such that the variances "
                "are as flat as factors can make them."
            )
    if diagnosis.notes:
        inside += f"<h3>Mind</h3><ul>{''.join(f'<li>{_text(note)}</li>' for note in diagnosis.notes)}</ul>"
    return inside


def _remedy(inside: str) -> str:
    return f'<p class="remedy"><strong>Try:</strong> {inside}</p>' if inside else ""


def _pictures(drawn: Iterable[pictures.Picture], diagnoses: Mapping[str, Diagnosis], style: Mapping[str, Style]) -> str:
    legend = ""
    if len(diagnoses) > 1:
        items = "".join(f"<li>{pictures.swatch(style[key])} {_text(key)}</li>" for key in diagnoses)
        legend = f'<ul class="legend">{items}</ul>'
    found = []
    for picture in drawn:
        badge = ""
        if picture.direction and len(diagnoses) == 1:
            badge = _badge(getattr(next(iter(diagnoses.values())), picture.direction).verdict)
        found.append(
            f"<figure><figcaption><strong>{_text(picture.heading)} {badge}</strong>"
            f"<p>{_text(picture.meaning)}</p></figcaption>{picture.svg}</figure>"
        )
    marks = '<p class="small">Upright dashes: the variance is no longer preserved from here on. '
    marks += "Upright lines: the shape of the outputs changes.</p>"
    return _section("Pictures", f'{legend}{marks}<div class="grid">{"".join(found)}</div>')


def _blocks(key: str, profile: Profile, known: Mapping[str, np.ndarray], diagnosis: Diagnosis) -> str:
    level = profile.level
    names = sorted(known, key=[*_COLUMNS, *known].index)
    head = _head([("", False), (level, True), *((_COLUMNS.get(name, name), False) for name in names), ("output", True)])
    turns: dict[int, list[Direction]] = {}
    for way in (diagnosis.forward, diagnosis.backward):
        if way.block is not None:
            turns.setdefault(profile.paths.index(way.block), []).append(way)
    groups = []
    for stage in profile.stages:
        rows = []
        for i in range(stage.start, stage.stop):
            cells = "".join(f"<td>{_cell(name, known[name][i])}</td>" for name in names)
            here = turns.get(i, ())
            badges = "".join(f"<br>{_badge(way.verdict, f'{way.quantity}s ')}" for way in here)
            attribute = f' class="turn {here[0].verdict}"' if here else ""
            rows.append(
                f'<tr{attribute}><td>{i + 1}</td><th class="text name">{_path(profile.outputs[i])}{badges}</th>'
                f'{cells}<td class="text">{_shape(profile.shapes[i])}</td></tr>'
            )
        groups.append(rows)
    seeds = f" Medians of {len(profile.seeds)} seeds." if len(profile.seeds) > 1 else ""
    caption = f"In the order in which they run; the shading changes with the shape of the outputs.{seeds}"
    return _section(_named(f"The {level}s", key), f'<p class="small">{caption}</p>{_table(head, groups)}')


def _kernels(key: str, profile: Profile) -> str:
    kernels = profile.kernels
    if not kernels:
        return ""
    rows = []
    for kernel in kernels:
        remarks = [word for word, so in (("all zero", kernel.zero), ("standardized", kernel.standardized)) if so]
        rows.append(
            f'<tr><th class="text name">{_path(kernel.path)}</th><td class="text">{_shape(kernel.shape)}</td>'
            f'<td>{_number(kernel.variance)}</td><td class="text">{_text(" or ".join(kernel.looks_like))}</td>'
            f'<td class="text">{", ".join(remarks)}</td></tr>'
        )
    head = _head([("kernel", True), ("shape", True), ("variance", False), ("looks like", True), ("", True)])
    return _section(_named("The kernels", key), _table(head, [rows]))


def _method(profiles: Mapping[str, Profile], tolerance: float, date: datetime.date | str | None) -> str:
    facts = []
    for key, profile in profiles.items():
        seeds = list(map(str, profile.seeds))
        shown = ", ".join(seeds if len(seeds) <= 8 else [*seeds[:3], "…", seeds[-1]])
        number = f"{len(seeds)} seeds ({shown}); medians" if len(seeds) > 1 else f"seed {shown}"
        count = f"{len(profile)} {profile.level}{'s' if len(profile) > 1 else ''}"
        mode = str(profile.mode) or "the network has but one: nothing in it keeps statistics or is random"
        facts += [
            (_named("Measured", key), f"{count}, {'/'.join(sorted(set(profile.dtypes)))}, {number}"),
            (_named("Mode", key), mode),
        ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    facts += [
        ("Variance", "of the whole tensor, in float32 whatever the network computes in; one pass forward and back"),
        ("Preserved", f"within a factor of {tolerance:g} of the first block (activations) or of the last (gradients)"),
        ("Written with", f"nfjax {nfjax.__version__}, {versions}"),
    ]
    if date is not None:
        facts.append(("Date", str(date)))
    return _section(
        "How it was measured", f"<dl>{''.join(f'<dt>{_text(a)}</dt><dd>{_text(b)}</dd>' for a, b in facts)}</dl>"
    )


# ---------------------------------------------------------------- words


def _sentence(profile: Profile, way: Direction, tolerance: float) -> str:
    """What happens to a variance, in words."""
    first, last = ("first", "last") if way.quantity == "activation" else ("last", "first")
    level = profile.level
    if way.verdict == "non-finite":
        return f"The variance is infinite or NaN from {_place(profile, way)} on."
    if way.extreme == 0 and math.isnan(way.total):
        return f"The variance is 0 from the start, at {_place(profile, way)}."
    if len(profile) == 1:
        return f"There is but one {level}: nothing to compare it with."
    if way.extreme == 0:
        return f"The variance falls to 0; it is below 1/{tolerance:g} from {_place(profile, way)} on."
    grows, factor = way.per_block >= 1, max(way.per_block, 1 / way.per_block)
    text = (
        f"The variance {'grows' if grows else 'shrinks'} {_number(factor)} times per {level}, "
        f"{_number(way.total if grows else 1 / way.total)} times from the {first} to the {last}."
    )
    if way.block is None:
        return text
    bound = f"more than {tolerance:g} times" if way.verdict == "exploding" else f"less than 1/{tolerance:g} of"
    worst = ""
    if abs(math.log(way.extreme)) > abs(math.log(max(way.total, 1e-300))) + 1:
        worst = f", and {_number(way.extreme)} times at worst"
    return f"{text} From {_place(profile, way)} on it is {bound} what it was at the {first}{worst}."


def _short(profile: Profile, way: Direction) -> str:
    total = "" if math.isnan(way.total) else f"× {_number(way.total)} in all"
    place = "" if way.block is None else f"from {_place(profile, way)}"
    return ", ".join(filter(None, [total, place]))


def _stages(way: Direction) -> str:
    if len(way.stages) < 2:
        return ""
    many = "" if len(way.stages) <= 8 else " (the first 8)"
    inside = ", ".join("–" if math.isnan(x) else _number(x) for x in way.stages[:8])
    across = ", ".join(map(_number, way.transitions[:8]))
    return f'<p class="small">Factor per step within stages{many}: {inside}; across their boundaries: {across}.</p>'


def _place(profile: Profile, way: Direction) -> str:
    return f"{_path(way.block)} ({profile.level} {profile.paths.index(way.block) + 1} of {len(profile)})"


def _named(text: str, key: str) -> str:
    return f"{text}: {key}" if key else text


# ---------------------------------------------------------------- elements


def _section(heading: str, inside: str) -> str:
    return f"<section>\n{f'<h2>{_text(heading)}</h2>' if heading else ''}\n{inside}\n</section>"


def _head(cells: Iterable[tuple[str, bool]]) -> str:
    """A row of headings, each with whether text stands below it."""
    return "".join(f'<th scope="col"{" class=text" if left else ""}>{_text(cell)}</th>' for cell, left in cells)


def _table(head: str, groups: Iterable[Iterable[str]]) -> str:
    bodies = "\n".join(f"<tbody>{''.join(rows)}</tbody>" for rows in groups)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n{bodies}</table></div>'


def _badge(verdict: str, what: str = "") -> str:
    symbol = panels.VERDICTS[verdict][0]
    return f'<span class="badge {verdict}"><span aria-hidden="true">{symbol}</span> {what}{verdict}</span>'


def _text(value: object) -> str:
    """As text of HTML, whatever it is."""
    return html.escape(panels.printable(value))


def _path(path: str) -> str:
    """A path, which may be broken where a part of a name ends."""
    parts = re.split(r"(?<=[/_.])", panels.printable(path))
    return f"<code>{'<wbr>'.join(html.escape(part) for part in parts if part)}</code>"


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def _cell(name: str, value: float) -> str:
    return f"{100 * value:.3g} %" if name in _SHARES and math.isfinite(value) else _number(value)


def _number(value: float) -> str:
    """To three digits, with a power of ten that a person can read."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.3g}"
    if match := re.fullmatch(r"(.*)e([+-])0*(\d+)", text):
        mantissa, sign, exponent = match.groups()
        text = f"{mantissa}·10{f'{sign}{exponent}'.lstrip('+').translate(_SUPERSCRIPTS)}"
    return text.replace("-", "−")
