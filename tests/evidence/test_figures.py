"""What is drawn is what the record says: positions are read back from the SVG and compared with the numbers."""

import copy
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import fake_records as fakes
import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from perturbed.evidence import figures
from perturbed.evidence.figures import DASH, MINUS

SVG = "{http://www.w3.org/2000/svg}"
REAL = some.floats(-1e6, 1e6, allow_nan=False)


def shapes(svg, tag):
    return list(ET.fromstring(svg).iter(SVG + tag))


def texts(svg):
    return ["".join(node.itertext()) for node in shapes(svg, "text")]


def described(svg):
    return ET.fromstring(svg).find(SVG + "desc").text


def dots(svg, variable):
    """Centres of the markers of one colour as {height: [x, ...]}, and the lines' points likewise."""
    rows = {}
    for use in shapes(svg, "use"):
        if f"var(--pt-{variable})" in use.get("style"):
            rows.setdefault(float(use.get("y")), []).append(float(use.get("x")))
    return rows


def axis(svg):
    """The map from positions to values that the tick labels below the panel spell out: (slope, intercept)."""
    ticks = [t for t in shapes(svg, "text") if re.fullmatch(rf"[-+{MINUS}]?[\d.,]+", t.text)]
    bottom = max(float(t.get("y")) for t in ticks)
    points = [(float(t.get("x")), plain(t.text)) for t in ticks if abs(float(t.get("y")) - bottom) < 1]
    return np.polyfit(*np.array(points).T, 1)


def plain(text):
    return float(text.replace(MINUS, "-").replace(",", ""))


EVERY = [
    pytest.param(lambda: figures.paired_scores(fakes.supported()), id="scores"),
    pytest.param(lambda: figures.paired_differences(fakes.supported()), id="differences"),
    pytest.param(lambda: figures.paired_scores(fakes.diverged()), id="scores of a diverged study"),
    pytest.param(lambda: figures.paired_differences(fakes.diverged()), id="differences of a diverged study"),
    pytest.param(lambda: figures.paired_scores(fakes.contradicted()), id="log scores"),
    pytest.param(lambda: figures.learning_curves(fakes.supported(), "exposure"), id="curves"),
    pytest.param(lambda: figures.learning_curves(fakes.contradicted(), "perplexity"), id="log curves"),
    pytest.param(lambda: figures.interaction_plot(fakes.factorial(), "sltrain+hubble"), id="interaction"),
    pytest.param(lambda: figures.sparkline(fakes.supported()), id="sparkline"),
    pytest.param(lambda: figures.sparkline(fakes.diverged()), id="sparkline of a diverged study"),
]


# --- numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, DASH), (math.nan, DASH), (0.0, "0"), (-0.5, f"{MINUS}0.5"), (1234.5, "1,234"), (0.84443, "0.8444")],
)
def test_numbers_are_written_with_four_digits_and_a_real_minus_sign(value, text):
    assert figures.number(value) == text


def test_effect_and_interval_share_the_decimals_that_the_interval_can_bear():
    assert figures.places([0.31, 0.53]) == 2
    assert figures.places([-120.0, 480.0]) == 0
    assert figures.places([0.5, 0.5]) is None
    assert figures.span([0.30961, 0.53]) == "+0.31 to +0.53"
    assert figures.signed(-0.0004, 2) == "+0.00", "a rounded zero has no minus"
    assert figures.signed(-0.0051, 2) == f"{MINUS}0.01"


@given(REAL, some.floats(1e-3, 1e6), some.booleans())
def test_ticks_are_round_evenly_spaced_inside_and_read_back(low, width, sign):
    ticks, words = figures._ticks(low, low + width, sign)
    assert 2 <= len(ticks) <= 7
    assert all(low <= t <= low + width for t in ticks)
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    back = [plain(w) for w in words]
    np.testing.assert_allclose(back, ticks, rtol=1e-3, atol=1e-9)


# --- differences


def test_differences_are_positive_as_claimed_and_keep_their_seeds():
    scores = {"control": [1.0, 2.0, 4.0], "arm": [2.0, None, 1.0]}
    record = fakes.study(scores, primary="arm", verdict="diverged", direction="lower")
    assert figures.differences(record, "arm") == {0: -1.0, 1: None, 2: 3.0}
    record["direction"] = "equal"
    assert figures.differences(record, "arm") == {0: 1.0, 1: None, 2: -3.0}
    record |= {"direction": "lower", "transform": "log"}
    assert figures.differences(record, "arm") == pytest.approx({0: -math.log(2), 1: None, 2: math.log(4)})


@pytest.mark.parametrize("make", [fakes.supported, fakes.contradicted, fakes.factorial])
def test_their_mean_is_the_effect_of_the_record(make):
    record = make()
    for arm, result in record["arms"].items():
        assert np.mean(list(figures.differences(record, arm).values())) == pytest.approx(result["effect"])


def test_a_log_of_a_score_that_is_not_positive_is_missing_rather_than_an_error():
    record = fakes.study({"control": [0.0, 2.0], "arm": [1.0, 2.0]}, primary="arm", verdict="diverged")
    assert figures.differences(record | {"transform": "log"}, "arm") == {0: None, 1: 0.0}


# --- the paired panels


def test_each_dot_of_the_scores_lies_at_its_score():
    record = fakes.supported()
    svg = figures.paired_scores(record)
    slope, start = axis(svg)
    drawn = next(xs for xs in dots(svg, "arm1").values() if len(xs) == 8)
    np.testing.assert_allclose(slope * np.array(drawn) + start, list(record["scores"]["perturbed"].values()), atol=0.03)


def test_under_a_log_transform_position_is_the_logarithm_of_the_score():
    record = fakes.contradicted()
    drawn = next(xs for xs in dots(figures.paired_scores(record), "arm1").values() if len(xs) == 8)
    scores = np.array(list(record["scores"]["warm_restart"].values()))
    residual = {
        f.__name__: np.abs(np.polyval(np.polyfit(f(scores), drawn, 1), f(scores)) - drawn).max()
        for f in (np.log, np.asarray)
    }
    assert residual["log"] < 0.02
    assert residual["asarray"] > 10 * residual["log"], "positions on a linear axis would fit as well"
    assert "perplexity, log scale" in texts(figures.paired_scores(record))


def test_a_line_joins_the_two_scores_of_one_seed():
    record = fakes.supported()
    svg = figures.paired_scores(record)
    slope, start = axis(svg)
    lines = [p.get("d") for p in shapes(svg, "path") if "opacity: 0.55" in p.get("style", "")][:8]
    ends = [[slope * float(x) + start for x in re.findall(r"[ML] ([-\d.]+)", d)] for d in lines]
    pairs = [[record["scores"][arm][str(seed)] for arm in ("control", "perturbed")] for seed in record["seeds"]]
    np.testing.assert_allclose(ends, pairs, atol=0.03)


def test_mean_and_interval_of_the_differences_lie_where_the_record_has_them():
    record = fakes.supported()
    svg = figures.paired_differences(record)
    slope, start = axis(svg)
    rows = {h: sorted(slope * np.array(xs) + start) for h, xs in dots(svg, "arm1").items()}
    result = record["arms"]["perturbed"]
    expected = sorted([*result["interval"], result["effect"]])
    assert any(len(xs) == 3 and np.allclose(xs, expected, atol=0.03) for xs in rows.values())
    differences = sorted(figures.differences(record, "perturbed").values())
    assert any(len(xs) == 8 and np.allclose(xs, differences, atol=0.03) for xs in rows.values())


def test_the_band_reaches_from_minus_to_plus_epsilon_and_no_further_than_the_panel():
    for epsilon, expected in ((1.0, [-1.0, 1.0]), (1e6, None)):
        svg = figures.paired_differences(fakes.supported() | {"epsilon": epsilon})
        slope, start = axis(svg)
        band = next(p.get("d") for p in shapes(svg, "path") if "var(--pt-band)" in p.get("style", ""))
        xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+)", band)]
        if expected:
            np.testing.assert_allclose([slope * min(xs) + start, slope * max(xs) + start], expected, atol=0.03)
        assert 0 <= min(xs) < max(xs) <= 345
    assert "var(--pt-band)" not in figures.paired_differences(fakes.supported() | {"epsilon": None})


def test_a_seed_without_a_score_is_marked_and_no_mean_is_drawn_over_the_others():
    record = fakes.diverged()
    scores, differences = figures.paired_scores(record), figures.paired_differences(record)
    assert "✕ 2 seeds" in texts(scores)
    assert "no finite score for seed 2, 5" in described(scores)
    assert sorted(map(len, dots(scores, "arm1").values())) == [1, 6], "the six finite ones and the name's marker"
    assert "6 of 8 finite" in texts(differences)
    assert list(map(len, dots(differences, "arm1").values())) == [6]
    assert "6 of 8 finite" in described(differences)


def test_the_alternative_text_gives_the_numbers_that_are_drawn():
    record = fakes.supported()
    text = described(figures.paired_differences(record))
    result = record["arms"]["perturbed"]
    assert f"perturbed minus control: mean +{result['effect']:.2f}" in text
    assert f"95 % interval +{result['interval'][0]:.2f} to +{result['interval'][1]:.2f}" in text
    assert "±1" in text
    scores = list(record["scores"]["perturbed"].values())
    assert f"perturbed: mean {np.mean(scores):.4g}, from {min(scores):.4g} to {max(scores):.4g}" in described(
        figures.paired_scores(record)
    )


def test_constant_and_absent_scores_still_make_a_figure():
    for values in ([1.0] * 6, [None] * 6, [0.0] * 6):
        record = fakes.study({"control": values, "arm": values}, primary="arm", verdict="deterministic")
        assert described(figures.paired_scores(record))
        assert described(figures.paired_differences(record))


def test_the_primary_comes_first_then_the_sham_in_any_order_of_the_record():
    record = fakes.supported()
    record["arms"] = dict(reversed(record["arms"].items()))
    assert figures.arm_order(record) == ["perturbed", "other_codes"]


# --- curves and interactions


def tiny_curves(lines):
    record = fakes.study({"control": [1.0] * 6, "arm": [2.0] * 6}, primary="arm", verdict="null")
    return record | {"curves": {"loss": lines}}


def test_the_mean_curve_is_over_the_steps_that_every_seed_has():
    record = tiny_curves({"arm": {"0": [[1, 4.0], [2, 2.0], [3, 9.0]], "1": [[1, 2.0], [2, 1.0], [3, None]]}})
    assert described(figures.learning_curves(record, "loss")).endswith("arm ends at 1.5 at step 2.")


def test_a_long_curve_keeps_its_first_and_last_point_in_few():
    line = {float(x): 1.0 / (x + 1) for x in range(5000)}
    xs, ys = figures._thin(line, 60)
    assert len(xs) == 60
    assert (xs[0], xs[-1]) == (0.0, 4999.0)
    assert ys == [line[x] for x in xs]
    assert xs == sorted(set(xs))


def test_a_wide_range_of_a_curve_is_drawn_on_a_log_axis():
    wide = tiny_curves({"arm": {"0": [[1, 1000.0], [2, 100.0], [3, 10.0]]}})
    path = next(p for p in shapes(figures.learning_curves(wide, "loss"), "path") if "arm1" in p.get("style", ""))
    heights = [float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", path.get("d"))]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.05)


def test_an_unknown_curve_is_a_key_error():
    with pytest.raises(KeyError, match="bleu"):
        figures.learning_curves(fakes.supported(), "bleu")


def test_the_dashed_line_of_an_interaction_ends_at_the_sum_of_both_effects():
    scores = {"control": [10.0] * 6, "a": [13.0] * 6, "b": [12.0] * 6, "a+b": [17.0] * 6}
    record = fakes.study(scores, primary="a+b", verdict="supported")
    record["interaction"] = {"a+b": {"effect": 2.0, "interval": [1.5, 2.5], "p": 0.03}}
    svg = figures.interaction_plot(record, "a+b")
    right = max(float(u.get("x")) for u in shapes(svg, "use"))
    height = {}
    for use in shapes(svg, "use"):
        color = re.search(r"stroke: var\(--pt-(\w+)\)", use.get("style"))[1]
        if float(use.get("x")) == right:
            height[color] = float(use.get("y"))
    # control+b = 12, combined = 17, additive = 13 + 12 - 10 = 15: higher scores are further up.
    ratio = (height["muted"] - height["arm2"]) / (height["muted"] - height["arm1"])
    assert ratio == pytest.approx((15 - 12) / (17 - 12), abs=0.01)
    assert "control 10, a 13, b 12, a+b 17. Interaction +2.00, 95 % interval +1.50 to +2.50." in described(svg)


def test_only_a_combination_of_two_measured_arms_has_an_interaction_plot():
    record = fakes.factorial()
    assert figures.interaction_parts(record, "sltrain+hubble") == ("sltrain", "hubble")
    assert figures.interaction_parts(record, "sltrain") is None
    with pytest.raises(ValueError, match="'x\\+y' does not combine two arms of this record; it has control, sltrain"):
        figures.interaction_plot(record, "x+y")


# --- the sparkline


def test_the_sparkline_puts_zero_in_the_middle_and_the_interval_to_scale():
    svg = figures.sparkline(fakes.supported())
    result = fakes.supported()["arms"]["perturbed"]
    scale = 76 / (1.1 * result["interval"][1])
    start, end = map(float, re.search(r"M([\d.]+) 13H([\d.]+)", svg).groups())
    assert start == pytest.approx(80 + scale * result["interval"][0], abs=0.01)
    assert end == pytest.approx(80 + scale * result["interval"][1], abs=0.01)
    assert "M80 0V26" in svg
    band = next(iter(shapes(svg, "rect")))
    assert float(band.get("x")) == pytest.approx(80 - scale, abs=0.01)
    assert float(band.get("width")) == pytest.approx(2 * scale, abs=0.02)


def test_the_sparkline_of_another_arm_and_of_a_diverged_study():
    svg = figures.sparkline(fakes.supported(), "other_codes")
    assert "other_codes minus control" in svg
    assert "6 of 8 finite" in texts(figures.sparkline(fakes.diverged()))
    assert not shapes(figures.sparkline(fakes.diverged()), "circle")


# --- every figure


@pytest.mark.parametrize("draw", EVERY)
def test_every_figure_is_an_image_with_a_title_and_a_description(draw):
    root = ET.fromstring(draw())
    assert root.get("role") == "img"
    assert [node.tag for node in root][:2] == [SVG + "title", SVG + "desc"]
    assert len(root[0].text) > 5
    assert len(root[1].text) > 15


@pytest.mark.parametrize("draw", EVERY)
def test_every_colour_follows_the_mode_of_the_reader(draw):
    svg = draw()
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b(?!-)", re.sub(r'href="[^"]*"', "", svg)), "a fixed colour"
    used = set(re.findall(r"var\(--pt-(\w+)\)", svg))
    assert used <= set(figures.PALETTE)
    assert "ink" in used or "muted" in used


@pytest.mark.parametrize("draw", EVERY)
def test_a_figure_brings_no_style_sheet_no_link_and_no_font(draw):
    svg = draw()
    assert "<style" not in svg
    assert "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "font-family" not in svg


@pytest.mark.parametrize("draw", EVERY)
def test_the_same_record_gives_the_same_figure_whatever_the_settings_of_matplotlib(draw):
    first = draw()
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path", "lines.marker": "x"}):
        assert draw() == first


def test_figures_leave_the_settings_of_matplotlib_as_they_were():
    before = dict(matplotlib.rcParams)
    figures.paired_scores(fakes.supported())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("draw", [figures.paired_scores, figures.paired_differences])
def test_another_score_gives_another_figure(draw):
    record = fakes.supported()
    changed = copy.deepcopy(record)
    changed["scores"]["perturbed"]["3"] += 0.5
    assert draw(changed) != draw(record)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "$x_{", "a\x00\n\tb", "扰动", '"><b', "]]>&amp;", "x" * 500]
)
def test_any_name_of_an_arm_is_drawn_as_text(name):
    record = fakes.study({"control": [1.0] * 6, name: [2.0, 3, 4, 5, 6, 7]}, primary=name, verdict="supported")
    record["curves"] = {name: {name: {"0": [[1, 2.0], [2, 1.0]]}}}
    for svg in (
        figures.paired_scores(record),
        figures.paired_differences(record),
        figures.learning_curves(record, name),
        figures.sparkline(record) if name.isprintable() else figures.paired_scores(record),
    ):
        assert {node.tag for node in ET.fromstring(svg).iter()} <= {
            SVG + tag for tag in ("svg", "title", "desc", "g", "path", "use", "defs", "text", "rect", "circle")
        }
    assert figures.label(name) in texts(figures.paired_scores(record))


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("mode", [0, 1])
def test_every_colour_of_text_has_the_contrast_that_accessibility_asks_for(mode):
    paper = luminance(figures.PALETTE["paper"][mode])
    for name, colors in figures.PALETTE.items():
        if name not in ("paper", "rule", "band"):
            light, dark = sorted((paper, luminance(colors[mode])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{name} (WCAG 2.2, 1.4.3)"


def test_arms_differ_in_more_than_colour():
    looks = figures._looks(fakes.large())
    coded = [(look.marker, look.hollow) for look in looks.values()]
    pairs = [(look.color, look.marker) for look in looks.values()]
    assert len(set(pairs)) == len(pairs) == 10
    assert len(set(coded[:8])) == 8


def test_a_figure_of_its_own_has_a_size_and_both_palettes():
    alone = figures.standalone(figures.sparkline(fakes.supported()))
    root = ET.fromstring(alone)
    assert (root.get("width"), root.get("height")) == ("160", "26")
    assert figures.PALETTE["arm1"][0] in alone
    assert figures.PALETTE["arm1"][1] in alone
    assert "prefers-color-scheme: dark" in alone
    with pytest.raises(ValueError, match="viewBox"):
        figures.standalone("<svg></svg>")


def test_neither_torch_nor_the_engine_nor_scipy_stats_nor_pyplot_is_loaded():
    code = (
        "import sys\n"
        "from perturbed.evidence import figures, report\n"
        "assert 'matplotlib' not in sys.modules, 'loaded before a figure is drawn'\n"
        "arms = {'a': {'reference': 'control', 'effect': 1.0, 'interval': [0.5, 1.5], 'p': 0.1, 'n': 2, 'finite': 2}}\n"
        "record = dict(arms=arms, primary='a', reference='control', sham=None, seeds=[0, 1], direction='higher',\n"
        "              transform='raw', metric='m', unit='',\n"
        "              scores={'control': {'0': 0, '1': 0}, 'a': {'0': 1, '1': 1}})\n"
        "figures.paired_scores(record); figures.paired_differences(record)\n"
        "bad = {'torch', 'scipy.stats', 'matplotlib.pyplot', 'perturbed.core'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
