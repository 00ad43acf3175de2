"""The plan: its stages draw what they say, share nothing with what is measured, and it learns."""

import dataclasses

import pytest
import torch

from perturbed.core.plan import PlanError
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.data.packing import targets
from perturbed.data.worked_solutions import VOCABULARY, Chains, tokenizer
from perturbed.plans.arithmetic_reasoning import ArithmeticReasoning

TINY = ArithmeticReasoning(
    width=16, layers=1, heads=2, pretrain_problems=64, pretrain_batch=16, pretrain_steps=4, problems=16, batch=8,
    steps=4, held_out=8,
)  # fmt: skip


def test_stages_draw_small_and_large_sums_and_learn_solutions_alone():
    plan = TINY()
    assert [s.name for s in plan.stages] == ["pretrain", "finetune"]
    first, second = (s.data.chains for s in plan.stages)
    assert (first, second) == (Chains(2, 3, 20), Chains(3, 3, 99))
    assert plan.facts.get("chains") == second
    engine = Engine(plan, 0, Store(None))
    batch = next(plan.stage("finetune").data(engine._ctx(plan.stage("finetune"), 4)))
    question_ends = (batch["input_ids"] == tokenizer().get_vocab()["?"]).int().argmax(1)
    learnt = targets(batch)
    assert torch.equal(learnt.int().argmax(1), question_ends)  # the first target follows the question mark
    assert torch.equal(learnt.sum(1), (batch["segment_ids"] == 0).sum(1) - question_ends - 1)


def test_facts_are_those_of_model_and_tokenizer():
    plan, engine = TINY(), Engine(TINY(), 0, Store(None))
    model = engine.model_at("init")
    assert model.config.vocab_size == plan.facts.classes == len(VOCABULARY) == len(plan.facts.tokenizer())


def test_fine_tuning_alone_changes_with_the_seeds_problems_and_pre_training_is_shared():
    store = Store(None)
    keys = [Engine(dataclasses.replace(TINY, lr=lr)(), 0, store).key("pretrain") for lr in (1e-3, 2e-3)]
    assert keys[0] == keys[1]
    keys = [Engine(dataclasses.replace(TINY, lr=lr)(), 0, store).key("finetune") for lr in (1e-3, 2e-3)]
    assert keys[0] != keys[1]


def test_a_run_gives_scores_in_range_and_comes_out_the_same_again():
    first, second = (Engine(TINY(), 5, Store(None)).run() for _ in range(2))
    assert first.scores == second.scores
    assert set(first.scores) == {"accuracy", "flawless", "solution_loss"}
    assert 0 <= first.scores["flawless"] <= first.scores["accuracy"] <= 1
    assert first.weights == second.weights


def test_it_learns_sums_of_one_kind_in_a_few_seconds():
    plan = dataclasses.replace(
        TINY, width=32, layers=2, pretrain_sums=1, sums=1, pretrain_largest=9, largest=9, pretrain_problems=60,
        pretrain_batch=30, pretrain_steps=150, problems=32, pretrain_lr=1e-2, held_out=16,
    )  # fmt: skip
    curve = dict(Engine(plan(), 1000, Store(None)).run().curves["loss"])
    assert curve[0] > 2.5
    assert curve[149] < 0.3


@pytest.mark.parametrize(
    "wrong", [{"width": 12}, {"layers": 0}, {"held_out": 0}, {"lr": 0.0}, {"pretrain_lr": -1.0}, {"sums": 0}]
)
def test_sizes_that_make_no_plan_are_refused(wrong):
    with pytest.raises(PlanError):
        dataclasses.replace(ArithmeticReasoning(), **wrong)()
