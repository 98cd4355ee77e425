"""The report in one file, and the pictures with all details: what they say, and that nothing in them can harm."""

import dataclasses
import datetime
import html.parser
import re
import sys
import types

import jax
import matplotlib
import numpy as np
import pytest
from flax import nnx
from matplotlib.colors import to_hex

from nfjax import cli, resnet, spp
from nfjax.spp import _causes
from nfjax.spp import _panels as panels
from tests.conftest import TINY

VOID = {"meta", "br", "wbr"}
HOSTILE = '<script>alert(1)</script>/"><img src=x onerror=y>/$\\frac{/\u202e\x1b[31m\n--> &amp; {x} \ud800 層'


def made(forward, backward, *, paths=None, shapes=None, seeds=1, **samples):
    """A profile of these variances; each seed's are 10 % above those of the one before."""
    n, scale = len(forward), 1.1 ** np.arange(seeds)[:, None]
    samples = {"forward_var": forward, "backward_var": backward, "branch_share": [np.nan] * n, **samples}
    return spp.Profile(
        tuple(paths or [f"blocks/{i}" for i in range(n)]),
        tuple(shapes or [(4, 8)] * n),
        ("float32",) * n,
        tuple(range(seeds)),
        {name: np.array(values, np.float64)[None] * (scale if name.endswith("var") else 1.0 + 0 * scale)
         for name, values in samples.items()},
    )  # fmt: skip


def exploding(n=6, **more):
    return made(4.0 ** np.arange(n), 3.0 ** np.arange(n)[::-1], **more)


def singular(profile, largest=2.0, mean_square=4.0):
    n = len(profile)
    return types.SimpleNamespace(
        paths=profile.paths, largest=np.full(n, largest), mean_square=np.full(n, mean_square)
    )  # fmt: skip


class Page(html.parser.HTMLParser):
    """Tags, checked to be closed in the order in which they were opened, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        ids = [value for _, attributes in self.tags for name, value in attributes.items() if name == "id"]
        assert len(ids) == len(set(ids))
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "title"):
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def count(self, tag, **attributes):
        return sum(t == tag and attributes.items() <= given.items() for t, given in self.tags)


@pytest.fixture
def report(tmp_path):
    def report(*given, **options):
        spp.write_report(tmp_path / "report.html", *given, **options)
        assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
        return Page((tmp_path / "report.html").read_text())

    return report


# ---------------------------------------------------------------- what a report says


def test_verdict_first_in_words(report):
    page = report(exploding(), title="MyNet")
    # 4^2 > 10 at the third block; backward 3^3 > 10 at the third from the end.
    headline = (
        "The signal does not survive: activations explode from blocks/2 (block 3 of 6) on; "
        "gradients explode from blocks/2 (block 3 of 6) on."
    )
    assert page.text.index("MyNet") < page.text.index(headline) < page.text.index("Pictures")
    assert "The variance grows 4 times per block, 1.02·10³ times from the first to the last." in page.text
    assert "From blocks/2 (block 3 of 6) on it is more than 10 times what it was at the first." in page.text
    assert "grows 3 times per block, 243 times from the last to the first." in page.text
    assert "▲ exploding" in page.text


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        ([1, 1, 1], [1, 1, 1], "The signal survives, forward and backward."),
        ([1, 1, 1], [1, 1, 1], "The variance grows 1 times per block, 1 times from the first to the last."),
        ([1, 0.1, 0.01], [1, 1, 1], "activations vanish from blocks/2 (block 3 of 3) on; gradients are preserved"),
        ([1, 0.1, 0.01], [1, 1, 1], "shrinks 10 times per block, 100 times from the first to the last. From"),
        ([1, 0.1, 0.01], [1, 1, 1], "less than 1/10 of what it was at the first"),
        ([1, 30, 2], [1, 1, 1], "more than 10 times what it was at the first, and 30 times at worst"),
        ([1, np.inf, np.nan], [1, 1, 1], "activations become infinite or NaN from blocks/1 (block 2 of 3) on"),
        ([1, 1, 1], [0, 0, 0], "gradients vanish from blocks/2 (block 3 of 3) on; activations are preserved"),
        ([1, 1, 1], [0, 0, 0], "The variance is 0 from the start, at blocks/2"),
        ([1, 1, 0], [1, 1, 1], "The variance falls to 0; it is below 1/10 from blocks/2"),
        ([2], [3], "There is but one block: nothing to compare it with."),
        ([np.nan], [np.inf], "activations become infinite or NaN from blocks/0 (block 1 of 1) on; gradients become"),
    ],
)
def test_each_verdict(report, forward, backward, expected):
    page = report(made(forward, backward))
    assert expected in page.text


def test_tolerance_moves_the_verdict(report):
    assert "from blocks/5 (block 6 of 6) on" in report(exploding(), tolerance=1000.0).text
    assert "The signal survives" in report(exploding(), tolerance=2000.0).text
    with pytest.raises(ValueError, match="tolerance=1 must be more than 1"):
        report(exploding(), tolerance=1)


def test_causes_notes_and_kernels(report, monkeypatch):
    cause = spp.Cause("The skip adds.", "6 of 6\nblocks <b>.", "c = sqrt(1/2)")
    kernel = spp.Kernel(
        "blocks/0/kernel", "blocks/0", (3, 3, 4, 8), (36, 72), 2 / 36, ("He fan-in",), standardized=True
    )
    monkeypatch.setattr(_causes, "find", lambda profile, verdicts: (cause,))
    page = report(dataclasses.replace(exploding(), kernels=(kernel,)))
    assert "The skip adds.6 of 6 blocks <b>.Try: c = sqrt(1/2)" in page.text
    assert "rescale.balance" not in page.text
    assert ["blocks/0/kernel", "3×3×4×8", "0.0556", "He fan-in", "standardized"] in page.rows
    monkeypatch.undo()
    assert "No cause stands out in what was measured.Try: nfjax.rescale.balance" in report(exploding()).text
    # A factor mends neither zeros nor NaN.
    assert "rescale.balance" not in report(made([1, np.nan], [1, 1])).text
    assert "Why" not in report(made([1, 1], [1, 1])).text
    identities = report(made([1, 1], [1, 1], branch_share=[0, 0]))
    assert "forward and backward, with a reservation." in identities.text
    assert "Mind2 of 2 blocks are the identity" in identities.text


def test_table_of_the_blocks(report):
    profile = made(
        [1, 0.5, 20, 1e-9], [np.inf, 1, 1, np.nan], shapes=[(4, 8)] * 2 + [(4, 16)] * 2,
        branch_share=[0.5, np.nan, 0.123, 1], dead=[np.nan] * 4, own=[1, 2, 3, 4],
    )  # fmt: skip
    page = report(profile, jacobians=singular(profile))
    head, *rows = page.rows
    assert head == ["", "block", "activation variance", "gradient variance", "branch's share", "largest singular value",
                    "rms singular value", "own", "output"]  # fmt: skip
    assert rows[0] == ["1", "blocks/0", "1", "∞", "50 %", "2", "2", "1", "4×8"]
    assert rows[3][1:5] == ["blocks/3▼ activations vanishing✕ gradients non-finite", "1·10⁻⁹", "–", "100 %"]
    assert rows[2][1:5] == ["blocks/2", "20", "1", "12.3 %"]
    assert rows[1][4] == "–"
    assert page.count("tbody") == 2  # one for each stage
    assert (
        page.count("tr", **{"class": "turn vanishing"}) == 1
    )  # the variance farthest from the start gives the verdict


def test_several_profiles_and_seeds(report):
    profiles = {"<flat>": made([1, 1, 1], [1, 1, 1], seeds=3), "steep": exploding(3), "steep too": exploding(3)}
    page = report(
        profiles, {"steep": spp.Prediction(("a",) * 3, np.ones(3), np.ones(3))}, date=datetime.date(2026, 11, 2)
    )
    assert "The signal survives in both directions in 1 of 3 networks." in page.text
    assert page.rows[1][0].strip().endswith("<flat>")
    assert page.rows[1][1] == "✓ preserved× 1 in all"
    assert page.rows[2][1] == "▲ exploding× 16 in all, from blocks/2 (block 3 of 3)"
    assert "steep, steep tooNo cause stands out" in page.text  # said once
    assert page.text.count("The blocks: ") == 3
    assert "Medians of 3 seeds" in page.text
    assert "3 seeds (0, 1, 2); medians" in page.text
    assert "2026-11-02" in page.text
    assert "thin: its closed form; shaded: all seeds" in page.text
    page = report({str(i): made([1, 1], [1, 1], seeds=12) for i in range(2)})
    assert "in all of 2 networks" in page.text
    assert "12 seeds (0, 1, 2, …, 11)" in page.text
    assert "in none of 2 networks" in report({"a": exploding(), "b": exploding()}).text


# ---------------------------------------------------------------- a file that can be mailed


def test_hostile_names_are_text(report):
    paths = [f"{HOSTILE}{i}" for i in range(4)]
    profile = dataclasses.replace(exploding(4, paths=paths), outputs=tuple(f"{path}[1]" for path in paths))
    for given in (profile, {HOSTILE: profile, "<b>": profile}):
        page = report(given, jacobians=None, title=HOSTILE, date="<i>")
        assert {tag for tag, _ in page.tags} <= {
            *(
                "html",
                "head",
                "meta",
                "title",
                "style",
                "body",
                "main",
                "header",
                "section",
                "div",
                "p",
                "h1",
                "h2",
                "h3",
            ),
            *(
                "span",
                "strong",
                "code",
                "br",
                "wbr",
                "ol",
                "ul",
                "li",
                "dl",
                "dt",
                "dd",
                "figure",
                "figcaption",
                "table",
            ),
            *(
                "thead",
                "tbody",
                "tr",
                "th",
                "td",
                "svg",
                "g",
                "path",
                "defs",
                "use",
                "text",
                "tspan",
                "clippath",
                "rect",
            ),
        }
        assert "<script>alert(1)</script>" in page.text
        assert not {"\u202e", "\x1b"} & set(page.text)
        assert "層" in page.text


def test_nothing_is_loaded_or_run(report, tmp_path):
    page = report({"a": exploding(), "b": exploding()}, title="x")
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert value.startswith("#")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)", text)
    # The identifiers that the pictures refer to are there.
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text)) <= ids


def test_same_file_each_time_whatever_the_settings(tmp_path):
    profile = exploding(seeds=2, similarity=np.linspace(0, 1, 6))
    spp.write_report(tmp_path / "a.html", profile, jacobians=singular(profile))
    with matplotlib.rc_context(
        {"axes.facecolor": "black", "text.color": "white", "font.size": 30, "svg.fonttype": "path"}
    ):
        spp.write_report(str(tmp_path / "b.html"), profile, jacobians=singular(profile))
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "a.html").write_text("before")
    with pytest.raises(ValueError, match="no profile"):
        spp.write_report(tmp_path / "a.html", {})
    assert (tmp_path / "a.html").read_text() == "before"
    with pytest.raises(OSError, match="nowhere"):
        spp.write_report(tmp_path / "nowhere" / "a.html", exploding())


@pytest.mark.parametrize("n", [1, 200])
def test_size(report, tmp_path, n):
    """Of ResNet-101 with its 33 blocks below 500 KB; 200 blocks in four networks, too."""
    share = np.linspace(0, 1, n)
    profile = made(1.1 ** np.arange(n), np.ones(n), similarity=share, branch_share=share, dead=share, seeds=2)
    page = report(profile, jacobians=singular(profile))
    assert len(page.rows) == n + 1
    assert (tmp_path / "report.html").stat().st_size < 250_000
    report({str(i): profile for i in range(4)})
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


# ---------------------------------------------------------------- pictures with all details


def test_details_show_what_was_measured():
    plain = exploding(branch_share=[np.nan] * 6)
    assert len(spp.plot(plain).axes) == len(spp.plot(plain, details=True).axes) == 2
    rich = exploding(
        similarity=np.linspace(-0.5, 1, 6), branch_share=[0.1, np.nan, 0.3, 0.4, 0.5, 1.5], saturated=[0.5] * 6
    )
    figure = spp.plot(rich, details=True, jacobians=singular(rich, 3.0, 0.25))
    similarity, share, units, values = figure.axes[2:]
    assert [axes.get_title(loc="left") for axes in figure.axes[2:]] == [detail.heading for detail in panels.DETAILS]
    np.testing.assert_allclose(similarity.lines[0].get_ydata(), np.linspace(-0.5, 1, 6))
    assert similarity.get_ylim()[0] <= -0.5
    np.testing.assert_allclose(share.lines[0].get_xdata(), [1, 3, 4, 5, 6])  # where there is nothing, it is passed over
    assert share.get_ylim()[1] >= 1.5
    assert units.get_ylim() == (0.0, 1.0)
    np.testing.assert_allclose(units.lines[0].get_ydata(), 0.5)
    np.testing.assert_allclose(values.lines[0].get_ydata(), 3.0)
    np.testing.assert_allclose(values.lines[1].get_ydata(), 0.5)  # the root of the mean square
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert len(spp.plot(plain, jacobians=singular(plain)).axes) == 3  # asked for, so shown


def test_the_turn_is_marked():
    figure = spp.plot(exploding(), details=True)
    for axes, block, way in zip(figure.axes, (3, 3), ("forward", "backward"), strict=True):
        red = panels.VERDICTS["exploding"][1].lower()
        marks = [line for line in axes.lines if to_hex(line.get_color()) == red]
        assert [set(line.get_xdata()) for line in marks] == [{block}]
        assert axes.get_title(loc="left") == f"{way}: ▲ exploding"
        assert [text.get_text() for text in axes.texts] == ["↓ blocks/2"]
    assert not spp.plot(exploding()).axes[0].texts  # by default the picture is that of the paper
    flat = spp.plot(made([1, 1], [1, 1]), details=True).axes[0]
    assert (flat.get_title(loc="left"), len(flat.lines)) == ("forward: ✓ preserved", 1)
    # The grey band is what counts as preserved: up to the tolerance, both ways, from where it starts.
    box = spp.plot(made([2, 3], [1, 1]), details=True, tolerance=5).axes[0].patches[0].get_extents()
    low, high = (
        spp.plot(made([2, 3], [1, 1]), details=True, tolerance=5).axes[0].transData.inverted().transform(box)[:, 1]
    )
    np.testing.assert_allclose([low, high], [0.4, 10.0])


def test_a_long_path_keeps_its_end_and_its_number():
    paths = [f"encoder/stages/layers_with_a_long_name/{i}/attention" for i in range(4)]
    (label,) = spp.plot(exploding(4, paths=paths), details=True).axes[0].texts
    assert label.get_text() == "encoder/sta…_long_name/2/attention (block 3) ↓"


def test_pictures_of_odd_values(tmp_path):
    nothing = made([np.nan, np.inf], [0, 0], branch_share=[np.inf, np.nan], dead=[0, 0])
    figure = spp.plot(nothing, details=True, jacobians=singular(nothing, np.inf, np.nan))
    said = ["every value is 0, infinite or NaN" in [text.get_text() for text in axes.texts] for axes in figure.axes]
    assert said == [True, True, True, False, True]  # dead units: 0 is a value
    figure.savefig(tmp_path / "nothing.png")
    for many in (1, 200):
        profile = exploding(many, paths=[f"{HOSTILE[:60]}{i}" for i in range(many)])
        spp.plot(profile, details=True).savefig(tmp_path / "many.svg")


def test_wrong_input_gets_a_clear_error():
    profile, other = exploding(), exploding(paths=list("abcdef"))
    with pytest.raises(TypeError, match=r"expected an spp\.Profile, or a dictionary of them by name"):
        spp.plot([profile])
    with pytest.raises(TypeError, match=r"profiles=.'a': 3"):
        spp.plot({"a": 3})
    with pytest.raises(ValueError, match="singular values are of 'a', 'b', 'c' and 3 more, the profile of 'blocks/0'"):
        spp.plot(profile, jacobians=singular(other))
    with pytest.raises(ValueError, match="one of 2 profiles: expected a dictionary by name"):
        spp.plot({"a": profile, "b": profile}, jacobians=singular(profile))
    with pytest.raises(ValueError, match="jacobians for c, of which there is no profile"):
        spp.plot({"a": profile}, jacobians={"c": singular(profile)})


# ---------------------------------------------------------------- from a model, and from the command line


def test_of_a_network_in_both_ways(report, tmp_path, monkeypatch, capsys):
    make = lambda seed: resnet.PreActResNet(TINY, "convshort", width=4, image_size=8, rngs=nnx.Rngs(seed))  # noqa: E731
    profile = spp.propagate(make(0), jax.random.normal(jax.random.key(0), (4, 8, 8, 3)))
    page = report(profile, spp.predict(make(0), (4, 8, 8, 3)))
    values = [f"{value:.3g}" for value in profile.forward_var]
    assert [row[2] for row in page.rows[1 : 1 + len(values)]] == values  # the kernels follow
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    small = ("spp", f"--depth={TINY}", "--width=4", "--image-size=8", "--batch=4", "--residual=convshort")
    assert cli.run([*small, "--tolerance=3", "--out=sent/REPORT.HTML", "--out=a.svg"]) == 0
    capsys.readouterr()
    page = Page((tmp_path / "sent" / "REPORT.HTML").read_text())
    assert "convshort" in page.text
    assert "within a factor of 3 of" in page.text
    assert "within a factor of 3 of" in (tmp_path / "a.svg").read_text()
    assert cli.run([*small, "--out=report.htm"]) == 2
    assert "or .html for a report" in capsys.readouterr().err
