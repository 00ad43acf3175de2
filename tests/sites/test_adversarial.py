from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from vision_toys import ctx_of, restless_net, restless_plan, run

from perturbed.core.context import ScopedLoss
from perturbed.core.plan import apply
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.errors import PlanError
from perturbed.inputs import adversarial
from perturbed.inputs.adversarial import PGDTraining, attacked, fgsm, pgd, project, square_search, start
from perturbed.objectives.classification import cross_entropy as loss_slot
from perturbed.plans.digits import Digits

OPEN = (-100.0, 100.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


# ---- geometry ----------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_is_the_nearest_point_of_the_ball(norm: Any) -> None:
    eps, points = 0.7, draw(50, 3)
    found = project(points, eps, norm)
    size = found.abs().amax(1) if norm == "linf" else found.norm(dim=1)
    assert (size <= eps + 1e-12).all()
    inside = (points.abs().amax(1) if norm == "linf" else points.norm(dim=1)) <= eps
    assert inside.any()
    assert torch.equal(found[inside], points[inside])
    others = project(draw(4000, 3, seed=1), eps, norm)  # points of the ball: none is nearer
    assert (torch.cdist(points, others).amin(1) >= (points - found).norm(dim=1) - 1e-12).all()


def test_projection_acts_on_each_example_as_a_whole() -> None:
    images = draw(5, 2, 3, 3)
    found = project(images, 1.0, "l2").flatten(1).norm(dim=1)
    assert torch.allclose(found, images.flatten(1).norm(dim=1).clamp(max=1))


def test_starting_points_are_uniform_in_the_ball() -> None:
    x = torch.zeros(20_000, 3, dtype=torch.float64)
    cube = start(x, 2.0, "linf", rng())
    assert cube.abs().max() <= 2
    assert cube.var().item() == pytest.approx(4 / 3, rel=0.03)
    radius = start(x, 2.0, "l2", rng()).norm(dim=1)
    assert radius.max() <= 2 + 1e-9
    inner = (radius < 1).double().mean().item()  # volume of half the radius: 1/8 in three dimensions
    assert inner == pytest.approx(1 / 8, abs=0.01)


# ---- the attack on functions whose maximum is known ----------------------------------------


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize("begin", [None, 3])
def test_on_a_linear_loss_the_gain_is_eps_times_the_dual_norm(norm: Any, dual: int, begin: int | None) -> None:
    w, x, eps = draw(12), draw(6, 12, seed=1), 0.3
    found = pgd(
        lambda z: z @ w, x, eps=eps, alpha=0.1, steps=60, rng=begin and rng(begin), norm=norm, bounds=OPEN
    )  # fmt: skip
    assert torch.allclose((found - x) @ w, (eps * w.norm(p=dual)).expand(6), atol=1e-3 if norm == "l2" else 1e-12)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_one_fast_step_is_exact_on_a_linear_loss(norm: Any, dual: int) -> None:
    w, x = draw(12), draw(6, 12, seed=1)
    found = fgsm(lambda z: (z @ w).mean(), x, eps=0.3, norm=norm, bounds=OPEN)
    assert torch.allclose((found - x) @ w, (0.3 * w.norm(p=dual)).expand(6), atol=1e-12)


def test_the_legal_range_takes_its_part_of_the_gain() -> None:
    w, x = draw(12), torch.rand(6, 12, generator=rng(1), dtype=torch.float64)
    found = pgd(lambda z: z @ w, x, eps=0.3, alpha=0.1, steps=20, rng=rng(), bounds=(0.0, 1.0))
    best = (x + 0.3 * w.sign()).clamp(0, 1)
    assert torch.allclose(found, best, atol=1e-12)


def test_wrong_formulas_fail_where_the_right_one_does_not(monkeypatch: Any) -> None:
    w, x = draw(12), draw(6, 12, seed=1)

    def attack() -> Tensor:
        return pgd(lambda z: z @ w, x, eps=0.3, alpha=0.1, steps=20, rng=None, bounds=OPEN) - x

    gain = 0.3 * w.norm(p=1)
    assert torch.allclose(attack() @ w, gain.expand(6))
    right = adversarial.ascent
    monkeypatch.setattr(adversarial, "ascent", lambda g, norm: -right(g, norm))
    assert torch.allclose(attack() @ w, -gain.expand(6))  # the wrong sign finds the minimum
    monkeypatch.setattr(adversarial, "ascent", right)
    monkeypatch.setattr(adversarial, "project", lambda delta, eps, norm: delta)
    assert attack().abs().max() > 0.3 + 1e-6  # without projection it leaves the ball


def wavy(z: Tensor) -> Tensor:
    return torch.sin(7 * z[:, 0]) + torch.cos(5 * z[:, 1]) + z.sum(1)


def test_restarts_find_the_maximum_that_brute_force_finds() -> None:
    x, eps = draw(20, 2), 1.0
    side = torch.linspace(-eps, eps, 201, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(-1, 2)
    best = torch.stack([wavy(row + grid).max() for row in x])
    found = pgd(wavy, x, eps=eps, alpha=0.02, steps=60, rng=rng(), bounds=OPEN, restarts=60, keep=wavy)
    assert torch.allclose(wavy(found), best, atol=0.02)
    single = pgd(wavy, x, eps=eps, alpha=0.02, steps=60, rng=rng(), bounds=OPEN)
    assert (wavy(single) < best - 0.1).any()  # one start is caught in a lesser maximum somewhere


def test_more_restarts_are_never_worse_for_any_example() -> None:
    x = draw(20, 2)
    values = [
        wavy(pgd(wavy, x, eps=1.0, alpha=0.05, steps=5, rng=rng(), bounds=OPEN, restarts=n, keep=wavy))
        for n in (1, 2, 4, 8)
    ]
    for fewer, more in itertools.pairwise(values):
        assert (more >= fewer).all()
    assert (values[-1] > values[0]).any()


def test_restarts_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="keep="):
        pgd(wavy, draw(2, 2), eps=1.0, alpha=0.1, steps=1, rng=rng(), restarts=2)
    with pytest.raises(ValueError, match="rng="):
        pgd(wavy, draw(2, 2), eps=1.0, alpha=0.1, steps=1, rng=None, restarts=2, keep=wavy)


def test_search_rises_stays_in_the_ball_and_nears_the_optimum() -> None:
    w, x, eps = draw(1, 4, 4), torch.rand(8, 1, 4, 4, generator=rng(2), dtype=torch.float64), 0.2

    def score(z: Tensor) -> Tensor:
        return (z * w).flatten(1).sum(1)

    best = score((x + eps * w.sign()).clamp(0, 1)) - score(x)
    gains = []
    for queries in (0, 30, 300):
        found = square_search(score, x, eps=eps, queries=queries, rng=rng(), bounds=(0.0, 1.0))
        assert (found - x).abs().max() <= eps + 1e-12
        assert found.min() >= 0
        assert found.max() <= 1
        gains.append((score(found) - score(x)) / best)
    assert gains[1].mean() > gains[0].mean()
    assert gains[2].min() > 0.9
    assert gains[2].max() <= 1 + 1e-9


# ---- the attack leaves no trace ----------------------------------------


def test_an_attack_leaves_gradients_modes_and_buffers_as_they_were() -> None:
    net, images, labels = restless_net(), torch.rand(6, 1, 8, 8, generator=rng()), torch.arange(6)
    cross_entropy(net(images), labels).backward()
    net[1].eval()
    net[5].bias.requires_grad_(False)
    net[0].bias.grad = None
    for mode in ("eval", "train"):
        before = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in net.parameters()]
        kept = [(b, b.clone()) for b in net.buffers()]
        with attacked(net, mode):  # type: ignore[arg-type]
            assert {m.training for m in net.modules()} == {mode == "train"}
            found = pgd(lambda z: cross_entropy(net(z), labels), images, eps=0.1, alpha=0.03, steps=3, rng=rng())
        assert not found.requires_grad
        assert [m.training for m in net] == [True, False, True, True, True, True]
        assert net.training
        assert not net[5].bias.requires_grad
        for parameter, (value, gradient) in zip(net.parameters(), before, strict=True):
            assert torch.equal(parameter, value)
            assert (parameter.grad is None) is (gradient is None)
            assert gradient is None or torch.equal(parameter.grad, gradient)
        for buffer, (same, value) in zip(net.buffers(), kept, strict=True):
            assert buffer is same
            assert torch.equal(buffer, value)


def test_without_that_care_train_mode_moves_the_statistics() -> None:
    net, images = restless_net(), torch.rand(6, 1, 8, 8, generator=rng())
    before = net[1].running_mean.clone()
    pgd(lambda z: net(z).sum(), images, eps=0.1, alpha=0.03, steps=1, rng=rng())
    assert not torch.equal(net[1].running_mean, before)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_zero_is_the_control_bit_for_bit_under_dropout_and_batch_norm(mode: Any, norm: Any) -> None:
    control = run(restless_plan())
    off = run(apply(restless_plan(), [PGDTraining(eps=0.0, steps=2, norm=norm, mode=mode)]))
    assert off.weights == control.weights
    assert off.curves["loss"] == control.curves["loss"]
    on = run(apply(restless_plan(), [PGDTraining(eps=0.01, steps=2, norm=norm, mode=mode)]))
    assert on.weights != control.weights


# ---- the intervention ----------------------------------------


def test_one_update_costs_the_attack_and_one_pass() -> None:
    plan = restless_plan(steps=3)
    cost = run(apply(plan, [PGDTraining(steps=5, stage="finetune")])).cost
    assert cost.grad_passes == 2 + 3 * (5 + 1)
    assert run(plan).cost.grad_passes == 2 + 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_examples_are_worse_and_within_reach(norm: Any) -> None:
    plan, ctx = Digits(), ctx_of()
    facts = plan().facts
    whole = facts.more["seen"]()
    batch = {k: v[:64] for k, v in whole.items()}
    ctx.model, ctx.loss = restless_net(), ScopedLoss(loss_slot)
    attack = PGDTraining(eps=0.2, alpha=0.05, norm=norm)
    found = attack.perturb(batch, ctx)
    delta = (found["pixels"] - batch["pixels"]).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= 0.2 + 1e-6).all()
    assert size.max() > 0.19
    assert found["pixels"].min() >= 0
    assert found["pixels"].max() <= 1
    assert torch.equal(found["labels"], batch["labels"])
    ctx.model.eval()
    with torch.no_grad():
        assert ctx.loss(ctx.model, found, ctx) > ctx.loss(ctx.model, batch, ctx)


def test_the_attack_sees_the_update_s_own_dropout_in_train_mode() -> None:
    ctx, seen = ctx_of(), []
    ctx.model = restless_net()
    ctx.model[3].register_forward_hook(lambda m, a, out: seen.append((out == 0) & (a[0] != 0)))
    ctx.loss = ScopedLoss(loss_slot)
    batch = {"pixels": torch.rand(4, 1, 8, 8, generator=rng()) * 0.5 + 0.25, "labels": torch.arange(4)}
    PGDTraining(eps=0.0, steps=2, mode="train").perturb(batch, ctx)
    ctx.loss(ctx.model, batch, ctx)
    assert len(seen) == 3
    assert seen[0].any()
    assert torch.equal(seen[0], seen[2])
    seen.clear()
    PGDTraining(eps=0.0, steps=1, mode="eval").perturb(batch, ctx)
    assert not seen[0].any()


def test_works_on_a_transformers_class() -> None:
    plan = Digits(model="vit", batch=16, pretrain_steps=1, finetune_steps=2, held_out=60)()
    off, on = (run(apply(plan, [PGDTraining(eps=eps, steps=2)])) for eps in (0.0, 0.3))
    assert off.weights == run(plan).weights
    assert on.weights != off.weights


class Killed(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Dying:
    inner: Any
    at: int

    def __call__(self, ctx: Any) -> Any:
        stream, at = self.inner(ctx), self.at
        draw_batch = stream.__next__

        class Stream:
            state_dict, load_state_dict = stream.state_dict, stream.load_state_dict

            def __next__(self) -> Any:
                if ctx.step == at:
                    raise Killed
                return draw_batch()

        return Stream()

    def fingerprint(self) -> str:
        return "the same whenever it dies"


def test_resumes_bit_for_bit(tmp_path: Any) -> None:
    def plan(at: int) -> Any:
        edited = restless_plan(6).edit("finetune", lambda s: dataclasses.replace(s, data=Dying(s.data, at)))
        return apply(edited, [PGDTraining(steps=2)])

    with pytest.raises(Killed):
        Engine(plan(4), 0, Store(tmp_path), checkpoint_s=0.0).run()
    resumed = Engine(plan(-1), 0, Store(tmp_path)).run()
    whole = run(plan(-1))
    assert resumed.weights == whole.weights
    assert resumed.cost.grad_passes == whole.cost.grad_passes


def test_bad_settings_are_refused() -> None:
    with pytest.raises(PlanError, match="eps"):
        PGDTraining(eps=-0.1)
    with pytest.raises(PlanError, match="did you mean 'linf'"):
        PGDTraining(norm="lin")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="mode 'test'"):
        PGDTraining(mode="test")  # type: ignore[arg-type]
    plan = restless_plan()
    with pytest.raises(PlanError, match="input_range"):
        apply(plan.replace(facts=dataclasses.replace(plan.facts, input_range=None)), [PGDTraining()])
