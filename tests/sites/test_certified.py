"""Certified training and certified accuracy: bounds above every loss in the ball, and below every attack."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vision_toys import ctx_of, restless_net, run

from perturbed.core.plan import Facts, Measure, Plan, apply
from perturbed.core.run import Run
from perturbed.errors import PlanError
from perturbed.measures.bounds import Ball, CertifiedAccuracy, Propagation, lower_margins, trace
from perturbed.measures.bounds.propagate import Method
from perturbed.measures.robustness import Robustness
from perturbed.measures.sharpness import WeightNoise, loss_bound, moved, trace_moving, weight_balls, weight_noise
from perturbed.objectives.certified import (
    CertifiedLoss,
    CertifiedTraining,
    Ease,
    FlatTraining,
    excesses_of,
    growing,
    worst_loss,
)
from perturbed.objectives.classification import cross_entropy
from perturbed.plans.digits import Digits

BOUNDS: tuple[Ease, ...] = ("none", "separate", "fused")


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(depth: int = 2, scale: float = 1.0) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    for _ in range(depth - 1):
        net.extend([nn.ReLU(), nn.Linear(12, 12)])
    for i, p in enumerate(net.parameters()):
        p.data = draws(*p.shape, seed=i) * (scale * p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
    return net


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return draws(count, 1, 8, 8, seed=50).sigmoid(), torch.arange(count) % 12


def test_the_radius_grows_without_a_jump_in_value_or_slope() -> None:
    assert growing(0.19, 0.2, 0.6) == growing(0.2, 0.2, 0.6) == 0.0
    assert growing(0.8, 0.2, 0.6) == growing(1.0, 0.2, 0.6) == 1.0
    assert growing(0.0, 0.0, 0.0) == 1.0
    values = [growing(u / 1000, 0.0, 1.0) for u in range(1001)]
    steps = [after - before for before, after in itertools.pairwise(values)]
    assert all(step >= 0 for step in steps)
    assert max(abs(b - a) for a, b in itertools.pairwise(steps)) < 2e-5
    assert values[125] / values[250] == pytest.approx(0.5**4)
    assert values[1000] - values[625] == pytest.approx(values[625] - values[250])
    assert values[250] == pytest.approx(0.25 / (0.25 + 4 * 0.75))


@pytest.mark.parametrize("ease", BOUNDS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_bound_is_above_every_loss_in_the_ball(ease: Ease, scale: float) -> None:
    net, (x, labels), eps = network(3, scale), batch(), 0.05
    found = Propagation(trace(net, x), x, Ball(eps), "crown-ibp")
    for part in (0.0, 0.5, 1.0):
        bound = worst_loss(found, labels, ease, part)
        for seed in range(100):
            near = x + eps * draws(*x.shape, seed=seed).sign()
            assert (F.cross_entropy(net(near), labels, reduction="none") <= bound + 1e-4).all()


@pytest.mark.parametrize("ease", [*BOUNDS, "clean"])
def test_at_radius_zero_the_bound_is_the_loss(ease: Ease) -> None:
    net, (x, labels) = network(3), batch()
    found = Propagation(trace(net, x), x, Ball(0.0), "crown-ibp")
    expected = F.cross_entropy(net(x), labels, reduction="none")
    assert torch.allclose(worst_loss(found, labels, ease, 0.7), expected, atol=1e-5)


def test_intervals_by_hand() -> None:
    net, (x, labels), eps = network(2), batch(), 0.1
    found = Propagation(trace(net, x), x, Ball(eps), "crown-ibp")
    one, two = net[1], net[3]
    middle, radius = one(x.flatten(1)), eps * one.weight.abs().sum(1)
    low, high = (middle - radius).relu(), (middle + radius).relu()
    weight = two.weight.unsqueeze(0) - two.weight[labels].unsqueeze(1)
    bias = two.bias.unsqueeze(0) - two.bias[labels].unsqueeze(1)
    upper = (weight.clamp(min=0) @ high.unsqueeze(2) + weight.clamp(max=0) @ low.unsqueeze(2)).squeeze(2) + bias
    expected = F.cross_entropy(upper, labels, reduction="none")
    assert torch.allclose(worst_loss(found, labels, "none", 1.0), expected, atol=1e-5)
    half = 0.5 * upper + 0.5 * (net(x) - net(x).gather(1, labels.unsqueeze(1)))
    mixed = F.cross_entropy(half, labels, reduction="none")
    assert torch.allclose(worst_loss(found, labels, "clean", 0.5), mixed, atol=1e-5)


def test_fusion_is_the_tighter_where_single_functions_are_bounded_as_well_by_both() -> None:
    """Of an affine network each margin's extremes are known, but not reached at once: one function sees that."""
    net, (x, labels), eps = network(1, 3.0), batch(), 0.05
    found = Propagation(trace(net, x), x, Ball(eps), "crown-ibp")
    apart, separate, fused = (worst_loss(found, labels, ease, 1.0) for ease in BOUNDS)
    assert torch.allclose(apart, separate, atol=1e-4)
    assert (fused <= separate + 1e-4).all()
    assert (fused < separate - 0.05).any()


def test_fusion_goes_back_with_one_function_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, labels) = network(3), batch()
    found = Propagation(trace(net, x), x, Ball(0.05), "crown-ibp")
    counts: list[int] = []
    whole = Propagation.rows

    def counted(self: Propagation, rows: Tensor, **kwargs: bool) -> tuple[Tensor | None, Tensor | None]:
        counts.append(rows.shape[1])
        return whole(self, rows, **kwargs)

    monkeypatch.setattr(Propagation, "rows", counted)
    worst_loss(found, labels, "fused", 1.0)
    worst_loss(found, labels, "separate", 1.0)
    worst_loss(found, labels, "none", 1.0)
    assert counts == [1, 12]


def test_excesses_are_each_logit_less_the_label_s() -> None:
    logits, labels = draws(3, 5), torch.tensor([0, 4, 2])
    found = (excesses_of(labels, 5) @ logits.unsqueeze(2)).squeeze(2)
    assert torch.equal(found, logits - logits.gather(1, labels.unsqueeze(1)))


def test_the_loss_mixes_the_plan_s_own_with_the_bound_by_its_share_and_step() -> None:
    net, (x, labels), ctx = network(2), batch(), ctx_of()
    data = {"pixels": x, "labels": labels}
    own = cross_entropy(net, data, ctx)
    ctx.steps, ctx.step = 10, 0
    rule = CertifiedTraining(eps=0.1, ease="none", start=0.2, ramp=0.4, share=0.25)
    assert torch.equal(CertifiedLoss(cross_entropy, rule)(net, data, ctx), own)
    for step in (3, 5, 9):
        ctx.step = step
        ball = Ball(0.1 * growing(step / 10, 0.2, 0.4), legal=(0.0, 1.0))
        worst = worst_loss(Propagation(trace(net, x), x, ball, "crown-ibp"), labels, "none", 0.0).mean()
        found = CertifiedLoss(cross_entropy, rule)(net, data, ctx)
        assert found.item() == pytest.approx((0.75 * own + 0.25 * worst).item(), rel=1e-6)


@pytest.mark.parametrize("ease", ["separate", "fused", "clean"])
def test_what_is_mixed_in_fades_as_the_radius_grows_until_intervals_are_left(ease: Ease) -> None:
    net, (x, labels), ctx = network(3), batch(), ctx_of()
    rule = CertifiedTraining(eps=0.1, ease=ease, start=0.2, ramp=0.4)
    rows = excesses_of(labels, 12)
    for ctx.step, ctx.steps in ((3, 10), (5, 10), (9, 10)):
        grown = growing(ctx.step / 10, 0.2, 0.4)
        found = Propagation(trace(net, x), x, Ball(0.1 * grown, legal=(0.0, 1.0)), "crown-ibp")
        by_interval, by_lines = found.rows_by_interval(rows)[1], found.rows(rows, lower=False)[1]
        assert by_interval is not None
        assert by_lines is not None
        if ease == "fused":  # bounds of the sum of exponentials are mixed
            alone = worst_loss(found, labels, "fused", 1.0).exp()
            expected = ((1 - grown) * alone + grown * by_interval.exp().sum(1)).log()
        else:  # bounds of each margin are
            alone = by_lines if ease == "separate" else (rows @ net(x).unsqueeze(2)).squeeze(2)
            expected = ((1 - grown) * alone + grown * by_interval).logsumexp(1)
        loss = CertifiedLoss(cross_entropy, rule)(net, {"pixels": x, "labels": labels}, ctx)
        assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx(by_interval.logsumexp(1).mean().item(), rel=1e-6)
    assert loss.item() > worst_loss(found, labels, ease, 1.0).mean().item() + 0.01, "and that is another bound"


def test_bounds_are_of_the_network_in_eval_mode_and_leave_it_training() -> None:
    net, (x, labels) = restless_net(), batch()
    ctx = ctx_of()
    ctx.step, ctx.steps = 1, 2
    loss = CertifiedLoss(cross_entropy, CertifiedTraining(ramp=0.0))
    first, second = (loss(net, {"pixels": x, "labels": labels % 10}, ctx) for _ in range(2))
    assert net.training
    assert first.item() != second.item()  # the running statistics moved, and the bound with them
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def small(*arm: CertifiedTraining) -> Plan:
    plan = Digits(model="mlp", pretrain_steps=42, finetune_steps=126, finetune_lr=0.05, held_out=130)()
    measures = (Measure("bounds", CertifiedAccuracy(0.05)), Measure("attack", Robustness(0.05, 0.0125, queries=0)))
    return apply(plan.add_measures(*measures), arm)


def test_training_on_bounds_certifies_and_no_attack_beats_a_certificate() -> None:
    plain, trained = run(small()).scores, run(small(CertifiedTraining(0.05, stage="finetune"))).scores
    for scores in (plain, trained):
        clean, attacked = scores["accuracy"], scores["accuracy_pgd"]
        certified, interval = scores["accuracy_certified"], scores["accuracy_interval"]
        assert None not in (clean, attacked, certified, interval)
        assert interval <= certified <= attacked <= clean  # type: ignore[operator]
    assert trained["accuracy_interval"] > plain["accuracy_interval"] + 0.3  # type: ignore[operator]
    assert trained["accuracy_certified"] > plain["accuracy_certified"]  # type: ignore[operator]


@pytest.mark.parametrize("proves", ["ibp", "crown"])
def test_what_either_method_proves_is_certified(proves: Method) -> None:
    """Of relu(x - 0.4) the line below is x - 0.4, and the interval 0; in relu(x) - relu(x) lines cancel."""
    first, last = nn.Linear(1, 2), nn.Linear(2, 2)
    offsets, weights = ((-0.4, 0.0), (1.0, 0.0)) if proves == "ibp" else ((0.0, 0.0), (1.0, -1.0))
    first.weight.data, first.bias.data = torch.ones(2, 1), torch.tensor(offsets)
    last.weight.data, last.bias.data = torch.tensor([weights, (0.0, 0.0)]), torch.tensor([0.1, 0.0])
    net = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()
    x, labels, ctx = torch.full((1, 1, 1, 1), 0.6), torch.tensor([0]), ctx_of()
    proven = {m: bool((lower_margins(trace(net, x), x, labels, Ball(0.4), m) > 0).all()) for m in ("ibp", "crown")}
    assert proven == {"ibp": proves == "ibp", "crown": proves == "crown"}
    ctx.facts = Facts(
        modality="vision", target="class", input="pixels", input_range=(0.0, 1.0),
        more={"held_out": lambda: {"pixels": x, "labels": labels}},
    )  # fmt: skip
    found = CertifiedAccuracy(eps=0.4)(Run(net, lambda given: net(given["pixels"]), {}, {}, ctx))
    assert found == {"accuracy_certified": 1.0, "accuracy_interval": float(proves == "ibp")}


def test_a_measure_without_its_facts_says_so() -> None:
    plan = small().replace(facts=Digits()().facts.__class__(modality="vision", target="class"))
    with pytest.raises(PlanError, match="input and input_range"):
        run(plan.replace(measures=(Measure("bounds", CertifiedAccuracy()),)))


@pytest.mark.parametrize(
    "fields", [{"eps": -0.1}, {"share": 1.1}, {"start": 0.5, "ramp": 0.6}, {"ramp": -0.1}, {"ease": "fusde"}]
)
def test_impossible_settings_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="CertifiedTraining"):
        CertifiedTraining(**fields)  # type: ignore[arg-type]
    if "ease" not in fields:
        with pytest.raises(PlanError, match="FlatTraining"):
            FlatTraining(**fields)  # type: ignore[arg-type]


def flat_loss(net: nn.Module, eps: float, step: int = 9, share: float = 1.0) -> Tensor:
    ctx, (x, labels) = ctx_of(), batch()
    ctx.steps, ctx.step = 10, step
    rule = FlatTraining(eps=eps, start=0.2, ramp=0.4, share=share)
    return CertifiedLoss(cross_entropy, rule)(net, {"pixels": x, "labels": labels}, ctx)


def test_flat_training_bounds_the_loss_at_all_weights_in_the_grown_balls() -> None:
    net, (x, labels), eps = network(3), batch(), 0.2
    own = F.cross_entropy(net(x), labels).item()
    assert flat_loss(net, eps, step=1).item() == own
    assert flat_loss(net, 0.0).item() == pytest.approx(own, abs=1e-5)
    for step in (3, 5, 9):
        grown, bound = eps * growing(step / 10, 0.2, 0.4), flat_loss(net, eps, step).item()
        tighter = loss_bound(trace_moving(net, x), x, labels, grown).mean().item()
        assert own < tighter <= bound + 1e-5
        graph = trace_moving(net, x)
        found = Propagation(graph, x, weight_balls(graph, grown), "crown-ibp")
        assert bound == pytest.approx(worst_loss(found, labels, "separate", 1.0).mean().item(), rel=1e-6)
        rng = torch.Generator().manual_seed(step)
        for _ in range(50):
            with torch.no_grad(), moved(net, weight_noise(net, grown, rng)):
                assert F.cross_entropy(net(x), labels).item() <= bound
    whole, half = flat_loss(net, eps).item(), flat_loss(net, eps, share=0.5).item()
    assert half == pytest.approx((own + whole) / 2, rel=1e-6)


def test_the_flat_bound_of_one_layer_in_closed_form() -> None:
    net, (x, labels), eps = network(1), batch(), 0.1
    seen = (x.flatten(1).square().sum(1, keepdim=True) + 1).sqrt()
    reach = eps * math.sqrt(2) * seen * (1 - F.one_hot(labels, 12))
    assert flat_loss(net, eps).item() == pytest.approx(F.cross_entropy(net(x) + reach, labels).item(), rel=1e-5)
    both = F.cross_entropy(net(x) + eps * seen * (1 - 2 * F.one_hot(labels, 12)), labels)  # each logit at its own worst
    assert flat_loss(net, eps).item() < both.item() - 0.1


def test_gradients_of_the_flat_bound_are_those_of_differences() -> None:
    net = network(3).double()
    x, labels = batch()
    ctx = ctx_of()
    ctx.steps, ctx.step = 10, 9
    loss, data = CertifiedLoss(cross_entropy, FlatTraining(eps=0.1)), {"pixels": x.double(), "labels": labels}
    loss(net, data, ctx).backward()
    for p in net.parameters():
        assert p.grad is not None
        at, values = p.grad.abs().flatten().argmax(), []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                p.view(-1)[at] += step
                values.append(loss(net, data, ctx).item())
            p.view(-1)[at] += 1e-6
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(p.grad.view(-1)[at].item(), rel=1e-4)


def test_bounds_of_inputs_and_of_weights_in_one_stage_keep_their_graphs_apart() -> None:
    net, (x, labels) = network(2), batch()
    data, ctx = {"pixels": x, "labels": labels}, ctx_of()
    ctx.steps, ctx.step = 10, 9
    both = CertifiedLoss(CertifiedLoss(cross_entropy, CertifiedTraining(share=0.5)), FlatTraining(share=0.5))
    first, again = both(net, data, ctx), both(net, data, ctx)
    alone = [CertifiedLoss(cross_entropy, rule)(net, data, ctx) for rule in (CertifiedTraining(), FlatTraining())]
    expected = 0.25 * cross_entropy(net, data, ctx) + 0.25 * alone[0] + 0.5 * alone[1]
    assert first.item() == again.item() == pytest.approx(expected.item(), rel=1e-5)


def test_flat_training_lowers_the_proven_loss_on_what_it_trains_on() -> None:
    plan = Digits(model="mlp", pretrain_steps=42, finetune_steps=126, finetune_lr=0.05, held_out=130)()
    plan = plan.add_measures(Measure("noise", WeightNoise(eps=0.05, draws=1, proven=130, fact="seen")))
    plain, flat = (run(apply(plan, arm)).scores["loss_proven"] for arm in ([], [FlatTraining(0.05, stage="finetune")]))
    assert plain is not None
    assert flat is not None
    assert flat < 0.7 * plain


def test_the_largest_loss_does_not_overflow() -> None:
    net, (x, labels) = network(3, 60.0), batch()
    found = Propagation(trace(net, x), x, Ball(0.5), "crown-ibp")
    for ease in BOUNDS:
        value = worst_loss(found, labels, ease, 1.0)
        assert value.isfinite().all()
        assert value.max() > math.log(3e38)  # exp of it is no float32


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"norm": "l3"}, "no norm 'l3'"),
        ({"method": "ibp"}, "no method 'ibp': .*crown-ibp"),
        ({"eps": -0.1}, "eps=-0.1"),
        ({"eps": math.inf}, "eps=inf"),
    ],
)
def test_a_measure_that_cannot_be_taken_is_refused_before_training(how, words):
    with pytest.raises(PlanError, match=words):
        CertifiedAccuracy(**how)
