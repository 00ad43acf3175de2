from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from vision_toys import run

from perturbed.core.plan import Measure
from perturbed.core.run import Run
from perturbed.errors import PlanError
from perturbed.measures.robustness import Robustness, margin, withstands_pgd, withstands_search
from perturbed.measures.vision import accuracy, correct
from perturbed.plans.digits import Digits

OPEN = (-100.0, 100.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


W = draw(16)
X = 0.3 * draw(200, 1, 4, 4, seed=1)
SCORE = X.flatten(1) @ W
LABELS = (SCORE + 0.3 * draw(200, seed=2) > 0).long()


def linear(z: Tensor) -> Tensor:
    score = z.flatten(1) @ W
    return torch.stack([-score, score], 1)


def holds(eps: float, dual: int) -> Tensor:
    """A linear classifier withstands every attack exactly where its margin exceeds eps times the dual norm."""
    return eps * W.norm(p=dual) < (2 * LABELS - 1) * SCORE


@pytest.mark.parametrize(("norm", "dual", "eps"), [("linf", 1, 0.05), ("l2", 2, 0.2)])
def test_pgd_is_exact_on_a_linear_classifier(norm: Any, dual: int, eps: float) -> None:
    found = withstands_pgd(
        linear, X, LABELS, eps=eps, alpha=eps / 4, steps=40, restarts=2, rng=rng(), norm=norm, bounds=OPEN
    )
    assert torch.equal(found, holds(eps, dual))
    assert 0.2 < found.double().mean() < 0.8
    assert not torch.equal(found, holds(eps, 3 - dual))  # the other norm would be the wrong formula


def test_search_never_breaks_what_cannot_be_broken_and_finds_most_of_the_rest() -> None:
    truth = holds(0.05, 1)
    found = withstands_search(linear, X, LABELS, eps=0.05, queries=300, rng=rng(), bounds=OPEN)
    assert (found | ~truth).all()
    broken = ~truth & correct(linear(X), LABELS)
    assert (~found[broken]).double().mean() > 0.9


def test_what_is_wrong_already_does_not_count_as_robust() -> None:
    def odd(z: Tensor) -> Tensor:
        """Wrong at every clean point, right at any other."""
        same = (z == X).flatten(1).all(1, keepdim=True)
        right = torch.nn.functional.one_hot(LABELS, 2).double() + 0 * z.flatten(1).sum(1, keepdim=True)
        return torch.where(same, 1 - right, right)

    settings = {"eps": 0.05, "rng": rng(), "bounds": OPEN}
    assert not withstands_pgd(odd, X, LABELS, alpha=0.01, steps=2, restarts=1, **settings).any()  # type: ignore[arg-type]
    assert not withstands_search(odd, X, LABELS, queries=3, **settings).any()  # type: ignore[arg-type]


class Bumpy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(16, 32), torch.nn.Linear(32, 4)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=rng(p.numel()))

    def forward(self, z: Tensor) -> Tensor:
        return self.last(torch.sin(self.first(z.flatten(1))))


def test_more_restarts_never_leave_more_standing() -> None:
    net, x = Bumpy(), torch.rand(100, 1, 4, 4, generator=rng())
    labels = net(x).argmax(1)
    standing = [
        withstands_pgd(net, x, labels, eps=0.06, alpha=0.03, steps=3, restarts=n, rng=rng()) for n in (1, 2, 4, 8)
    ]
    for fewer, more in pairwise(standing):
        assert (fewer | ~more).all()
    assert standing[-1].sum() < standing[0].sum()


def test_restarts_are_judged_by_the_margin_not_by_the_loss() -> None:
    labels = torch.zeros(2, dtype=torch.long)
    logits = torch.tensor([[0.40, 0.30, 0.30], [0.45, 0.55, 1e-9]]).log()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert losses[0] > losses[1]  # the larger loss
    assert margin(logits, labels)[0] < 0 < margin(logits, labels)[1]  # is the one still classified rightly


def test_margin_is_positive_exactly_where_the_prediction_is_wrong() -> None:
    logits, labels = draw(500, 5), torch.randint(5, (500,), generator=rng())
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    by_hand = [max(v for j, v in enumerate(row) if j != y) - row[y] for row, y in rows]
    assert torch.allclose(margin(logits, labels).double(), torch.tensor(by_hand, dtype=torch.float64), atol=1e-6)
    assert torch.equal(margin(logits, labels) > 0, ~correct(logits, labels))


def made(predict: Any, facts: dict[str, Any] | None = None) -> Run:
    from vision_toys import ctx_of

    more = {"held_out": lambda: {"pixels": X.float() / 4 + 0.5, "labels": LABELS}} if facts is None else facts
    ctx = ctx_of(stage="")
    ctx.facts = dataclasses.replace(ctx.facts, more=more)
    return Run(torch.nn.Identity(), lambda batch: predict(batch["pixels"]), {}, {}, ctx)


def unmasked(z: Tensor) -> Tensor:
    return linear((z.double() - 0.5) * 4).float()


def masked(z: Tensor) -> Tensor:
    """The same classifier behind a staircase, whose gradient is zero everywhere."""
    return unmasked(torch.round(z * 256) / 256)


def test_masked_gradients_are_noticed() -> None:
    measure = Robustness(eps=0.02, alpha=0.005, steps=20, queries=300)
    honest, hidden = measure(made(unmasked)), measure(made(masked))
    assert hidden["accuracy_pgd"] > honest["accuracy_pgd"] + 0.1
    assert hidden["accuracy_search"] == pytest.approx(honest["accuracy_search"], abs=0.05)
    assert honest["masked"] == 0
    assert hidden["masked"] > 0.1


def test_clean_accuracy_bounds_the_others_and_eps_zero_reaches_it() -> None:
    clean = accuracy(made(unmasked))["accuracy"]
    assert clean == pytest.approx(correct(linear(X), LABELS).double().mean().item())
    still = Robustness(eps=0.0, queries=5)(made(unmasked))
    assert still["accuracy_pgd"] == still["accuracy_search"] == pytest.approx(clean)
    before = 1.0
    for eps in (0.0, 0.01, 0.02, 0.04):
        now = Robustness(eps=eps, alpha=eps / 4, queries=0)(made(unmasked))["accuracy_pgd"]
        assert now <= before
        before = now
    assert before < clean - 0.2


def test_measures_are_the_same_twice_and_named_as_asked() -> None:
    plan = Digits(pretrain_steps=6, finetune_steps=1, held_out=60)()
    measures = (
        Measure("pgd", Robustness(steps=2, queries=3)),
        Measure("seen", Robustness(steps=2, queries=0, fact="seen", suffix="_seen")),
    )
    one, two = (run(plan.add_measures(*measures)) for _ in range(2))
    assert one.scores == two.scores
    assert set(one.scores) == {"accuracy", "accuracy_pgd", "accuracy_search", "masked", "accuracy_pgd_seen"}
    assert one.weights == run(plan).weights  # attacking at the end costs no gradient pass and moves nothing
    assert one.cost.grad_passes == 7


def test_a_missing_fact_is_named() -> None:
    with pytest.raises(PlanError, match="held_out"):
        accuracy(made(unmasked, facts={}))
    run_ = made(unmasked)
    run_.ctx.facts = dataclasses.replace(run_.ctx.facts, input_range=None)
    with pytest.raises(PlanError, match="input_range"):
        Robustness()(run_)
