"""SLTrain: arms of equal parameters that differ in what the study says, and what of them is stored."""

import dataclasses

import pytest
import torch

from perturbed.core.plan import apply
from perturbed.core.registry import card
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.methods.sltrain import STUDY
from perturbed.weights.sparse_low_rank import SparseLowRank, SparseLowRankLinear, merged


def at_start(arm, study=STUDY):
    """The model of an arm before its first step."""
    plan = study.at("full").plans()[arm]
    short = plan.replace(stages=(dataclasses.replace(plan.stages[0], steps=0),), measures=())
    return Engine(short, 1000, Store(None)).model_at("pretrain")


def block(model):
    """Trained parameters of the layers that are rewritten, over the number of blocks."""
    layers = [m for n, m in model.named_modules() if ".layers." in n and hasattr(m, "in_features")]
    trained = sum(p.numel() for m in layers for p in m.parameters() if p.requires_grad)
    return trained / len(model.model.layers)


def test_arms_train_as_many_numbers_as_the_docstring_says():
    arms = ("control", *STUDY.arms)
    sizes = {arm: block(at_start(arm)) for arm in arms}
    assert sizes["control"] == 4 * 96 * 96 + 3 * 96 * 256 == 110_592
    assert sizes["low_rank"] == sizes["low_rank_small"] == sizes["frozen"] == 4 * 14 * 192 + 3 * 14 * 352 == 25_536
    assert sizes["sltrain"] == 4 * (12 * 192 + 276) + 3 * (12 * 352 + 737) == 25_203
    assert sizes["sltrain"] < sizes["low_rank"] < 1.02 * sizes["sltrain"], "the reference is not the smaller"
    assert sizes["sparse"] == pytest.approx(sizes["sltrain"], rel=2e-3)


def test_arms_of_the_full_record_are_what_they_are_called():
    primary, full = STUDY.arms["sltrain"][0], STUDY.full_arms
    changed = {"same_rank": {"density": 0.0}, "denser": {"density": 0.1}, "wider": {"rank": 24}}
    assert {arm: full[arm][0] for arm in changed} == {a: dataclasses.replace(primary, **f) for a, f in changed.items()}
    assert full["paper_start"][0] == dataclasses.replace(primary, rank=0, density=1.0)
    assert (primary.rank, primary.density, primary.scale, primary.start) == (12, 0.03, 0.25, "paper")
    assert STUDY.arms["low_rank"][0] == SparseLowRank(rank=14, density=0.0, scale=1.0)
    for arm, reference in {**STUDY.references, "frozen": "sltrain"}.items():
        assert STUDY.at("full").arms[arm][1] == STUDY.arms[reference][1], "the rate of the arm that it varies"


def test_every_layer_of_the_blocks_is_rewritten_and_no_other():
    ours = [n for n, m in at_start("sltrain").named_modules() if isinstance(m, SparseLowRankLinear)]
    assert len(ours) == 2 * 7
    assert all(".layers." in n for n in ours)


def test_arms_differ_in_the_weights_and_the_rate_alone():
    plans = STUDY.at("full").plans()
    control = plans["control"].stages[0]
    for arm, plan in plans.items():
        (stage,) = plan.stages
        for slot in ("steps", "data", "loss", "inputs", "features", "update", "build"):
            assert getattr(stage, slot) == getattr(control, slot), arm
    treated, sham = STUDY.arms["sltrain"][0], STUDY.arms["frozen"][0]
    assert treated.train_sparse
    assert not sham.train_sparse
    assert (sham.density, sham.scale, sham.where) == (treated.density, treated.scale, treated.where)
    assert sham.rank == STUDY.arms["low_rank"][0].rank


def test_the_sham_has_the_same_entries_at_the_same_places():
    one, two = at_start("sltrain").state_dict(), at_start("frozen").state_dict()
    names = [n for n in one if n.endswith(("support", "values"))]
    assert len(names) == 2 * 14
    assert all(one[n].equal(two[n]) for n in names)


def test_all_entries_and_no_product_is_the_control_bit_for_bit():
    plan = STUDY.at("smoke").plans()["control"]
    control = Engine(plan, 1000, Store(None)).run()
    whole = SparseLowRank(rank=0, density=1.0, start="layer")
    same = Engine(apply(plan, [whole]), 1000, Store(None)).run()
    assert same.curves["loss"] == control.curves["loss"]
    assert same.scores == control.scores
    other = Engine(apply(plan, [dataclasses.replace(whole, start="paper")]), 1000, Store(None)).run()
    assert other.curves["loss"] != control.curves["loss"]


def test_the_reference_begins_with_weights_of_the_size_of_sltrains():
    def size(arm):
        layers = [m for m in at_start(arm).modules() if isinstance(m, SparseLowRankLinear)]
        return float(torch.cat([m.weight.detach().flatten() for m in layers]).std())

    assert size("low_rank_small") == pytest.approx(size("sltrain"), rel=0.25)
    assert size("low_rank") > 3 * size("sltrain")


def test_smoke_learns_stores_no_dense_weight_and_merges_with_identical_logits():
    plans = STUDY.at("smoke").plans()
    engines = {arm: Engine(plan, 1000, Store(None)) for arm, plan in plans.items()}
    scores = {arm: engine.run().scores for arm, engine in engines.items()}
    assert all(s["heldout_loss"] < 6.7 for s in scores.values())  # guessing evenly gives 6.93
    assert scores["sltrain"]["parameters_trained"] < scores["control"]["parameters_trained"]
    assert scores["frozen"]["parameters_trained"] < scores["frozen"]["parameters_stored"]
    assert scores["low_rank"]["rank_share"] == pytest.approx(14 / 32)
    assert scores["low_rank_small"]["rank_share"] == pytest.approx(14 / 32)
    assert scores["sltrain"]["rank_share"] > 14 / 32

    tree = engines["sltrain"].snapshot("pretrain")
    saved = {n: t for n, t in tree["model"].items() if ".layers." in n and "norm" not in n}
    assert {n.rpartition(".")[2] for n in saved} == {"up", "down", "values", "support"}
    dense = engines["control"].model_at("init").eval()  # the plain class, which knows nothing of the layers
    whole = {n.removesuffix(".weight"): p.numel() for n, p in dense.named_parameters()}
    assert all(t.numel() < whole[n.rpartition(".")[0]] for n, t in saved.items())
    moments = [m["exp_avg"].numel() for m in tree["optim"]["state"].values()]
    assert sum(moments) == scores["sltrain"]["parameters_trained"]

    model = engines["sltrain"].model_at("pretrain").eval()
    ids = torch.arange(60).view(2, 30)
    assert not torch.equal(dense(ids).logits, model(ids).logits)
    dense.load_state_dict(merged(model).state_dict())
    assert torch.equal(dense(ids).logits, model(ids).logits)


def test_card():
    assert card("sltrain").arxiv == "2406.02214"
    assert (STUDY.primary, STUDY.reference, STUDY.sham) == ("sltrain", "low_rank_small", "frozen")
    assert (STUDY.metric, STUDY.direction) == ("heldout_loss", "lower")
