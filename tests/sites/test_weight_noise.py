"""Moving weights: bounds above every loss in the balls, equal to closed forms, and noise that leaves no trace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vision_toys import ctx_of, restless_net, run

from perturbed.core.plan import Measure, Plan
from perturbed.core.run import Engine, Run
from perturbed.core.store import Store
from perturbed.errors import PlanError
from perturbed.measures.bounds import Ball, Propagation, UnsupportedOperator, trace
from perturbed.measures.bounds.propagate import Method
from perturbed.measures.sharpness import (
    WeightNoise,
    layers_of,
    loss_bound,
    moved,
    trace_moving,
    weight_balls,
    weight_noise,
)
from perturbed.plans.digits import Digits

METHODS: tuple[Method, ...] = ("ibp", "crown-ibp", "crown")
LABELS = torch.tensor([0, 3, 1, 4])


class Tokens(nn.Module):
    """One layer at four places of a sequence and twice in a row; classes from the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.out = nn.Linear(16, 16), nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.each(x.view(-1, 4, 16)).relu()
        return self.out(self.each(h).tanh().mean(1))


class MeanOfPlaces(nn.Module):
    """One layer without a bias at four places, of which the mean is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.each(x.view(-1, 4, 16)).mean(1)


NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5)),
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 5)
    ),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False), nn.MaxPool2d(2), nn.GELU(), nn.Flatten(),
        nn.Linear(16, 5),
    ),
    "tokens": Tokens,
    "wide": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5)
    ),
}  # fmt: skip


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(name: str, scale: float = 1.0) -> tuple[nn.Module, Tensor]:
    net = NETS[name]().eval()
    for i, p in enumerate(net.parameters()):
        p.data = draws(*p.shape, seed=i) * (scale * p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
    return net, draws(4, 1, 8, 8, seed=50).sigmoid()


def each_loss(net: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(net(x), LABELS, reduction="none")


def ascended(net: nn.Module, x: Tensor, eps: float, example: int, steps: int = 40) -> list[list[Tensor]]:
    """Moves of the weights within the balls that raise one example's loss, by gradient ascent."""
    layers = layers_of(net)
    by = [[torch.zeros_like(p) for p in layer] for layer in layers]
    for _ in range(steps):
        with moved(net, by):
            found = iter(torch.autograd.grad(each_loss(net, x)[example], [p for layer in layers for p in layer]))
        for shift in by:
            for d, slope in zip(shift, (gradients := [next(found) for _ in shift]), strict=True):
                d += 0.3 * eps * slope / (length(gradients) + 1e-12)
            back = min(1.0, eps / (length(shift) + 1e-12))
            for d in shift:
                d *= back
    return by


def length(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("eps", [0.02, 0.3])
def test_no_weights_in_the_balls_exceed_the_bounds(name: str, eps: float) -> None:
    net, x = made(name)
    graph = trace_moving(net, x)
    with torch.no_grad():
        most = loss_bound(graph, x, LABELS, eps)
        ends = [Propagation(graph, x, weight_balls(graph, eps), method).bounds(graph.output) for method in METHODS]
    rng = torch.Generator().manual_seed(1)
    random = [weight_noise(net, eps, rng) for _ in range(100)]
    climbed = [ascended(net, x, eps, example) for example in range(len(x))]
    assert all(length(layer) <= eps * 1.0001 for by in climbed for layer in by)
    reached = each_loss(net, x).detach()
    with torch.no_grad():
        for by in (*random, *climbed):
            with moved(net, by):
                output = net(x)
            losses = F.cross_entropy(output, LABELS, reduction="none")
            reached = torch.maximum(reached, losses)
            assert (losses <= most + 1e-4).all()
            for low, high in ends:
                assert ((low - 1e-4 <= output) & (output <= high + 1e-4)).all()
    if eps == 0.02:  # a small ball is nearly filled: no factor of a width is lost
        plain = each_loss(net, x).detach()
        assert ((reached - plain) > 0.15 * (most - plain)).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", METHODS[1:])
def test_one_layer_in_closed_form(bias: bool, method: Method) -> None:
    """A margin moves by eps sqrt(2) sqrt(||x||^2 + 1): the norm of its row times that of the input and the bias."""
    net, x, eps = nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=bias)), made("linear")[1], 0.1
    graph, logits = trace_moving(net, x), net(x)
    rows = torch.eye(5)[0] - torch.eye(5)[1:]
    low, high = Propagation(graph, x, weight_balls(graph, eps), method).rows(rows.expand(4, 4, 5))
    reach = eps * math.sqrt(2) * (x.flatten(1).square().sum(1, keepdim=True) + bias).sqrt()
    margins = logits[:, :1] - logits[:, 1:]
    assert low is not None
    assert high is not None
    assert torch.allclose(low, margins - reach, atol=1e-5)
    assert torch.allclose(high, margins + reach, atol=1e-5)
    without = math.sqrt(2) * eps * (x.flatten(1).square().sum(1, keepdim=True) + (not bias)).sqrt()
    assert not torch.allclose(low, margins - without, atol=1e-5)
    seen = torch.cat([x[0].flatten(), torch.ones(int(bias))])
    worst = -eps * torch.outer(rows[2], seen) / (math.sqrt(2) * seen.norm())
    by = [[worst[:, :64], *([worst[:, 64]] if bias else [])]]
    assert length(by[0]) == pytest.approx(eps)
    with torch.no_grad(), moved(net, by):
        z = net(x)[0]
    assert (z[0] - z[3]).item() == pytest.approx(low[0, 2].item(), abs=1e-5)


def test_a_layer_at_several_places_moves_all_of_them_at_once() -> None:
    """The mean over equal places moves as one place does; to count one place of four would be half of that."""
    net, eps = MeanOfPlaces(), 0.1
    x = draws(2, 16, seed=3).repeat(1, 4)
    graph = trace_moving(net, x)
    low, high = Propagation(graph, x, weight_balls(graph, eps), "crown").bounds(graph.output)
    reach = eps * x[:, :16].norm(dim=1, keepdim=True)
    assert torch.allclose(high, net(x) + reach, atol=1e-5)
    assert torch.allclose(low, net(x) - reach, atol=1e-5)
    worst = eps * torch.outer(torch.eye(5)[1], x[0, :16]) / x[0, :16].norm()
    with torch.no_grad(), moved(net, [[worst]]):
        assert net(x)[0, 1].item() == pytest.approx(high[0, 1].item(), abs=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_at_radius_zero_the_bound_is_the_loss(name: str) -> None:
    net, x = made(name)
    assert torch.allclose(loss_bound(trace_moving(net, x), x, LABELS, 0.0), each_loss(net, x), atol=1e-4)


def test_a_larger_ball_has_a_larger_bound_and_the_input_stays() -> None:
    net, x = made("mlp")
    graph = trace_moving(net, x)
    found = [loss_bound(graph, x, LABELS, eps).mean().item() for eps in (0.0, 0.01, 0.1, 0.5)]
    assert all(one < two for one, two in itertools.pairwise(found))
    assert sorted(graph.leaves) == ["input", "weights of linear", "weights of linear_1", "weights of linear_2"]
    assert weight_balls(graph, 0.3)["input"] == Ball(0.0)


def test_it_is_tighter_than_planes_on_each_product() -> None:
    net, x = made("wide")
    names, eps = ("1.weight", "3.weight", "5.weight"), 0.1
    rows = torch.eye(5).expand(4, 5, 5)
    balls = dict.fromkeys(names, Ball(eps, "l2"))
    planes = Propagation(trace(net, x, weights=names, inputs=False), x, balls, "crown-ibp")
    graph = trace_moving(net, x)  # whose biases move too: those of the planes stay
    ours = Propagation(graph, x, weight_balls(graph, eps), "crown-ibp")
    wide, narrow = ((high - low).mean() for low, high in (planes.rows(rows), ours.rows(rows)))  # type: ignore[operator]
    assert narrow < 0.25 * wide


def test_what_drifts_is_what_moved_weights_give() -> None:
    net, x = made("tokens")
    graph = trace_moving(net, x)
    drift = next(n for n in graph.nodes if n.name.endswith("moved"))
    (shift, *_) = weight_noise(net, 0.2, torch.Generator().manual_seed(0))
    h, layer = x.view(-1, 4, 16), layers_of(net)[0]
    added = F.linear(h, *shift)
    n = (h.square().sum(2) + 1).sum(1).sqrt()
    u = added / n.view(-1, 1, 1)
    assert (u.flatten(1).norm(dim=1) <= 0.2).all()
    z = F.linear(h, *layer)
    assert torch.allclose(drift.op.value(z, h, u), z + added, atol=1e-6)


def test_an_input_that_moves_counts_at_its_longest() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    graph = trace_moving(net, torch.zeros(1, 3))
    drift = graph.output
    z, u = torch.tensor([[0.5, -1.0]]), 0.2 * torch.ones(1, 2)
    h = torch.tensor([[-4.0, -1.0, 0.0]]), torch.tensor([[1.0, 3.0, 2.0]])
    low, high = drift.op.interval(drift, (z, z + 1), h, (-u, u))
    n = math.sqrt(4.0**2 + 3.0**2 + 2.0**2 + 1)
    assert torch.allclose(low, z - 0.2 * n)
    assert torch.allclose(high, z + 1 + 0.2 * n)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_reaches_as_far_as_its_window_is_long(groups: int) -> None:
    """Of a layer in groups the window of all is taken, which is more than that of one."""
    net = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=groups)
    x = draws(3, 2, 8, 8)
    graph = trace_moving(net, x)
    low, high = Propagation(graph, x, weight_balls(graph, 0.1), "ibp").bounds(graph.output)
    windows = F.unfold(x, 3, padding=1, stride=2)
    reach = 0.1 * (windows.square().sum(1) + 1).sqrt().view(3, 1, 4, 4)
    assert torch.allclose(high, net(x) + reach, atol=1e-5)
    assert torch.allclose(low, net(x) - reach, atol=1e-5)


def test_gradients_are_those_of_differences() -> None:
    for name in ("mlp", "conv"):
        net, x = made(name)
        net, x = net.double(), x.double()
        graph = trace_moving(net, x)
        loss_bound(graph, x, LABELS, 0.05).sum().backward()
        for layer, p in itertools.product(layers_of(net), (0, -1)):
            weight = layer[p]
            at = weight.grad.abs().flatten().argmax()  # type: ignore[union-attr]
            values = []
            with torch.no_grad():
                for step in (1e-6, -2e-6):
                    weight.view(-1)[at] += step
                    values.append(loss_bound(graph, x, LABELS, 0.05).sum().item())
                weight.view(-1)[at] += 1e-6
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(weight.grad.view(-1)[at].item(), rel=1e-3)  # type: ignore[union-attr]


@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_a_layer_that_sees_only_zeros_has_finite_slopes(eps: float) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False), nn.Tanh(), nn.Linear(4, 5, bias=False))
    net[1].weight.data.zero_()
    x = made("mlp")[1]
    loss_bound(trace_moving(net, x), x, LABELS, eps).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_model_without_such_layers_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.ReLU())
    with pytest.raises(UnsupportedOperator, match="no linear or convolutional layer"):
        trace_moving(net, torch.rand(2, 1, 8, 8))
    with pytest.raises(PlanError, match=r"no torch\.nn\.Linear"):
        weight_noise(net, 0.1, torch.Generator())


@pytest.mark.parametrize("use", ["beside", "tied"])
def test_layers_that_would_not_move_in_the_bound_are_named(use: str) -> None:
    class Aside(nn.Module):
        """A layer on a parameter, or one whose weights are used once more as a matrix."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.place = nn.Linear(5, 5), nn.Linear(5, 5), nn.Parameter(torch.ones(1, 5))

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x)
            return h + self.two(self.place) if use == "beside" else self.two(h) @ self.two.weight

    x = draws(4, 5)
    assert weight_noise(Aside(), 0.1, torch.Generator())[1], "noise moves it"
    with pytest.raises(UnsupportedOperator, match=r"'two\.weight' is used in"):
        trace_moving(Aside(), x)


def test_a_layer_that_shares_its_weight_and_not_its_bias_is_refused() -> None:
    """It moves with the other's weight and with a bias of its own: by up to the root of 2 times the radius."""
    for bias in (True, False):
        net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5, bias=bias))
        net[2].weight = net[0].weight  # type: ignore[assignment]
        if bias:
            by = weight_noise(net, 0.1, torch.Generator().manual_seed(0))
            assert length([by[0][0], *by[1]]) > 0.1
            with pytest.raises(UnsupportedOperator, match="'2' shares a weight"):
                trace_moving(net, draws(4, 5))
        else:
            assert len(trace_moving(net, draws(4, 5)).leaves) == 3


def test_noise_is_as_long_in_each_layer_and_leaves_no_trace() -> None:
    net = restless_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    by = weight_noise(net, 0.7, torch.Generator().manual_seed(0))
    assert [len(layer) for layer in by] == [2, 2]  # of the convolution and the last layer, not of the normalisation
    assert all(length(layer) == pytest.approx(0.7, rel=1e-5) for layer in by)
    with moved(net, by):
        assert torch.equal(net[0].weight, before["0.weight"] + by[0][0])  # type: ignore[index]
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    with pytest.raises(ZeroDivisionError), moved(net, by):
        _ = 1 / 0
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_a_weight_that_two_layers_share_moves_once() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    net[1].weight = net[0].weight
    before, by = net[0].weight.detach().clone(), weight_noise(net, 0.5, torch.Generator().manual_seed(0))
    assert [len(layer) for layer in by] == [2, 1]
    with moved(net, by):
        assert torch.equal(net[1].weight, before + by[0][0])
    assert torch.equal(net[1].weight, before)


def plan(*measures: WeightNoise) -> Plan:
    made = Digits(model="mlp", pretrain_steps=40, finetune_steps=0, held_out=130)()
    return made.add_measures(*(Measure(f"noise {i}", m) for i, m in enumerate(measures)))


def test_the_measure_by_hand() -> None:
    measure = WeightNoise(eps=2.0, draws=3, proven=130)
    engine = Engine(plan(measure), 0, Store(None))
    engine.run()
    with engine.finished("finetune") as done, torch.no_grad():
        found = measure(done)
        test = done.ctx.facts.more["held_out"]()
        accuracies, losses = [], []
        for draw in range(3):
            by = weight_noise(done.model, 2.0, ctx_of().once(f"weight noise {draw}", every="run"))
            with moved(done.model, by):
                logits = done.model(test["pixels"])
            accuracies.append((logits.argmax(1) == test["labels"]).float().mean().item())
            losses.append(F.cross_entropy(logits, test["labels"]).item())
        plain = F.cross_entropy(done.model(test["pixels"]), test["labels"]).item()
    assert found["accuracy_noise"] == pytest.approx(sum(accuracies) / 3)
    assert found["loss_noise"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert found["loss_rise"] == pytest.approx(sum(losses) / 3 - plain, rel=1e-4)
    assert len(set(losses)) == 3
    assert found["loss_proven"] > max(losses)


def test_without_noise_nothing_rises_and_the_proof_is_the_loss() -> None:
    scores = run(plan(WeightNoise(eps=0.0, draws=2, proven=130, suffix="_0"))).scores
    assert scores["loss_rise_0"] == 0.0
    assert scores["accuracy_noise_0"] == scores["accuracy"]
    assert scores["loss_proven_0"] == pytest.approx(scores["loss_noise_0"], rel=1e-4)


def test_arms_of_a_seed_meet_the_same_noise_and_seeds_others() -> None:
    def noise_of(seed: int) -> list[Tensor]:
        found: list[Tensor] = []

        def keep(run: Run) -> dict[str, float]:
            found.extend(weight_noise(run.model, 1.0, run.ctx.once("weight noise 0", every="run"))[0])
            return {}

        for steps in (1, 2):
            shorter = Digits(model="mlp", pretrain_steps=steps, finetune_steps=0, held_out=130)()
            run(shorter.replace(measures=(Measure("keep", keep),)), seed)
        return found

    one, two = noise_of(0), noise_of(1)
    assert torch.equal(one[0], one[2])
    assert not torch.equal(one[0], two[0])


@pytest.mark.parametrize("fields", [{"eps": -0.1}, {"draws": 0}, {"proven": -1}])
def test_impossible_settings_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="WeightNoise"):
        WeightNoise(**fields)  # type: ignore[arg-type]
