"""Further questions of a study: weighted sums of arms on any metric, against scipy and against the arms themselves."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from perturbed import api
from perturbed.core.registry import cards, load
from perturbed.errors import PlanError
from perturbed.evidence.ledger import latest
from perturbed.evidence.pool import Pool
from perturbed.evidence.report import study_html
from perturbed.evidence.runner import Setting, add_interactions, run_study
from perturbed.evidence.statistics import holm, paired_t_p
from perturbed.evidence.study import Contrast, Study
from perturbed.evidence.verdict import judge, judge_contrast, judge_record

RNG = np.random.default_rng(3)
NAMES = ("control", "one", "other", "both")
SCORES = dict(zip(NAMES, RNG.normal([[0.50], [0.60], [0.55], [0.71]], 0.02, (4, 8)), strict=True))
LOSSES = dict(zip(NAMES, RNG.normal([[2.0], [1.9], [2.1], [1.5]], 0.05, (4, 8)), strict=True))
BOTH = {"both": 1, "one": -1, "other": -1, "control": 1}


def by_seed(table):
    return {arm: {str(seed): float(x) for seed, x in enumerate(row)} for arm, row in table.items()}


def asked(weights, metric="loss", direction="lower", **changes):
    contrast = Contrast(weights=weights, asks="is it?", metric=metric, direction=direction, **changes)
    return dataclasses.asdict(contrast)


def record(**contrasts):
    return {
        "metric": "accuracy", "primary": "one", "reference": "control", "sham": None, "direction": "higher",
        "epsilon": 0.02, "alpha": 0.05, "transform": "raw", "bounds": [0.0, 1.0], "gates": {}, "seeds": list(range(8)),
        "scores": by_seed(SCORES), "secondary": {"loss": by_seed(LOSSES)}, "contrasts": contrasts,
    }  # fmt: skip


def check(found, d):
    test = stats.ttest_1samp(d, 0)
    assert found["effect"] == pytest.approx(d.mean())
    assert found["interval"] == pytest.approx(list(test.confidence_interval(0.95)))


def test_a_difference_is_that_of_the_arms():
    found = judge_record(record(same=asked({"other": 1, "control": -1}, "accuracy", "higher", epsilon=0.02)))
    arm = found["arms"]["other"]
    assert arm["verdict"] == "supported"
    for what in ("effect", "interval", "p", "detectable", "verdict", "trivial", "finite", "n"):
        assert found["contrasts"]["same"][what] == arm[what]


def test_another_metric_has_its_own_direction():
    found = judge_record(record(loss=asked({"one": 1, "control": -1})))["contrasts"]["loss"]
    check(found, LOSSES["control"] - LOSSES["one"])
    assert found["effect"] > 0.05
    up = judge_record(record(loss=asked({"one": 1, "control": -1}, direction="higher")))["contrasts"]["loss"]
    assert up["effect"] == -found["effect"]
    swapped = judge_record(record(loss=asked({"one": -1, "control": 1})))["contrasts"]["loss"]
    assert swapped["effect"] == -found["effect"]


def test_an_interaction_and_a_comparison_with_a_mean():
    found = judge_record(record(joint=asked(BOTH), mean=asked({"both": 1, "one": -0.5, "other": -0.5})))["contrasts"]
    check(found["joint"], -(LOSSES["both"] - LOSSES["one"] - LOSSES["other"] + LOSSES["control"]))
    check(found["mean"], -(LOSSES["both"] - (LOSSES["one"] + LOSSES["other"]) / 2))


def test_logarithms_are_weighed_where_ratios_are_meant():
    found = judge_record(record(joint=asked(BOTH, transform="log")))["contrasts"]["joint"]
    ratio = LOSSES["both"] * LOSSES["control"] / (LOSSES["one"] * LOSSES["other"])
    check(found, -np.log(ratio))
    tenfold = record(joint=asked(BOTH, transform="log"))
    tenfold["secondary"]["loss"] = by_seed({arm: 10 * row for arm, row in LOSSES.items()})
    assert judge_record(tenfold)["contrasts"]["joint"]["effect"] == pytest.approx(found["effect"])
    broken = record(joint=asked(BOTH, transform="log"))
    broken["secondary"]["loss"]["one"]["4"] = 0.0
    with pytest.raises(ValueError, match=r"seed 4 of arm 'one' has the score 0\.0, which has no logarithm"):
        judge_record(broken)


def test_questions_and_arms_pay_for_each_other_and_the_primary_pays_nothing():
    plain, with_questions = record(), record(loss=asked({"one": 1, "control": -1}), joint=asked(BOTH))
    alone, found = judge_record(plain), judge_record(with_questions)
    looks = {
        "other": SCORES["other"] - SCORES["control"],
        "both": SCORES["both"] - SCORES["control"],
        "loss": LOSSES["control"] - LOSSES["one"],
        "joint": LOSSES["one"] + LOSSES["other"] - LOSSES["both"] - LOSSES["control"],
    }
    p = dict(zip(looks, holm([paired_t_p(d) for d in looks.values()]), strict=True))
    assert found["arms"]["other"]["p_holm"] == pytest.approx(p["other"])
    assert found["arms"]["both"]["p_holm"] == pytest.approx(p["both"])
    assert found["contrasts"]["loss"]["p_holm"] == pytest.approx(p["loss"])
    assert found["contrasts"]["joint"]["p_holm"] == pytest.approx(p["joint"])
    assert found["arms"]["other"]["p_holm"] > alone["arms"]["other"]["p_holm"]
    assert found["arms"]["one"] == alone["arms"]["one"]
    assert "contrasts" not in alone


def test_a_weak_answer_does_not_survive_among_many_questions():
    weak = np.array([0.013, 0.021, -0.003, 0.011, 0.017, 0.009, -0.004, 0.012])
    arms = {"one": 1, "control": -1}

    def judged(others):
        made = record(weak=asked(arms, "small"), **{f"idle{i}": asked(arms, f"idle{i}") for i in range(others)})
        flat = by_seed({"control": weak, "one": 0 * weak})
        noise = {
            f"idle{i}": by_seed(dict(zip(("control", "one"), RNG.normal(size=(2, 8)), strict=True))) for i in range(9)
        }
        made["secondary"] = {"small": flat, **noise}
        made["scores"] = {arm: made["scores"][arm] for arm in ("control", "one")}
        return judge_record(made)["contrasts"]["weak"]

    assert judged(0)["verdict"] == "supported"
    assert judged(9)["verdict"] == "inconclusive"


def test_a_lost_seed_and_a_failed_gate_are_not_passed_over():
    lost = record(joint=asked(BOTH), fine=asked({"both": 1, "control": -1}))
    lost["secondary"]["loss"]["other"]["5"] = None
    found = judge_record(lost)["contrasts"]
    assert (found["joint"]["verdict"], found["joint"]["finite"], found["joint"]["effect"]) == ("diverged", 7, None)
    assert found["fine"]["verdict"] == "supported"
    failed = record(joint=asked(BOTH)) | {"gates": {"sanity": {"pass": False, "detail": ""}}}
    assert judge_record(failed)["contrasts"]["joint"]["verdict"] == "invalid"


def test_a_record_is_judged_again_from_itself():
    made = record(joint=asked(BOTH, epsilon=0.1, unit="nats"))
    made |= judge_record(made)
    made = json.loads(json.dumps(made, allow_nan=False))
    assert judge_record(made) == {name: made[name] for name in judge_record(made)}
    made["secondary"]["loss"]["one"]["2"] += 0.01
    assert judge_record(made)["contrasts"] != made["contrasts"]


def test_what_is_not_in_the_record_is_named():
    with pytest.raises(ValueError, match="no 'speed' of arm 'one'"):
        judge_record(record(fast=asked({"one": 1, "control": -1}, "speed")))
    with pytest.raises(ValueError, match="no 'loss' of arm 'none'"):
        judge_contrast(record(), asked({"none": 1, "control": -1}))


def test_an_interaction_of_compare_is_the_contrast():
    found = add_interactions(record(), {"both": ("one", "other")})["interaction"]["both"]
    d = SCORES["both"] - SCORES["one"] - SCORES["other"] + SCORES["control"]
    check(found, d)
    assert found["p"] == judge(d.tolist(), [0.0] * 8, direction="higher").p
    few = record() | {"seeds": [0]}
    alone = add_interactions(few, {"both": ("one", "other")})["interaction"]["both"]
    assert (alone["effect"], alone["interval"], alone["p"]) == (pytest.approx(d[0]), None, None)


# --- in a study


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "b": -0.5}, "sum to 0"),
        ({"a": 0, "b": 0}, "not all be 0"),
        ({"a": 0.1 + 0.2, "b": -0.3}, None),
    ],
)
def test_weights_leave_out_what_all_arms_share(weights, message):
    if message is None:
        asked(weights)
        return
    with pytest.raises(PlanError, match=message):
        asked(weights)


def test_a_metric_that_is_never_measured_ends_the_first_run(tmp_path):
    runs = []

    def listen(jobs):
        return SimpleNamespace(progress=None, finished=lambda job, result: runs.append(job))

    asked_for = dataclasses.replace(
        load("sharpness-aware").study.at("smoke"),
        contrasts={"fast": Contrast(**asked({"aware": 1, "control": -1}, "speed"))},
    )
    with pytest.raises(PlanError, match="no measure gives the metric 'speed'; there is accuracy"):
        run_study(Setting(asked_for, "smoke", (0, 1)), Pool(tmp_path, workers=1), listen)
    assert runs == []


def test_equal_says_how_equal():
    with pytest.raises(PlanError, match="how large a difference is still equal"):
        asked({"a": 1, "b": -1}, direction="equal")


def study(**contrasts):
    return Study(
        plan=lambda: None, arms={"one": ()}, full_arms={"late": ()}, primary="one", metric="loss", direction="lower",
        contrasts={name: Contrast(**asked(weights)) for name, weights in contrasts.items()},
    )  # fmt: skip


def test_a_study_knows_the_arms_that_it_weighs():
    study(fine={"one": 1, "control": -1}, later={"late": 1, "one": -1})
    with pytest.raises(PlanError, match="'wrong' weighs the arm 'lat', which is not there: did you mean 'late'"):
        study(wrong={"lat": 1, "one": -1})
    with pytest.raises(PlanError, match="'late' has the name of an arm"):
        study(late={"one": 1, "control": -1})


def test_only_questions_whose_arms_run_are_asked():
    method = next(m for m in map(load, cards()) if len(m.study.arms) > 1)
    first, second = list(method.study.arms)[:2]
    primary = method.study.primary
    other = first if primary != first else second
    question = Contrast(**asked({other: 1, "control": -1}))
    wide = dataclasses.replace(method.study, contrasts={"mine": question}, reference="control")
    assert set(api._with_arms(wide, [other]).contrasts) == {"mine"}
    assert set(api._with_arms(wide, [primary]).contrasts) == set()


@pytest.mark.parametrize("slug", cards())
def test_committed_evidence_answers_every_question_of_its_study(slug):
    newest = latest(slug, own=False)
    asked = {n: c for n, c in load(slug).study.contrasts.items() if c.weights.keys() <= newest["scores"].keys()}
    answered = newest.get("contrasts", {})
    assert answered.keys() == asked.keys()
    for name, question in asked.items():
        assert answered[name] | dataclasses.asdict(question) == answered[name]


def test_the_page_says_what_was_asked_and_what_came_out():
    made = record(joint=asked(BOTH, epsilon=0.1, unit="nats"), half=asked({"both": 1, "one": -0.5, "other": -0.5}))
    made |= {"slug": None, "unit": "", "claim": {}, "scale": None, "plan": "p", "title": "t"}
    made |= judge_record(made)
    text = study_html(made)
    assert "loss of both + control − one − other, in nats; claimed: lower, ε ±0.1" in text
    assert "loss of both − 0.5 one − 0.5 other; claimed: lower" in text
    effect = made["contrasts"]["joint"]["effect"]
    assert effect > 0
    assert f"+{effect:.3f}"[:5] in text
    assert "Further questions" not in study_html(made | {"contrasts": {}})
