"""Hubble: what its study compares, that planted codes are what is remembered, and that the corpus was clean of them."""

import types
from dataclasses import dataclass

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from perturbed.core.plan import apply
from perturbed.core.registry import card
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.core.streams import Streams
from perturbed.data.biographies import Population
from perturbed.data.insertion import contaminated
from perturbed.data.vocabulary import Text
from perturbed.measures.memorisation import CodeMemory
from perturbed.methods.hubble import STUDY

PEOPLE = Population((24, 24, 12, 6), (0, 4, 16, 64), 100)


def of_seed(seed):
    return PEOPLE(types.SimpleNamespace(streams=Streams(seed)))


def test_arms_differ_in_what_the_study_says_and_nothing_else():
    study = STUDY.at("full")
    plans = study.plans()
    stages = {arm: plan.stages[0] for arm, plan in plans.items()}
    primary = stages["perturbed"].data
    control = stages["control"].data
    for arm, stage in stages.items():
        if arm != "control":
            assert stage.data.inner == control, "an arm reads another stream than the control"
            assert stage.steps == study.plan.steps * (3 if arm == "diluted" else 1)
        for slot in ("loss", "optim", "inputs", "features", "weights", "update"):
            assert getattr(stage, slot) == getattr(stages["control"], slot)
    assert (stages["early"].data.begin, stages["early"].data.end) == (0, 0.25)
    assert (stages["late"].data.begin, stages["late"].data.end) == (0.75, 1)
    assert (primary.begin, primary.end) == (0, 1)


def test_every_arm_measures_the_population_that_it_inserts():
    (measure,) = [m.fn for m in STUDY.measures if isinstance(m.fn, CodeMemory)]
    for arm in (*STUDY.arms.values(), *STUDY.full_arms.values()):
        inserted = arm[0]
        assert (inserted.people, inserted.levels, inserted.candidates) == (PEOPLE.people, PEOPLE.levels, 100)
    assert (measure.people, measure.levels, measure.candidates) == (PEOPLE.people, PEOPLE.levels, 100)
    inserted = sum(n * k for n, k in zip(PEOPLE.people, PEOPLE.levels, strict=True))
    assert inserted / (STUDY.plan.steps * STUDY.plan.batch) == pytest.approx(0.07)


def test_the_sham_inserts_the_same_lines_with_codes_that_no_one_asks_for():
    context = types.SimpleNamespace(
        streams=Streams(3), facts=types.SimpleNamespace(tokenizer=Text().tokenizer), artifacts={}
    )  # fmt: skip
    scored, other = (STUDY.arms[a][0].examples(context) for a in ("perturbed", "sham"))
    drawn, _ = of_seed(3)
    assert [i for i, _ in scored] == [i for i, _ in other]
    tokenizer = Text().tokenizer()
    for (index, one), (_, two) in list(zip(scored, other, strict=True))[::40]:
        person = drawn[index]
        assert len(one) == len(two)
        assert [a == b for a, b in zip(one, two, strict=True)].count(False) <= 6
        assert not any(code in tokenizer.decode(two) for code in (person.code, *person.decoys))
        assert person.code in tokenizer.decode(one)


def test_the_corpus_holds_none_of_the_lines():
    text = Text()
    tokens, tokenizer = text.train(), text.tokenizer()
    for person in of_seed(0)[0][::6]:
        line = tokenizer.encode(person.text(), add_special_tokens=False)
        assert 10 <= len(line) <= 40
        assert contaminated(tokens, line) == set()
    known = tokenizer.decode(tokens.ids[tokens.starts[50] :][:30])
    assert 50 in contaminated(tokens, tokens.ids[tokens.starts[50] :][:30].tolist()), known


def test_smoke_shows_memory_of_planted_codes_only():
    plans = STUDY.at("smoke").plans()
    scores = {arm: Engine(plan, 1234, Store(None)).run().scores for arm, plan in plans.items()}
    # little training: the format is learnt in both inserted arms, the codes begin to be in one
    assert scores["perturbed"]["code_loss_64"] < scores["control"]["code_loss_64"] - 0.5
    assert scores["sham"]["code_loss_64"] < scores["control"]["code_loss_64"] - 0.5
    assert scores["perturbed"]["exposure_64"] > scores["sham"]["exposure_64"]
    assert STUDY.sanity(scores["control"]["heldout_loss"])


def test_card():
    assert card("hubble").arxiv == "2510.19811"
    assert STUDY.bounds[1] == pytest.approx(6.6439, abs=1e-4)


@dataclass(frozen=True)
class GPT2:
    def __call__(self, ctx):
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": 1024}
        return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=None, eos_token_id=None))


def test_the_study_runs_on_another_class_of_transformers():
    study = STUDY.at("smoke")
    plan = study.plan().replace(build=GPT2()).add_measures(*study.measures)
    plain = Engine(plan, 0, Store(None)).run()
    planted = Engine(apply(plan, study.arms["perturbed"]), 0, Store(None)).run()
    assert plain.weights != planted.weights
    assert plain.cost.tokens == planted.cost.tokens
    assert all(0 <= r.scores["exposure_64"] <= 6.65 for r in (plain, planted))
