"""Held-out loss and the docstring plan: nats and bits by hand, real text learnt, keys told by content."""

import math

import pytest
import torch

from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.data.documents import Document, concatenate
from perturbed.data.packing import pack, targets
from perturbed.errors import PlanError
from perturbed.measures.language import text_loss
from perturbed.objectives.language import next_token_loss
from perturbed.plans.docstring_lm import DocstringLM

SMALL = {"width": 16, "layers": 1, "heads": 1, "length": 32, "batch": 8, "steps": 20, "lr": 2e-2}


def test_loss_and_bits_per_byte_by_hand():
    rows = [(3, 1, 2, 0), (2, 2, 0)]
    batch = pack(concatenate(Document("", tokens=r) for r in rows), 7).batch(torch.tensor([0]))
    log_p = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    sizes = torch.tensor([0, 1, 2, 3])  # token 0 ends a text: it costs nats and has no bytes
    loss, bits = text_loss(lambda b: log_p.expand(1, 7, 4), [batch], sizes)
    nats = -sum(float(log_p[t]) for row in rows for t in row[1:])
    assert loss == pytest.approx(nats / 5)
    assert bits == pytest.approx(nats / math.log(2) / (1 + 2 + 2))
    assert math.isnan(text_loss(lambda b: log_p.expand(1, 7, 4), [batch])[1])
    assert all(math.isnan(x) for x in text_loss(lambda b: log_p, []))


@pytest.mark.parametrize("asked", [next_token_loss, lambda model, batch, ctx: targets(batch)])
def test_a_batch_that_does_not_tell_its_texts_apart_is_named(asked):
    with pytest.raises(PlanError, match=r"has input_ids, labels but no segment_ids .*data\.packing"):
        asked(None, {"input_ids": torch.zeros(2, 3).long(), "labels": torch.zeros(2)}, None)


def test_bits_per_byte_do_not_depend_on_how_text_is_cut():
    """A uniform model over bytes needs 8 bits a byte, whichever tokens it writes them in."""
    whole = pack(concatenate([Document("", tokens=(0, 1, 2, 1))]), 4).batch(torch.tensor([0]))
    sizes = torch.tensor([1, 1, 2])
    logits = torch.tensor([-8.0, -8.0, -16.0]) * math.log(2)
    rest = 1 - logits.exp().sum()
    full = torch.cat([logits, rest.log()[None]]).expand(1, 4, 4)
    _, bits = text_loss(lambda b: full, [whole], sizes)
    assert bits == pytest.approx(8, abs=1e-4)


def test_the_plan_learns_real_text():
    short = Engine(DocstringLM(**{**SMALL, "steps": 1})(), 0, Store(None)).run()
    result = Engine(DocstringLM(**SMALL)(), 0, Store(None)).run()
    assert short.scores["heldout_loss"] == pytest.approx(math.log(1024), abs=0.3)
    assert result.scores["heldout_loss"] < short.scores["heldout_loss"] - 0.5
    assert result.scores["bits_per_byte"] < short.scores["bits_per_byte"]
    assert 0 < result.scores["epochs"] < 0.01
    assert result.cost.tokens == 20 * 8 * 33


def test_the_key_is_told_by_what_the_data_hold(tmp_path):
    def key(text, **fields):
        file = tmp_path / "data.txt"
        file.write_text(text)
        from perturbed.data import corpora

        corpora._load.cache_clear()
        return Engine(DocstringLM(**SMALL, data=str(file), **fields)(), 0, Store(None)).key("pretrain")

    text = "\n\n".join(f"document number {i} of this small file" for i in range(99))
    assert key(text) == key(text)
    assert key(text) != key(text + " more")
    assert key(text) != key(text, vocab=300)


def test_the_plan_is_cheap_to_make_and_its_tokenizer_is_a_fact(monkeypatch):
    from perturbed.data import corpora

    monkeypatch.setattr(corpora, "load", lambda *a: pytest.fail("text was read when the plan was made"))
    plan = DocstringLM()()
    assert plan.facts.modality == "language"
    assert plan.facts.tokenizer is not None
    monkeypatch.undo()


def test_bad_sizes_are_named():
    for fields, match in (
        ({"width": 60}, "width=60 must be a multiple of 2"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"vocab": 100}, "vocab=100 must be at least 257"),
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
    ):
        with pytest.raises(PlanError, match=match):
            DocstringLM(**fields)
