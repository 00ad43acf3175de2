from __future__ import annotations

import dataclasses
from typing import Any

import own_models
import pytest
import torch
from torch import Tensor

from perturbed.core.plan import Plan, apply
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.errors import PlanError
from perturbed.features.components import (
    ComponentRemoval,
    CorpusComponentRemoval,
    FirstTokenOnly,
    principal_directions,
    random_directions,
    without_components,
    without_directions,
    zero_padding,
)

LENGTHS = (7, 4, 2, 1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """States of four texts that share an offset, as those of encoders do, and which of their tokens are real."""
    states = torch.randn(len(LENGTHS), max(LENGTHS), 5, generator=rng(seed), dtype=torch.float64) + 1
    return states.to(dtype), torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def by_svd(states: Tensor, length: int, k: int, which: str, center: bool) -> Tensor:
    """One text by NumPy's words: X - X V_k^T V_k, with V of the (centred) matrix of its real tokens."""
    x = states[:length]
    if length <= k:
        return x
    rows = torch.linalg.svd(x - x.mean(0) if center else x, full_matrices=False).Vh
    rows = rows[:k] if which == "first" else rows[: min(length, len(rows))][-k:]
    return x - x @ rows.T @ rows if k else x


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_equals_the_singular_value_decomposition_of_each_text(k: int, center: bool, differentiate: bool) -> None:
    states, real = draw()
    found = without_components(states, real, k, center=center, differentiate=differentiate)
    for i, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[i, :length], by_svd(states[i], length, k, "first", center))


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_the_last_directions_are_the_smallest_among_real_tokens(k: int, differentiate: bool) -> None:
    states, real = draw()
    found = without_components(states, real, k, which="last", differentiate=differentiate)
    for i, length in list(enumerate(LENGTHS))[1:]:  # the first has more tokens than its width: none is the smallest
        torch.testing.assert_close(found[i, :length], by_svd(states[i], length, k, "last", False))
    assert torch.linalg.matrix_rank(found[1, :4], rtol=1e-9) == 4 - k


def test_a_text_of_few_tokens_is_left_as_it_is_where_the_formula_would_leave_nothing() -> None:
    states, real = draw()
    for differentiate in (False, True):
        found = without_components(states, real, 1, differentiate=differentiate)
        assert torch.equal(found[3, :1], states[3, :1])
        found = without_components(states, real, 9, differentiate=differentiate)
        assert torch.equal(found, states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("which", ["first", "last"])
def test_no_components_is_the_identity_bit_for_bit_with_its_gradient(dtype: torch.dtype, which: Any) -> None:
    states, real = draw(dtype=dtype)
    for center, differentiate in ((False, False), (False, True), (True, True)):
        x = states.clone().requires_grad_()
        out = without_components(x, real, 0, which=which, center=center, differentiate=differentiate)
        out.sum().backward()
        assert torch.equal(out, states)
        assert torch.equal(x.grad, torch.ones_like(x))


def test_padding_has_no_part_whatever_it_holds_but_would_if_it_were_left_in() -> None:
    states, real = draw()
    other = states.masked_fill(~real.unsqueeze(-1), torch.nan)
    for differentiate in (False, True):
        one, two = (without_components(s, real, 1, differentiate=differentiate) for s in (states, other))
        assert torch.equal(one[real], two[real])
    naive = without_components(states, torch.ones_like(real), 1)
    assert not torch.allclose(naive[1, :4], without_components(states, real, 1)[1, :4])


def test_directions_are_orthonormal_in_falling_order_and_nought_where_there_is_none() -> None:
    states, real = draw()
    found = principal_directions(states, real, 2)
    eye = torch.eye(2, dtype=states.dtype)
    torch.testing.assert_close(found[:2] @ found[:2].mT, eye.expand(2, 2, 2))
    along = (zero_padding(states, real)[:2] @ found[:2].mT).pow(2).sum(1)
    assert (along[:, 0] > along[:, 1]).all()
    assert not found[2:].any()  # two tokens and one: no more than two directions to remove
    line = torch.randn(1, 4, 1, generator=rng()) @ torch.randn(1, 1, 5, generator=rng(1))
    flat = principal_directions(line, torch.ones(1, 4, dtype=torch.bool), 2)
    assert flat[0, 0].norm() == pytest.approx(1)
    assert not flat[0, 1].any()


def test_a_rank_one_text_loses_everything_and_a_common_offset_goes_with_the_first_direction() -> None:
    line = torch.randn(1, 4, 1, generator=rng()) @ torch.randn(1, 1, 5, generator=rng(1))
    whole = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(without_components(line, whole), torch.zeros(1, 4, 5), atol=1e-5, rtol=0)
    states = torch.randn(1, 20, 5, generator=rng()) + 100 * torch.nn.functional.one_hot(torch.tensor(2), 5)
    whole = torch.ones(1, 20, dtype=torch.bool)
    assert without_components(states, whole)[0].mean(0).norm() < 0.1
    assert without_components(states, whole, center=True)[0].mean(0).norm() > 50  # the centred variant keeps it


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_the_gradient_is_that_of_finite_differences(k: int, center: bool, which: Any) -> None:
    states, real = draw(seed=3)
    keep = [1, 2, 3]  # of the longest, whose tokens outnumber its width, the last directions are not defined
    states, real = (states, real) if which == "first" else (states[keep, :4], real[keep, :4])

    def real_rows(x: Tensor) -> Tensor:
        return without_components(x, real, k, which=which, center=center)[real]

    assert torch.autograd.gradcheck(real_rows, states.requires_grad_(), atol=1e-6)


def test_directions_as_constants_have_another_gradient() -> None:
    states, real = draw(seed=3)

    def gradient(differentiate: bool) -> Tensor:
        x = states.clone().requires_grad_()
        weight = torch.randn(x.shape, generator=rng(5), dtype=x.dtype)
        (without_components(x, real, 1, differentiate=differentiate) * weight)[real].sum().backward()
        assert x.grad is not None
        return x.grad[real]

    assert (gradient(True) - gradient(False)).norm() > 0.1 * gradient(True).norm()


def test_gradients_stay_finite_with_equal_tokens_and_equal_singular_values() -> None:
    same = torch.ones(1, 4, 5)
    square = torch.eye(5)[None, :4]
    for states in (same, square, torch.zeros(1, 4, 5)):
        for k in (1, 2):
            x = states.clone().requires_grad_()
            without_components(x, torch.tensor([[True, True, True, False]]), k).sum().backward()
            assert x.grad is not None
            assert x.grad.isfinite().all()


def test_single_precision_and_autocast_agree_with_double() -> None:
    states, real = draw()
    exact = without_components(states, real, 1)
    single = without_components(states.float(), real, 1)
    torch.testing.assert_close(single[real].double(), exact[real], atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = without_components(states.float(), real, 1)
    assert torch.equal(inside, single)


def test_random_directions_are_orthonormal_and_uniform() -> None:
    found = random_directions(6, 3, rng())
    torch.testing.assert_close(found @ found.T, torch.eye(3), atol=1e-6, rtol=0)
    many = torch.stack([random_directions(4, 1, rng(i))[0] for i in range(2000)])
    torch.testing.assert_close(many.T @ many / 2000, torch.eye(4) / 4, atol=0.02, rtol=0)
    states = torch.randn(2, 3, 6, generator=rng())
    left = without_directions(states, found.unsqueeze(0))
    torch.testing.assert_close(left @ found.T, torch.zeros(2, 3, 3), atol=1e-6, rtol=0)


def bert_plan() -> Plan:
    """A small BERT, whose classifier reads the first token's last state, on texts of several lengths."""
    return Plan.from_model(own_models.bert(), data=own_models.texts(), held_out=own_models.texts(), steps=3, batch=4)


def weights(plan: Plan, *interventions: Any) -> str:
    return Engine(apply(plan, interventions), 0, Store(None)).run().weights


@pytest.mark.parametrize("kind", [ComponentRemoval, CorpusComponentRemoval, FirstTokenOnly])
def test_acts_on_a_bert_of_ones_own_and_off_is_the_control(kind: Any) -> None:
    plan, arm = bert_plan(), kind(where="bert.encoder")
    off = dataclasses.replace(arm, **arm.OFF)
    assert weights(plan, off) == weights(plan)
    if kind is FirstTokenOnly:  # this classifier reads the first token already
        assert weights(plan, arm) == weights(plan)
    else:
        assert weights(plan, arm) != weights(plan)


def test_predictions_of_a_bert_use_the_mask_of_the_batch() -> None:
    plan = bert_plan()
    arm = ComponentRemoval(where="bert.encoder")
    seen: list[Tensor] = []

    @dataclasses.dataclass(frozen=True)
    class Watched(ComponentRemoval):
        def remove(self, states: Tensor, ctx: Any) -> Tensor:
            out = super().remove(states, ctx)
            expected = without_components(states, ctx.batch["attention_mask"] != 0, 1)
            assert torch.equal(out, expected)
            seen.append(out)
            return out

    assert weights(plan, Watched(where="bert.encoder")) == weights(plan, arm)
    assert len(seen) > 3  # in each update, and when it is measured


def test_acts_on_a_vision_transformer_all_of_whose_tokens_are_real() -> None:
    model = own_models.vit()
    where = next(name for name, m in model.named_modules() if name.endswith(("encoder", "layernorm")))
    plan = Plan.from_model(model, data=own_models.images(), held_out=own_models.images(), steps=2, batch=4)
    arms = [ComponentRemoval(where=where, which=which) for which in ("first", "last", "random")]
    assert len({weights(plan), *(weights(plan, arm) for arm in arms)}) == 4
    assert weights(plan, ComponentRemoval(where=where, components=0)) == weights(plan)


def test_what_are_no_token_states_or_have_another_mask_are_refused() -> None:
    plan = bert_plan()
    with pytest.raises(PlanError, match=r"\[B, T, D\].*set where"):
        weights(plan, ComponentRemoval(where="classifier"))
    with pytest.raises(PlanError, match="must not be negative"):
        ComponentRemoval(components=-1)
    with pytest.raises(PlanError, match=r"no which='frist'.*first"):
        ComponentRemoval(which="frist")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="decay"):
        CorpusComponentRemoval(decay=1.0)


def test_random_directions_are_the_same_in_every_step_and_prediction_of_a_run() -> None:
    from vision_toys import ctx_of, move

    ctx = ctx_of(stage="finetune")
    ctx.batch = {}
    states = torch.randn(2, 3, 6, generator=rng())
    arm = ComponentRemoval(which="random")
    first = arm.remove(states, ctx)
    assert torch.equal(first, arm.remove(states, move(ctx, 7)))
    assert torch.equal(first, arm.remove(states, ctx_of(stage="")))
    assert not torch.equal(first, arm.remove(states, ctx_of(seed=1)))


def corpus_ctx(training: bool) -> Any:
    from vision_toys import ctx_of

    ctx = ctx_of()
    ctx.model = torch.nn.Identity().train(training)
    return ctx


def test_corpus_directions_are_those_of_the_running_second_moment_and_stand_still_in_eval_mode() -> None:
    arm, ctx = CorpusComponentRemoval(components=2, decay=0.75), corpus_ctx(training=True)
    batches, moment = [draw(seed, torch.float32) for seed in range(3)], None
    for states, real in batches:
        ctx.batch = {"attention_mask": real.long()}
        found = arm.directions(states, ctx)
        rows = states[real]
        now = rows.T @ rows / len(rows)
        moment = now if moment is None else 0.75 * moment + 0.25 * now
        expected = torch.linalg.eigh(moment).eigenvectors[:, -2:]
        torch.testing.assert_close(found.T @ found, expected @ expected.T, atol=1e-4, rtol=0)
    ctx.model.eval()
    states, real = draw(9, torch.float32)
    ctx.batch = {"attention_mask": real.long()}
    again = arm.directions(states, ctx)
    assert torch.equal(again, found)
    left = arm.remove(states, ctx)
    torch.testing.assert_close(left @ found.T, torch.zeros(*left.shape[:2], 2), atol=1e-5, rtol=0)


def test_a_prediction_before_any_training_leaves_no_corpus_behind() -> None:
    arm, ctx = CorpusComponentRemoval(), corpus_ctx(training=False)
    for seed in (0, 1):
        states, real = draw(seed, torch.float32)
        ctx.batch = {"attention_mask": real.long()}
        rows = states[real]
        found, expected = arm.directions(states, ctx), torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1:]
        torch.testing.assert_close(found.T @ found, expected @ expected.T, atol=1e-4, rtol=0)
    assert not ctx.state


def test_first_token_only_gives_its_state_to_the_mean() -> None:
    states, _ = draw()
    assert torch.equal(FirstTokenOnly().first(states, None), states[:, :1].expand_as(states))  # type: ignore[arg-type]
    half = FirstTokenOnly(mix=0.5).first(states, None)  # type: ignore[arg-type]
    torch.testing.assert_close(half, (states + states[:, :1]) / 2)
