"""Memorisation: packed scoring against single sequences, exposure against its definition, chance where ignorant."""

import itertools
import math
import types

import pytest
import torch
from sklearn.metrics import roc_auc_score

from perturbed.core.run import threads
from perturbed.core.streams import Streams
from perturbed.data.biographies import Population, draw_biographies
from perturbed.data.vocabulary import Text
from perturbed.measures.memorisation import (
    CodeMemory,
    chance_exposure,
    continuation_logits,
    continuation_losses,
    exposure,
    extracted,
    in_tokens,
    membership_auc,
    pack_continuations,
)
from perturbed.objectives.language import causal_logits
from perturbed.plans.docstring_lm import Llama

WIDTH = {"width": 16, "layers": 2, "heads": 2, "vocab": 1024, "length": 64}


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def model_and_predict():
    torch.manual_seed(0)
    model = Llama(**WIDTH)(None).eval()
    for p in model.parameters():
        p.data.mul_(4)  # a new model's predictions hardly differ
    return model, lambda batch: causal_logits(model, batch).detach()


@pytest.mark.parametrize("count", [1, 24, 25, 60])
def test_packed_scoring_equals_one_sequence_at_a_time(count):
    model, predict = model_and_predict()
    g = torch.Generator().manual_seed(1)
    prefix = torch.randint(1024, (17,), generator=g).tolist()
    candidates = torch.randint(1024, (count, 6), generator=g)
    logits = continuation_logits(predict, prefix, candidates)
    losses = continuation_losses(logits, candidates)
    for k, candidate in enumerate(candidates):
        whole = torch.cat([torch.tensor(prefix), candidate])[None]
        with torch.no_grad():
            log_p = model(input_ids=whole).logits[0].log_softmax(-1)
        alone = [-float(log_p[16 + i, candidate[i]]) for i in range(6)]
        assert losses[k].tolist() == pytest.approx(alone, abs=1e-4)
    if count == 60:
        batch = pack_continuations(prefix, candidates[None])
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        wrong = predict(batch)[0, 17:].view(60, 5, -1)
        assert (wrong - logits[:, 1:]).abs().max() > 1e-2, "the test would not notice positions that run on"


def test_exposure_by_its_definition():
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        losses = torch.rand(20, generator=g)
        true = int(torch.randint(20, (), generator=g))
        rank = sorted(losses.tolist()).index(float(losses[true])) + 1
        assert exposure(losses, true) == pytest.approx(math.log2(20 / rank))
    assert exposure(torch.tensor([0.1, 1, 2, 3])) == 2
    assert exposure(torch.tensor([9.0, 1, 2, 3])) == 0


def test_ties_neither_reward_nor_punish():
    assert exposure(torch.ones(100)) == pytest.approx(math.log2(100 / 50.5))
    assert exposure(torch.tensor([1.0, 1.0, 0.0, 2.0])) == pytest.approx(math.log2(4 / 2.5))


def test_chance_is_the_mean_over_ranks():
    for n in (2, 10, 100):
        mean = sum(math.log2(n) - math.log2(r) for r in range(1, n + 1)) / n
        assert chance_exposure(n) == pytest.approx(mean)
    assert chance_exposure(100) == pytest.approx(1.40, abs=0.005)


def test_membership_is_the_area_under_the_roc_curve():
    g = torch.Generator().manual_seed(0)
    members, others = torch.randint(8, (30,), generator=g).double(), torch.randint(9, (40,), generator=g).double()
    labels, scores = [1] * 30 + [0] * 40, torch.cat([-members, -others])
    assert membership_auc(members, others) == pytest.approx(roc_auc_score(labels, scores))
    assert membership_auc(torch.zeros(3), torch.ones(2)) == 1
    assert math.isnan(membership_auc(torch.zeros(0), torch.ones(2)))


def test_extraction_is_what_greedy_decoding_gives():
    model, predict = model_and_predict()
    prefix = [5, 6, 7, 8]
    path = list(prefix)
    for _ in range(4):
        with torch.no_grad():
            path.append(int(model(input_ids=torch.tensor([path])).logits[0, -1].argmax()))
    decoded = torch.tensor(path[4:])
    for flips in itertools.product((0, 1), repeat=4):
        other = (decoded + torch.tensor(flips)) % 1024
        logits = continuation_logits(predict, prefix, other[None])[0]
        assert extracted(logits, other) == (sum(flips) == 0)


def run_of(predict, seed=0):
    text = Text()
    streams = Streams(seed)
    facts = types.SimpleNamespace(tokenizer=text.tokenizer)
    ctx = types.SimpleNamespace(streams=streams, facts=facts, artifacts={})
    return types.SimpleNamespace(predict=predict, ctx=ctx, artifacts=ctx.artifacts)


def oracle(known):
    """A predictor that has learnt the codes of some lines by heart and knows nothing else."""
    tokenizer = Text().tokenizer()
    rows = {}
    for person in known:
        start, codes = in_tokens(tokenizer, person.prefix, (person.code,))
        rows[tuple(start)] = codes[0].tolist()

    def predict(batch):
        ids, places = batch["input_ids"], batch["position_ids"]
        logits = torch.rand(*ids.shape, 1024, generator=torch.Generator().manual_seed(int(ids.sum()))) * 0.1
        size = int((places[0] == torch.arange(ids.shape[1])).sum()) - 5
        code = rows.get(tuple(ids[0, :size].tolist()))
        if code is not None:
            for row, place in itertools.product(range(len(ids)), range(size - 1, ids.shape[1])):
                logits[row, place, code[int(places[row, place]) - size + 1]] += 20
        return logits

    return predict


def test_what_is_known_by_heart_is_exposed_extracted_and_told_from_the_rest():
    measure = CodeMemory(people=(12, 4, 3), levels=(0, 4, 64), candidates=50)
    drawn, groups = Population(measure.people, measure.levels, measure.candidates)(run_of(None).ctx)
    known = [b for b, g in zip(drawn, groups, strict=True) if g == 2]
    scores = measure(run_of(oracle(known)))
    assert scores["exposure_64"] == pytest.approx(math.log2(50))
    assert scores["extracted_64"] == scores["membership_64"] == 1
    assert scores["code_loss_64"] < 1e-3
    assert scores["extracted_0"] == scores["extracted_4"] == 0
    assert scores["code_loss_0"] == pytest.approx(math.log(1024), abs=0.1)
    assert scores["exposure_0"] < 3
    assert set(scores) == {f"{m}_{k}" for m in ("exposure", "code_loss", "extracted") for k in (0, 4, 64)} | {
        "membership_4", "membership_64",
    }  # fmt: skip


def test_an_ignorant_model_is_at_chance():
    _, predict = model_and_predict()
    scores = CodeMemory(people=(80,), levels=(0,))(run_of(predict))
    spread = math.sqrt(sum((math.log2(100 / r) - chance_exposure(100)) ** 2 for r in range(1, 101)) / 100)
    assert scores["exposure_0"] == pytest.approx(chance_exposure(100), abs=4 * spread / math.sqrt(80))


def test_codes_share_their_prefix_in_tokens_or_say_so():
    tokenizer = Text().tokenizer()
    person = draw_biographies(1, 3, torch.Generator().manual_seed(0))[0]
    start, codes = in_tokens(tokenizer, person.prefix, (person.code, *person.decoys))
    whole = tokenizer.encode(person.text(), add_special_tokens=False)
    assert whole[: len(start) + 6] == [*start, *codes[0].tolist()]
    assert codes.shape == (3, 6)
    with pytest.raises(ValueError, match="differ in tokens"):
        in_tokens(tokenizer, "code ", ("123", "1234"))
    with pytest.raises(ValueError, match="merges the prefix"):
        in_tokens(tokenizer, "the para", ("meters",))
