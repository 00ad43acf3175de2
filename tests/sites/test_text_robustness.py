from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vision_toys import ctx_of

from perturbed.core.plan import Facts
from perturbed.core.run import Run
from perturbed.errors import PlanError
from perturbed.inputs.text_attack import Words
from perturbed.measures.text_robustness import (
    TokenGeometry,
    WordAttack,
    displacement_share,
    first_share,
    mean_cosine,
    mean_pooled,
    pooled_states,
    some_texts,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


REAL = torch.tensor([[True] * 5, [True, True, True, False, False]])
STATES = torch.randn(2, 5, 3, generator=rng())


def test_mean_cosine_is_that_of_all_pairs_of_different_real_tokens() -> None:
    for i, length in enumerate((5, 3)):
        pairs = [
            float(torch.cosine_similarity(STATES[i, a], STATES[i, b], dim=0))
            for a in range(length) for b in range(length) if a != b
        ]  # fmt: skip
        assert float(mean_cosine(STATES, REAL)[i]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert mean_cosine(torch.eye(3)[None], torch.ones(1, 3) > 0) == pytest.approx(0)
    assert mean_cosine(torch.ones(1, 3, 4), torch.ones(1, 3) > 0) == pytest.approx(1)


def test_first_share_is_that_of_the_largest_singular_value() -> None:
    for i, length in enumerate((5, 3)):
        squares = torch.linalg.svdvals(STATES[i, :length]).pow(2)
        assert float(first_share(STATES, REAL)[i]) == pytest.approx(float(squares[0] / squares.sum()), abs=1e-6)
    assert first_share(torch.eye(4)[None], torch.ones(1, 4) > 0) == pytest.approx(1 / 4)
    assert first_share(torch.ones(1, 3, 4), torch.ones(1, 3) > 0) == pytest.approx(1)


def test_padding_is_not_pooled_whatever_it_holds() -> None:
    expected = torch.stack([STATES[0].mean(0), STATES[1, :3].mean(0)])
    torch.testing.assert_close(mean_pooled(STATES.masked_fill(~REAL.unsqueeze(-1), torch.nan), REAL), expected)
    assert not torch.allclose(STATES.mean(1), expected)


def test_displacement_along_the_first_direction() -> None:
    states = torch.tensor([[[3.0, 0.0], [3.0, 0.1], [3.0, -0.1]]])
    whole = torch.ones(1, 3) > 0
    along, across = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for shift, share in ((along, 1.0), (across, 0.0), (along + across, 0.5), (3 * along - across, 0.9)):
        assert float(displacement_share(states, whole, states + shift, whole)[0]) == pytest.approx(share, abs=1e-6)
    longer = torch.cat([states + along, torch.full((1, 2, 2), 99.0)], 1)  # padded to another length
    mask = torch.tensor([[True, True, True, False, False]])
    assert float(displacement_share(states, whole, longer, mask)[0]) == pytest.approx(1.0, abs=1e-6)


VOCABULARY = {
    word: i for i, word in enumerate(["<pad>", "good", "fine", "fair", "bad", "poor", "plot", "film", "gdoo"])
}
WORTH = torch.tensor([0.0, 2.0, 0.5, -1.0, -2.0, -1.0, 0.0, 0.0, -3.0])


class Bag(nn.Module):
    """A classifier of two classes by the summed worth of words, with token states to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding.from_pretrained(torch.stack([WORTH, torch.ones(len(WORTH))], 1))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        worth = (self.encoder(ids)[..., 0] * mask).sum(1)
        return torch.stack([-worth, worth], 1)


def encode(texts: Sequence[Words]) -> dict[str, Tensor]:
    longest = max(map(len, texts))
    ids = [[VOCABULARY[w] for w in text] + [0] * (longest - len(text)) for text in texts]
    mask = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def substitutes(word: str) -> Words:
    return {"good": ("fine", "fair"), "fine": ("fair",), "poor": ("fair",)}.get(word, ())


TEXTS: tuple[tuple[Words, int], ...] = (
    (("good", "film"), 1),  # 2, and -1 with fair: falls by one word
    (("good", "good", "film"), 1),  # 4, and 1 with one word replaced, which is all that a fifth of 3 allows
    (("bad", "plot"), 0),  # nothing to replace: stands
    (("fair", "plot"), 1),  # wrong already
)


def made(texts: Any = TEXTS, **more: Any) -> Run:
    ctx = ctx_of(stage="")
    source = None if texts is None else lambda: texts
    facts = {"texts": source, "encode": encode, "substitutes": substitutes, **more}
    ctx.facts = Facts(modality="language", target="class", more={k: v for k, v in facts.items() if v is not None})
    model = Bag().eval()
    ctx.model = model
    return Run(model, lambda batch: model(batch["input_ids"], batch["attention_mask"]), {}, {}, ctx)


def test_word_attack_counts_what_stands_what_falls_and_what_was_wrong() -> None:
    found = WordAttack(texts=4, share=0.2, where="encoder")(made())
    assert found["accuracy_before"] == pytest.approx(3 / 4)
    assert found["accuracy_attacked"] == pytest.approx(2 / 4)
    assert found["attack_success"] == pytest.approx(1 / 3)
    assert found["words_changed"] == 1
    assert found["queries"] == pytest.approx(((1 + 1 + 2) + (1 + 2 + 2) + 1) / 3)
    assert 0 <= found["displacement_share"] <= 1
    wider = WordAttack(texts=4, share=0.6)(made())
    assert wider["accuracy_attacked"] == pytest.approx(1 / 4)
    assert wider["words_changed"] == pytest.approx((1 + 2) / 2)
    assert "displacement_share" not in wider


def test_the_attack_asks_the_predictor_as_a_whole_and_not_the_model_within() -> None:
    """What falls for the bare model stands where a defence, outside of it, reads one word for another."""
    bare = made(texts=TEXTS[:1])

    def defended(batch: Any) -> Tensor:
        ids = batch["input_ids"]
        return bare.predict({**batch, "input_ids": ids.masked_fill(ids == VOCABULARY["fair"], VOCABULARY["fine"])})

    whole = dataclasses.replace(bare, predict=defended)
    assert WordAttack(texts=1)(bare)["accuracy_attacked"] == 0
    assert WordAttack(texts=1)(whole)["accuracy_attacked"] == 1


def test_no_budget_and_no_substitutes_leave_the_clean_accuracy() -> None:
    for attack, facts in ((WordAttack(texts=4, share=0.0), {}), (WordAttack(texts=4), {"substitutes": lambda w: ()})):
        found = attack(made(**facts))
        assert found["accuracy_attacked"] == found["accuracy_before"] == 0.75
        assert found["attack_success"] == 0
        assert math.isnan(found["words_changed"])


def test_what_is_not_attacked_or_does_not_fall_is_not_a_number() -> None:
    found = WordAttack(texts=4, where="encoder")(made(texts=TEXTS[3:]))
    assert found["accuracy_attacked"] == found["accuracy_before"] == 0
    assert math.isnan(found["attack_success"])
    assert math.isnan(found["displacement_share"])


def test_letters_are_exchanged_where_that_is_asked_for() -> None:
    found = WordAttack(texts=1, by="swaps", suffix="_swaps")(made(texts=((("good",), 1),), substitutes=None))
    assert found["accuracy_attacked_swaps"] == 1  # "good" has equal letters inside


def test_texts_are_drawn_by_the_seed_alone() -> None:
    many = tuple(((w,), 1) for w in VOCABULARY)
    run = made(texts=many)
    one = some_texts(run, "attacked", 4)
    assert one == some_texts(run, "attacked", 4)
    assert some_texts(run, "attacked", 6)[:4] == one
    assert len(set(one)) == 4
    run.ctx.streams.seed = 1
    assert some_texts(run, "attacked", 4) != one


def test_geometry_reads_the_states_that_are_pooled_after_features() -> None:
    run = made(texts=((("good", "film"), 1), (("bad", "bad", "poor"), 0)))
    found = TokenGeometry(texts=2, where="encoder")(run)
    states, real = pooled_states(run, [("good", "film"), ("bad", "bad", "poor")], "encoder")
    assert states.shape == (2, 3, 2)
    assert real.tolist() == [[True, True, False], [True, True, True]]
    assert found["mean_cosine"] == pytest.approx(float(mean_cosine(states, real).mean()))
    assert found["first_share"] == pytest.approx(float(first_share(states, real).mean()))
    handle = run.model.encoder.register_forward_hook(lambda m, a, out: out * torch.tensor([1.0, 0.0]))
    assert TokenGeometry(texts=2, where="encoder")(run)["first_share"] == pytest.approx(1)
    handle.remove()
    assert not run.model.encoder._forward_hooks  # nothing of the measure's own is left


def test_missing_facts_and_globs_are_named() -> None:
    for fact in ("texts", "encode", "substitutes"):
        with pytest.raises(PlanError, match=fact):
            WordAttack(texts=1)(made(**{fact: None}))
    with pytest.raises(PlanError, match="matches 0 modules"):
        TokenGeometry(where="decoder")(made())
    with pytest.raises(PlanError, match="matches 2 modules"):
        TokenGeometry(where="*")(made())
    with pytest.raises(PlanError, match=r"no by='swap'.*swaps"):
        WordAttack(by="swap")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="share"):
        dataclasses.replace(WordAttack(), share=1.5)
