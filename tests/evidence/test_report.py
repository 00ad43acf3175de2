"""The page says what the record says, escapes everything, asks nobody for anything and appears whole or not at all."""

import copy
import math
import os
import re
from html.parser import HTMLParser

import fake_records as fakes
import pytest

from perturbed.evidence import report
from perturbed.evidence.figures import DASH, MINUS
from perturbed.evidence.scores import judge_scores
from perturbed.evidence.statistics import false_discovery
from perturbed.evidence.verdict import judge_record

VOID = {"meta", "link", "br", "hr", "img", "input", "col"}


class Page(HTMLParser):
    """A strict reader: it keeps the text, the attributes and every complaint about nesting."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.parts, self.faults = [], [], [], [], []
        self.feed(source)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:] or 'nothing'}")
        else:
            self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


def page(record, **kwargs):
    return Page(report.study_html(record, **kwargs))


@pytest.fixture(scope="module", params=fakes.ALL, ids=lambda make: make.__name__)
def record(request):
    return request.param()


@pytest.fixture(scope="module")
def source(record):
    return report.study_html(record)


def index(records, tmp_path):
    return Page(report.write_index(records, tmp_path).read_text(encoding="utf-8"))


# --- every page


def test_it_is_well_formed_with_unique_ids_that_are_all_found(source):
    read = Page(source)
    assert read.faults == []
    ids = read.values("id")
    assert len(ids) == len(set(ids))
    wanted = {name for value in read.values("aria-labelledby") for name in value.split()}
    wanted |= {value[1:] for value in read.values("href") if value.startswith("#")}
    assert wanted <= set(ids)
    assert read.tags.count("h1") == read.tags.count("main") == read.tags.count("title") - read.tags.count("svg") == 1


def test_it_loads_nothing_and_runs_nothing(source):
    read = Page(source)
    assert not {"script", "iframe", "object", "embed", "img", "form", "base"} & set(read.tags)
    assert not read.values("src")
    assert not [key for _, key, _ in read.attributes if key.startswith("on")]
    for tag, key, value in read.attributes:
        if key == "href":
            assert value.startswith("#") or value == "data:," or (tag == "a" and value.startswith("https://arxiv.org/"))
    assert "@import" not in source
    assert not re.search(r"url\((?!#)", source)
    policy = dict(p.split(" ", 1) for p in read.values("content")[0].split("; "))
    assert policy["default-src"] == "'none'"
    assert set(policy) == {"default-src", "style-src", "img-src", "base-uri", "form-action"}


def test_every_figure_in_it_has_an_alternative_text(source):
    assert source.count("<svg") >= 2
    for svg in re.findall(r"<svg.*?</svg>", source, re.S):
        assert 'role="img"' in svg
        assert re.search(r"<title[^>]*>[^<]{5,}</title><desc[^>]*>[^<]{15,}</desc>", svg)


def test_the_same_record_gives_the_same_page(record, source):
    assert report.study_html(copy.deepcopy(record)) == source


def test_the_verdict_comes_first_and_in_words(record, source):
    text = Page(source).text
    words = report.KINDS[record["verdict"]].meaning
    assert words in text
    assert text.index(words) < text.index("Every seed") < text.index("Reproduce it")


def test_it_has_the_raw_scores_to_the_last_digit(record, source):
    text = Page(source).text
    for by_seed in record["scores"].values():
        for score in by_seed.values():
            assert ("not finite" if score is None else repr(score)) in text


def test_it_stays_below_400_kilobytes(source):
    assert len(source.encode()) < 400_000


# --- the numbers


def test_the_numbers_are_those_of_the_record():
    record = fakes.supported()
    text = page(record).text
    result = record["arms"]["perturbed"]
    low, high = result["interval"]
    assert (
        f"exposure was on average {result['effect']:.2f} bits higher with perturbed than with control "
        f"(95 % interval: {low:.2f} to {high:.2f} bits higher)" in text
    )
    assert f"+{result['effect']:.2f} bits" in text
    assert f"95 % interval +{low:.2f} to +{high:.2f}" in text
    assert f"sign-flip test, p = {result['p']:.2g}" in text
    assert f"{result['detectable']:.2g} bits" in text
    assert "±1 bits one bit halves the candidates that an attacker has to try" in text
    assert f"{record['arms']['other_codes']['p_holm']:.2g}" in text
    means = [math.fsum(record["scores"][arm].values()) / 8 for arm in ("control", "perturbed")]
    assert "exposure: control {:.2f} → perturbed {:.2f} bits".format(*means) in text
    assert record["claim"]["paper"] in text
    assert record["claim"]["text"] in text
    assert record["command"] in text
    assert record["hash"] in text
    assert "torch 2.13.0" in text


def test_a_lower_score_is_called_lower_though_the_effect_is_positive_as_claimed():
    record = fakes.factorial()
    low, high = record["arms"]["sltrain+hubble"]["interval"]
    text = page(record).text
    assert (
        f"nats lower with sltrain+hubble than with control (95 % interval: {low:.3f} to {high:.3f} nats lower)" in text
    )
    assert f"+{record['arms']['sltrain+hubble']['effect']:.3f} nats" in text


def test_a_log_effect_is_told_as_a_ratio_of_the_scores():
    record = fakes.contradicted()
    effect = record["arms"]["warm_restart"]["effect"]
    low, high = (math.exp(-x) for x in reversed(record["arms"]["warm_restart"]["interval"]))
    text = page(record).text
    assert (
        f"perplexity was on average {100 * math.expm1(-effect):.3g} % higher with warm restart than with control"
        in text
    )
    near, far = (100 * (ratio - 1) for ratio in (low, high))
    assert f"(95 % interval: {near:.3g} to {far:.3g} % higher)" in text  # a unit once
    assert f"warm_restart / control = {math.exp(-effect):.4g} ({low:.4g} to {high:.4g})" in text
    assert f"{MINUS}{abs(effect):.4f} ln units" in text


def test_cost_is_in_human_units_with_the_ratio_to_the_reference():
    text = page(fakes.null()).text
    assert "Wall time 24.8 s 32.5 s × 1.31" in text.replace("\N{MULTIPLICATION SIGN}", "×")
    for words in ("3.42 TFLOP", "1.23 M", "412 MiB", "213 k"):
        assert words in text


@pytest.mark.parametrize(
    ("value", "units", "words"),
    [(59.0, "_TIME", "59 s"), (5400, "_TIME", "1.5 h"), (0.02, "_TIME", "20 ms"), (2.5e9, "_FLOPS", "2.5 GFLOP"),
     (999, "_COUNT", "999"), (0, "_BYTES", "0"), (1536, "_BYTES", "1.5 KiB"), (None, "_TIME", DASH)],
)  # fmt: skip
def test_units_fit_the_size(value, units, words):
    assert report._scaled(value, getattr(report, units)) == words


def test_a_range_that_is_one_number_is_not_told():
    same, apart = dict.fromkeys("012", 418_300.0), {"0": 418_200.0, "1": 418_300.0, "2": 418_400.0}
    close = {"0": 0.123451, "1": 0.123452}  # apart, though not in the digits that are shown
    assert report._cell(same) == {"value": "418,300", "beside": ""}
    assert report._cell(apart) == {"value": "418,300", "beside": "418,200 to 418,400"}
    assert report._cell(close) == {"value": "0.1235", "beside": ""}
    assert report._cell({"0": 1.0}) == {"value": "1", "beside": ""}


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["scores"]["perturbed"].update({"0": 99.5}),
        lambda r: r["arms"]["perturbed"].update(p=0.0312),
        lambda r: r["arms"]["perturbed"].update(detectable=0.77),
        lambda r: r["arms"]["other_codes"].update(p_holm=0.5),
        lambda r: r["gates"]["budgets"].update({"pass": False}),
        lambda r: r["cost"]["perturbed"].update(flops=1e12),
        lambda r: r["secondary"]["validation loss"]["perturbed"].update({"0": 3.0}),
        lambda r: r["curves"]["exposure"]["perturbed"]["0"].pop(),
        lambda r: r.update(epsilon=2.0),
        lambda r: r.update(registered=False),
        lambda r: r.update(specific=False),
        lambda r: r.update(trivial=True),
        lambda r: r.update(command="perturbed run hubble --seeds 9"),
        lambda r: r["versions"].update(torch="2.14.0"),
    ],
)
def test_whatever_changes_in_the_record_shows_on_the_page(change):
    changed = fakes.supported()
    change(changed)
    assert report.study_html(changed) != report.study_html(fakes.supported())


# --- what each verdict needs beside it


def test_a_null_is_as_prominent_as_a_supported_claim():
    pages = {make: report.study_html(make()) for make in (fakes.supported, fakes.null)}
    outline = [re.findall(r"<(?:h\d|section|p class=\"word\")", source)[:5] for source in pages.values()]
    assert outline[0] == outline[1]
    assert "Two one-sided tests place it within ±0.02" in Page(pages[fakes.null]).text


def test_an_effect_that_the_sham_has_too_is_not_put_down_to_the_method():
    text = page(fakes.contradicted()).text
    assert "The sham, shuffled_restart, did as much or more" in text
    assert "does not exclude zero on the side of the effect" in text
    for other in (fakes.supported(), fakes.diverged(), fakes.factorial()):
        assert "did as much or more" not in page(other).text
    mean = sum(
        math.log(fakes.contradicted()["scores"]["shuffled_restart"][s] / t)
        for s, t in fakes.contradicted()["scores"]["warm_restart"].items()
    )
    assert f"warm_restart {MINUS} shuffled_restart = {MINUS}{abs(mean / 8):.4f} ln units" in text


def test_a_supported_effect_within_epsilon_is_called_trivial():
    text = page(fakes.supported() | {"trivial": True}).text
    assert "Supported, but trivial" in text
    assert "too small to matter, so summaries count it as null" in text
    assert "but trivial" not in page(fakes.null()).text, "a null needs no such remark"


def test_a_diverged_study_names_the_seeds_and_what_to_do():
    text = page(fakes.diverged()).text
    assert "6 of 8 pairs have two finite scores (missing in high_rate: seed 2, 5)" in text
    assert "lower the learning rate" in text
    assert "was on average" not in text
    assert "high_rate without a mean" in text, "a mean over the seeds that did not diverge would flatter the arm"


def test_an_invalid_study_names_the_gate_that_failed():
    text = page(fakes.invalid()).text
    assert "Failed: off_equals_control (3 tensors differ with alpha = 0)" in text
    assert text.index("cannot be relied upon") < text.index("was on average")


def test_a_screening_and_an_inconclusive_study_say_how_many_seeds_to_run():
    assert "at least 6 seeds" in page(fakes.screening()).text
    command = re.search(r"perturbed power --sd ([\d.]+) --effect 0.02", page(fakes.large()).text)
    d = [
        t - c for t, c in zip(*(fakes.large()["scores"][a].values() for a in ("arm_number_0", "control")), strict=True)
    ]
    mean = sum(d) / 8
    assert float(command[1]) == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in d) / 7), rel=1e-2)
    assert "--seeds 12" in page(fakes.judged()).text, "without a smallest effect of interest: twice the seeds"


@pytest.mark.parametrize(
    ("verdict", "words"), [("supported", "equal, as claimed"), ("contradicted", "not equal, as had")]
)
def test_a_claim_of_equality_is_told_as_one(verdict, words):
    text = page(fakes.null() | {"direction": "equal", "verdict": verdict}).text
    assert words in text
    assert "but trivial" not in text


def test_it_says_whether_the_study_was_registered_or_changed():
    assert "were fixed beforehand" in page(fakes.supported()).text
    assert "its claim is not what was tested" in page(fakes.supported() | {"registered": False}).text
    assert "Nothing shows that claim and metric were fixed beforehand" in page(fakes.judged()).text


def test_parts_that_a_judged_record_lacks_are_left_out():
    text = page(fakes.judged()).text
    for heading in ("The paper", "What it cost", "Gates", "Learning curves", "Also measured", "Earlier records"):
        assert heading not in text
        if heading != "Earlier records":
            assert heading in page(fakes.supported()).text


def test_scores_judged_from_a_file_make_a_page_whose_claim_is_not_a_papers():
    scores = {"base": {0: 0.1, 1: 0.2, 2: 0.4}, "ours": {0: 0.2, 1: 0.4, 2: None}}
    read = page(judge_scores(scores, control="base", treatment="ours", metric="accuracy"))
    assert read.faults == []
    assert "The claim accuracy of ours is above that of base" in read.text
    assert "paper’s number" not in read.text
    assert "The claim accuracy" not in page(fakes.supported()).text


def test_the_records_of_these_tests_are_those_that_the_package_makes():
    for make in (fakes.supported, fakes.null, fakes.contradicted, fakes.diverged, fakes.factorial):
        made, judged = make(), judge_record(make())
        for arm, result in judged["arms"].items():
            assert set(made["arms"][arm]) == set(result)
            for key in ("effect", "interval", "p", "finite", "n", "reference"):
                assert made["arms"][arm][key] == pytest.approx(result[key]), f"{make.__name__} {arm} {key}"
        assert (made["verdict"], made["specific"]) == (judged["verdict"], judged["specific"])


def test_earlier_records_are_listed_newest_first():
    old = [
        fakes.null() | {"started": f"2026-0{k}-01", "verdict": v} for k, v in ((1, "screening"), (2, "inconclusive"))
    ]
    text = page(fakes.null(), history=old).text
    assert text.index("2026-02-01") < text.index("2026-01-01")


def test_an_interaction_says_what_the_combination_adds():
    text = page(fakes.factorial()).text
    result = fakes.factorial()["interaction"]["sltrain+hubble"]
    assert f"interaction {MINUS}{abs(result['effect']):.4f} nats" in text
    assert "together they do less" in text


def test_a_verdict_of_a_later_version_is_shown_as_written():
    assert "perhaps" in page(fakes.supported() | {"verdict": "perhaps"}).text


# --- hostile text


def hostile(value):
    """The record with every text in it, and every arm's name, made hostile."""
    evil = '"><script>alert(1)</script>{{ 7*7 }}${x}'
    if isinstance(value, dict):
        return {(evil + k if k in ("perturbed", "other_codes") else k): hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    keep = ("supported", "inconclusive", "higher", "raw", "control")
    return evil + value if isinstance(value, str) and value not in keep else value


def test_no_text_of_a_record_becomes_markup():
    source = report.study_html(hostile(fakes.supported()), history=[hostile(fakes.supported())])
    read = Page(source)
    assert read.faults == []
    assert "<script" not in source
    assert "script" not in read.tags
    assert "{{ 7*7 }}" in read.text, "shown as it is, not evaluated"
    assert not [value for value in read.values("href") if "arxiv" in value], "only a real identifier becomes a link"


def test_hostile_names_are_harmless_in_the_index_too(tmp_path):
    source = report.write_index([hostile(fakes.supported())], tmp_path).read_text(encoding="utf-8")
    assert "<script" not in source
    assert Page(source).faults == []


@pytest.mark.parametrize(
    ("slug", "name"), [("../../etc/passwd", "etc-passwd"), ("a/b\\c", "a-b-c"), ("..", "study"), ("hubble", "hubble")]
)
def test_a_page_never_leaves_its_folder(slug, name, tmp_path):
    path = report.write_study(fakes.screening() | {"slug": slug}, tmp_path / "out")
    assert path == tmp_path / "out" / f"{name}.html"
    assert list((tmp_path / "out").iterdir()) == [path]


# --- files


def test_a_page_has_a_name_of_its_own_for_each_scale_and_for_changed_studies():
    record = fakes.supported()
    names = [
        report.page_name(r)
        for r in (record, record | {"scale": "full"}, record | {"registered": False}, fakes.judged(), fakes.factorial())
    ]
    assert names == [
        "hubble.html",
        "hubble-full.html",
        "hubble-changed.html",
        "scores-csv-ours-vs-control-score.html",
        "DocstringLM-sltrain-hubble-vs-control-validation-loss.html",
    ]


def test_what_is_written_is_the_page_with_the_permissions_of_any_new_file(tmp_path):
    path = report.write_study(fakes.screening(), tmp_path)
    assert path.read_text(encoding="utf-8") == report.study_html(fakes.screening())
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_leaves_the_old_page_and_no_draft(tmp_path):
    out = tmp_path / "out"
    path = report.write_study(fakes.screening(), out)
    before = path.read_bytes()
    broken = fakes.screening()
    del broken["arms"]
    with pytest.raises(KeyError):
        report.write_study(broken, out)
    assert path.read_bytes() == before
    assert list(out.iterdir()) == [path]


@pytest.mark.parametrize("write", [report.write_study, lambda record, out: report.write_index([record], out)])
def test_an_unwritable_folder_is_an_error_before_any_work(write, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(report, "_study", lambda *_: pytest.fail("the page was drawn"))
    monkeypatch.setattr(report, "_index", lambda *_: pytest.fail("the page was drawn"))
    with pytest.raises(OSError, match="file"):
        write(fakes.screening(), tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_a_permission_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        report.write_study(fakes.screening(), tmp_path)


# --- the index


def test_the_index_links_to_every_page_and_groups_positive_with_negative(tmp_path):
    records = [make() for make in fakes.ALL]
    read = index(records, tmp_path)
    assert read.faults == []
    assert {v for t, k, v in read.attributes if t == "a" and k == "href"} == {report.page_name(r) for r in records}
    answered = read.text[read.text.index("Answered") : read.text.index("Still open")]
    for word in ("supported", "contradicted", "null"):
        assert word in answered
    assert read.tags.count("svg") == len(records)
    assert "2 supported 1 contradicted 1 null 2 inconclusive 1 screening 1 diverged 1 invalid" in read.text


def test_the_false_discovery_rate_is_over_valid_studies_and_changes_no_verdict(tmp_path):
    records = [make() for make in (fakes.supported, fakes.null, fakes.contradicted, fakes.diverged, fakes.invalid)]
    read = index(records, tmp_path)
    ps = [r["arms"][r["primary"]]["p"] for r in records[:3]]
    rates = [f"{q:.2g}" for q in false_discovery(ps)]
    rows = re.split(r"Hubble|NEFTune|Resetting|Learning rates", read.text)
    assert f"8 0.0078 {rates[0]}" in rows[1]
    assert f" {ps[1]:.2g} {rates[1]} " in rows[2]
    assert f"8 {DASH} {DASH}" in rows[5]
    assert f"0.0078 {DASH}" in rows[4], "the invalid study is not in the family"
    assert "supported" in rows[1]


def test_a_trivial_effect_is_counted_as_null(tmp_path):
    assert "1 null" in index([fakes.supported() | {"trivial": True}], tmp_path).text


def test_of_two_records_of_a_study_the_later_one_is_listed(tmp_path):
    early = fakes.null() | {"started": "2026-01-01T00:00:00Z", "verdict": "inconclusive"}
    late = fakes.null() | {"started": "2026-02-01T00:00:00Z"}
    for records in ([early, late], [late, early]):
        read = index(records, tmp_path)
        assert "1 study" in read.text
        assert "1 null" in read.text


def test_the_cost_in_the_index_is_that_of_all_runs(tmp_path):
    record = fakes.null()
    total = sum(cost["cpu_s"] for cost in record["cost"].values()) * 8
    assert f"{total / 60:.3g} min" in index([record], tmp_path).text


def test_an_index_of_nothing_is_a_page(tmp_path):
    read = index([], tmp_path)
    assert read.faults == []
    assert "0 studies" in read.text
