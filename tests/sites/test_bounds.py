"""Bounds: exact where they can be, sound everywhere, equal to independent ways of finding them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from balls import generator, on_the_boundary, worst
from torch import Tensor, nn

from perturbed.measures.bounds import (
    Ball,
    Propagation,
    UnsupportedOperator,
    bounds,
    lower_margins,
    margins_of,
    propagate,
    relax,
    trace,
)
from perturbed.measures.bounds.operators import Softmax
from perturbed.measures.bounds.propagate import Method, Norm
from perturbed.measures.bounds.windows import Windows

METHODS: tuple[Method, ...] = ("ibp", "crown-ibp", "crown")
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
SLACK = 1e-4


class Residual(nn.Module):
    """Two paths of different windows, joined by addition and by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.wide, self.narrow, self.out = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2), nn.Linear(28, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        h = (h + self.two(self.one(h).relu())).relu()
        h = torch.cat([(self.wide(h) + self.narrow(h)).relu().flatten(1), h.mean((2, 3))], 1)
        return self.out(h)


class Block(nn.Module):
    """Attention and a feed-forward part with layer norms, on rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.down, self.out = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 5)
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out((x + self.down(F.gelu(self.up(self.second(x))))).mean(1))


class Functions(nn.Module):
    """Elementwise functions of every kind, a product of two perturbed values and a quotient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(64, 6), nn.Linear(64, 6), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x.flatten(1)), self.b(x.flatten(1))
        parts = [a * b.sigmoid(), a.exp() / (1 + b.exp()), F.silu(a) - b**2, (b.tanh() + 2).sqrt() * a.softmax(1)]
        return self.out(torch.cat(parts, 1))


def mlp(act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 5))


def conv(pool: nn.Module | None = None) -> nn.Module:
    pools = [] if pool is None else [pool]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), *pools, nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp, "tanh": lambda: mlp(nn.Tanh), "sigmoid": lambda: mlp(nn.Sigmoid), "gelu": lambda: mlp(nn.GELU),
    "leaky": lambda: mlp(nn.LeakyReLU), "tanh gelu": lambda: mlp(lambda: nn.GELU("tanh")), "conv": conv,
    "max pool": lambda: conv(nn.MaxPool2d(2)), "mean pool": lambda: conv(nn.AvgPool2d(2)), "residual": Residual,
    "block": Block, "functions": Functions,
}  # fmt: skip
CURVED = {"block", "functions", "tanh gelu"}  # of which the intervals soon reach beyond where 1 / z is defined


def filled(net: nn.Module, x: Tensor, scale: float = 1.0) -> nn.Module:
    """Weights of our own draw, at the usual size, and running statistics that are not those of a new network."""
    rng = generator()
    net(x)
    net.eval()
    with torch.no_grad():
        for p in net.parameters():
            spread = scale * p[0].numel() ** -0.5 if p.dim() > 1 else 0.2
            p.copy_(spread * torch.randn(p.shape, generator=rng))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(generator=rng)  # type: ignore[union-attr]
                m.running_var.uniform_(0.5, 2, generator=rng)  # type: ignore[union-attr]
                m.weight.add_(1.0)
            elif isinstance(m, nn.LayerNorm):
                m.weight.add_(1.0)
    return net


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=generator(1))


def made(name: str) -> tuple[nn.Module, Tensor]:
    x = images()
    return filled(NETS[name](), x), x


@pytest.mark.parametrize("name", NETS)
def test_a_ball_of_radius_zero_gives_the_output(name: str) -> None:
    net, x = made(name)
    graph = trace(net, x)
    for method in METHODS:
        low, high = bounds(graph, x, Ball(0.0), method)
        assert torch.allclose(low, net(x), atol=2e-4)
        assert torch.allclose(high, net(x), atol=2e-4)


@pytest.mark.parametrize("name", NETS)
def test_nothing_in_the_ball_is_out_of_bounds_and_lines_are_tighter_than_intervals(name: str) -> None:
    net, x = made(name)
    graph = trace(net, x)
    size = 0.01 if name in CURVED else 0.05
    for norm, eps in zip(NORMS, (size, 4 * size, 10 * size), strict=True):
        found = {m: bounds(graph, x, Ball(eps, norm), m) for m in METHODS}
        near = list(on_the_boundary(x, eps, norm, 40))
        if norm == "linf":
            near += [worst(net, x, eps, at) for at in range(5)]
        with torch.no_grad():
            outputs = torch.stack([net(z) for z in near])
        for method, (low, high) in found.items():
            assert (outputs >= low - SLACK).all(), method
            assert (outputs <= high + SLACK).all(), method
        ibp, mixed, crown = ((high - low).mean().item() for low, high in found.values())
        assert crown <= mixed * 1.001 <= ibp * 1.002


def test_a_wrong_line_is_found_out_by_the_samples() -> None:
    def through_zero(low: Tensor, high: Tensor) -> relax.Lines:
        lines = right(low, high)
        return lines._replace(upper=torch.zeros_like(low))

    right = relax.leaky_relu
    net, x = made("mlp")
    graph = trace(net, x)
    wrong = relax.Activation(torch.relu, through_zero)
    for node in graph.nodes:
        if hasattr(node.op, "activation"):
            node.op.activation = wrong
    low, high = bounds(graph, x, Ball(0.3))
    seen = torch.stack([net(worst(net, x, 0.3, at)) for at in range(5)])
    assert ((seen > high + SLACK) | (seen < low - SLACK)).any()


def test_of_an_affine_network_bounds_are_the_dual_norm() -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Linear(7, 3)), images()
    weight = net[2].weight @ net[1].weight
    for norm, q in zip(NORMS, (1, 2, math.inf), strict=True):
        low, high = bounds(trace(net, x), x, Ball(0.3, norm), "crown")
        reach = 0.3 * weight.norm(q, dim=1)
        assert torch.allclose(low, net(x) - reach, atol=1e-5)
        assert torch.allclose(high, net(x) + reach, atol=1e-5)


def test_of_products_with_a_fixed_matrix_bounds_are_the_dual_norm() -> None:
    x, rng = torch.randn(3, 4, generator=generator(3)), generator(4)
    one, each = torch.randn(4, 5, generator=rng), torch.randn(3, 4, 5, generator=rng)
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda z: z @ one, one), (lambda z: (z.unsqueeze(1) @ each).squeeze(1), each),
        (lambda z: (z.view(3, 1, 1, 4) @ each[:2]).flatten(1), torch.cat([each[0], each[1]], 1)),
    ]  # fmt: skip
    for fn, weight in cases:
        net = Calls(fn)
        low, high = bounds(trace(net, x), x, Ball(0.3), "crown")
        assert torch.allclose(low, net(x) - 0.3 * weight.abs().sum(-2), atol=1e-5)
        assert torch.allclose(high, net(x) + 0.3 * weight.abs().sum(-2), atol=1e-5)


def test_the_legal_range_cuts_the_ball() -> None:
    x = torch.tensor([[0.05, 0.5]])
    net = nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[1.0, -2.0]])
    low, high = bounds(trace(net, x), x, Ball(0.1, legal=(0.0, 1.0)))
    assert (low.item(), high.item()) == pytest.approx((0.0 - 2 * 0.6, 0.15 - 2 * 0.4))


def test_one_relu_by_hand() -> None:
    """relu(z) for z in [-1, 3] lies between z (the chord's slope is above a half) and 3 (z + 1) / 4."""
    x = torch.tensor([[1.0]])
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    for layer in (net[0], net[2]):
        layer.weight.data.fill_(1.0)
        layer.bias.data.fill_(0.0)
    low, high = bounds(trace(net, x), x, Ball(2.0))
    assert (low.item(), high.item()) == pytest.approx((-1.0, 3.0))
    low, _ = bounds(trace(net, x), x, Ball(2.0), "ibp")
    assert low.item() == 0.0


def crown_by_hand(net: nn.Module, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """CROWN of a ReLU network as matrix products, example by example and layer by layer: an independent way."""
    layers = [m for m in net if isinstance(m, nn.Linear)]  # type: ignore[attr-defined]
    ends = []
    for example in x.flatten(1):
        known: list[tuple[Tensor, Tensor]] = []
        for depth in range(len(layers)):
            both = []
            for sign in (-1.0, 1.0):  # the upper bound of sign * z
                a, offset = sign * torch.eye(len(layers[depth].weight)), torch.zeros(len(layers[depth].weight))
                for k in range(depth, -1, -1):
                    offset = offset + a @ layers[k].bias
                    a = a @ layers[k].weight
                    if k:
                        low, high = known[k - 1]
                        slope = high.clamp(min=0) / (high.clamp(min=0) - low.clamp(max=0)).clamp(min=1e-12)
                        below = (slope > 0.5).float()
                        offset = offset + a.clamp(min=0) @ (-slope * low.clamp(max=0))
                        a = a.clamp(min=0) * slope + a.clamp(max=0) * below
                both.append(sign * (a @ example + eps * a.abs().sum(1) + offset))
            known.append((both[0], both[1]))
        ends.append(known[-1])
    return torch.stack([low for low, _ in ends]), torch.stack([high for _, high in ends])


def as_matrices(net: nn.Sequential, shape: tuple[int, ...]) -> nn.Sequential:
    """A convolutional network in eval mode with every affine layer as one matrix."""
    layers: list[nn.Module] = []
    width = math.prod(shape)
    run: list[nn.Module] = []

    def close() -> None:
        nonlocal width, shape
        affine = nn.Sequential(*run)
        zero = affine(torch.zeros(1, *shape))
        weight = (affine(torch.eye(width).view(width, *shape)) - zero).flatten(1).T
        layer = nn.Linear(width, zero.numel())
        layer.weight.data, layer.bias.data = weight, zero.flatten()
        layers.append(layer)
        shape, width = tuple(zero.shape[1:]), zero.numel()
        run.clear()

    for module in net:
        if isinstance(module, nn.ReLU):
            close()
            layers.append(module)
        else:
            run.append(module)
    close()
    return nn.Sequential(*layers).eval()


@torch.no_grad()
@pytest.mark.parametrize("numbers", [2**25, 5000], ids=["at once", "in chunks"])
def test_convolutions_by_windows_are_those_by_matrices(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagate, "NUMBERS", numbers)
    x = torch.rand(2, 2, 10, 9, generator=generator(3))
    net = filled(
        nn.Sequential(
            nn.Conv2d(2, 4, (3, 2), padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1, groups=2), nn.BatchNorm2d(4),
            nn.ReLU(), nn.Conv2d(4, 3, 3, 1, 0, dilation=(2, 1)), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5),
        ), x,
    )  # fmt: skip
    assert isinstance(net, nn.Sequential)
    flat = as_matrices(net, (2, 10, 9))
    assert torch.allclose(flat(x.flatten(1)), net(x), atol=1e-5)
    found = bounds(trace(net, x), x, Ball(0.05))
    for one, other in zip(found, crown_by_hand(flat, x, 0.05), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    trivially_wrong = crown_by_hand(flat, x, 0.051)
    assert not torch.allclose(found[0], trivially_wrong[0], atol=1e-5)


def test_windows_are_what_they_are_as_whole_images() -> None:
    rng = generator(4)
    rows = torch.randn(6, 2, 3, 4, 3, 3, generator=rng)
    one = Windows(rows, torch.tensor([-1, -1, 0, 1, 2, 3]), torch.tensor([-2, 0, 1, 2, 3, 4]), (5, 6))
    image = torch.randn(2, 4, 5, 6, generator=rng)
    whole = one.dense()
    assert torch.allclose(one.dot(image), (whole * image.unsqueeze(1)).flatten(2).sum(2), atol=1e-5)
    assert torch.allclose(one.norm(2), whole.flatten(2).norm(dim=2), atol=1e-5)
    wide = Windows(torch.randn(6, 2, 3, 4, 2, 4, generator=rng), one.top + 2, one.left - 1, (5, 6))
    both = one.plus(wide)
    assert isinstance(both, Tensor) or both.rows.shape[-2:] == (4, 4)
    dense = both if isinstance(both, Tensor) else both.dense()
    assert torch.allclose(dense, whole + wide.dense(), atol=1e-6)
    crooked = Windows(wide.rows, wide.top.flip(0), wide.left, (5, 6))
    summed = one.plus(crooked)
    assert isinstance(summed, Tensor)
    assert torch.allclose(summed, whole + crooked.dense(), atol=1e-6)


@pytest.mark.parametrize("name", relax.ACTIVATIONS)
def test_lines_hold_on_the_whole_interval_and_touch(name: str) -> None:
    activation, rng = relax.ACTIVATIONS[name], generator(5)
    centre, half = 4 * torch.randn(400, generator=rng), 3 * torch.rand(400, generator=rng) ** 3
    if activation.positive:
        centre = centre.abs() + half + 0.05
    low, high = (centre - half).double(), (centre + half).double()
    lines = activation.lines(low, high)
    z = low + (high - low) * torch.linspace(0, 1, 401, dtype=torch.double).unsqueeze(1)
    lower = lines.lower_slope * z + (0.0 if lines.lower is None else lines.lower)
    upper = lines.upper_slope * z + lines.upper
    f = activation.f(z)
    scale = 1 + f.abs().amax(0)
    assert ((f - lower) / scale >= -1e-7).all()
    assert ((upper - f) / scale >= -1e-7).all()
    gap_below, gap_above = (f - lower).amin(0) / scale, (upper - f).amin(0) / scale
    assert (gap_below < 2e-3).all(), "a lower line that touches nowhere is looser than it need be"
    assert (gap_above < 2e-3).all()
    least, most = activation.interval(low, high)
    assert torch.allclose(least, f.amin(0), rtol=1e-2, atol=1e-3)
    assert torch.allclose(most, f.amax(0), rtol=1e-2, atol=1e-3)


def test_the_line_below_an_exponential_stays_positive_however_wide_the_interval() -> None:
    low = torch.tensor([-3.0, 0.0, 2.0, -30.0])
    for width in (0.5, 1.9, 2.1, 20.0):
        lines = relax.exp(low, low + width)
        assert lines.lower is not None
        assert (lines.lower_slope * low + lines.lower > 0).all()
    middle = torch.exp(low + 10)  # the tangent there, of which a sum would have no logarithm
    assert (middle * low + middle * (1 - low - 10) < 0).all()


def test_planes_of_softmax_hold() -> None:
    rng = generator(6)
    for width in (1e-6, 0.1, 1.0, 6.0, 150.0):
        centre = 3 * torch.randn(50, 7, generator=rng, dtype=torch.double)
        low, high = centre - width, centre + width
        for upper, (diagonal, column, row, offset) in zip((False, True), Softmax(1)._tangents(low, high), strict=True):
            for _ in range(60):
                z = low + (high - low) * torch.rand(low.shape, generator=rng, dtype=torch.double).round(decimals=1)
                plane = diagonal * z - column * (row * z).sum(1, keepdim=True) + offset
                assert ((plane - z.softmax(1)) * (1 if upper else -1) >= -1e-6).all()


@pytest.mark.parametrize("width", [1.0, 20.0, 150.0])
def test_shares_of_softmax_are_least_and_largest_however_wide(width: float) -> None:
    """That of the others is no difference of sums: beside a large entry they would be lost."""
    low = 3 * torch.randn(20, 5, generator=generator(6))
    high = low + width * torch.rand(low.shape, generator=generator(7))
    node: Any = None
    for found, own, others in zip(Softmax(1).interval(node, (low, high)), (low, high), (high, low), strict=True):
        for k in range(5):
            z = others.double()
            z[:, k] = own[:, k].double()
            assert torch.allclose(found[:, k].double(), z.softmax(1)[:, k], rtol=1e-4, atol=1e-36)


@pytest.mark.parametrize("name", ["log", "sqrt"])
def test_chords_of_steep_functions_hold_on_narrow_intervals(name: str) -> None:
    """Next to 0 the slope at an end of an interval of 1e-6 is many times the chord's."""
    activation = relax.ACTIVATIONS[name]
    low = torch.logspace(-9, 3, 13, dtype=torch.double)
    for width in (1e-12, 1e-9, 1e-6, 9e-6):
        lines = activation.lines(low, low + width)
        for z in low + width * torch.linspace(0, 1, 11, dtype=torch.double).unsqueeze(1):
            assert (lines.lower_slope * z + lines.lower - activation.f(z) <= 1e-9).all()
        at_high = lines.lower_slope * (low + width) + lines.lower
        assert torch.allclose(at_high, activation.f(low + width), rtol=1e-6)


@torch.no_grad()
def test_one_over_what_may_be_zero_has_no_bounds() -> None:
    x = torch.tensor([[0.05, 0.3], [0.2, -0.3]])
    for fn in (lambda z: 1 / z, lambda z: (1 - z) / z):
        for method in METHODS:
            low, high = bounds(trace(Calls(fn), x), x, Ball(0.1), method)
            without = torch.tensor([[True, False], [False, True]])
            assert low[without].isneginf().all()
            assert high[without].isposinf().all()
            assert (low <= fn(x)).all()
            assert (high >= fn(x)).all()
    low, high = bounds(trace(Calls(lambda z: 1 / z), x[:1, 1:]), x[:1, 1:], Ball(0.1))
    assert torch.allclose(torch.cat([low, high]), torch.tensor([[1 / 0.3 - 0.1 / 0.09], [5.0]]), rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS)
def test_an_output_of_one_number_an_example(norm: Norm) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.tensor(0.5))

        def forward(self, z: Tensor) -> Tensor:
            return 3 * (z.flatten(1).tanh().sum(1) + self.by)

    net, x = Shifted(), images()
    graph = trace(net, x, weights=("by",))
    for method in METHODS:
        still = bounds(graph, x, {"input": Ball(0.0), "by": Ball(0.1, norm)}, method)
        assert torch.allclose(still[0], net(x) - 0.3, atol=1e-4)
        assert torch.allclose(still[1], net(x) + 0.3, atol=1e-4)
        low, high = bounds(graph, x, {"input": Ball(0.1), "by": Ball(0.0)}, method)
        assert low.shape == net(x).shape == (3,)
        assert (low <= net(x - 0.1)).all()
        assert (high >= net(x + 0.1)).all()


@pytest.mark.parametrize("name", ["mlp", "conv", "tanh"])
def test_weights_may_move(name: str) -> None:
    net, x = made(name)
    names = [n for n, p in net.named_parameters() if p.dim() > 1]
    last_bias = [n for n, _ in net.named_parameters()][-1]
    cases: list[tuple[dict[str, Ball], bool]] = [
        ({names[0]: Ball(0.02)}, False), ({names[-1]: Ball(0.1, "l2"), last_bias: Ball(0.05, "l1")}, False),
        ({n: Ball(0.005) for n in names}, True),
    ]  # fmt: skip
    rng = generator(7)
    for balls, with_input in cases:
        graph = trace(net, x, weights=tuple(balls), inputs=with_input)
        every = balls | ({"input": Ball(0.02)} if with_input else {})
        found = [bounds(graph, x, every, method) for method in METHODS]
        assert (found[2][1] - found[2][0]).mean() <= (found[0][1] - found[0][0]).mean() * 1.001
        assert (found[2][1] - found[2][0]).min() > 0
        for _ in range(30):
            moved = {}
            for n, ball in balls.items():
                step = torch.randn(net.get_parameter(n).shape, generator=rng)
                length = (
                    step.abs().max() if ball.norm == "linf" else step.norm() if ball.norm == "l2" else step.abs().sum()
                )
                step = step.sign() if ball.norm == "linf" else step / length
                moved[n] = net.get_parameter(n) + ball.eps * step
            z = next(on_the_boundary(x, 0.02, "linf", 1)) if with_input else x
            with torch.no_grad():
                output = torch.func.functional_call(net, moved, (z,))
            for low, high in found:
                assert (output >= low - SLACK).all()
                assert (output <= high + SLACK).all()


@torch.no_grad()
def test_a_moving_weight_that_two_layers_share_moves_in_both() -> None:
    net, x = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)), torch.ones(2, 3)
    net[2].weight = net[0].weight
    for p in net.parameters():
        p.copy_(0.5 * torch.randn(p.shape, generator=generator(8)))
    graph, weight = trace(net, x, weights=("0.weight",)), net[0].weight.clone()
    assert list(graph.leaves) == ["0.weight", "input"]
    for method in METHODS:
        low, high = bounds(graph, x, {"0.weight": Ball(0.05), "input": Ball(0.0)}, method)
        for seed in range(100):
            step = 0.05 * torch.randn(3, 3, generator=generator(seed)).sign()
            output = torch.func.functional_call(net, {"0.weight": weight + step}, (x,))
            assert (low - 1e-5 <= output).all()
            assert (output <= high + 1e-5).all()


def test_a_moving_last_layer_by_hand() -> None:
    """With the last weight in an l2 ball, each logit reaches eps times the length of the features, up and down."""
    net, x = made("mlp")
    graph = trace(net, x, weights=("5.weight",), inputs=False)
    low, high = bounds(graph, x, {"5.weight": Ball(0.1, "l2")})
    reach = 0.1 * net[:5](x).norm(dim=1, keepdim=True)  # type: ignore[index]
    assert torch.allclose(low, net(x) - reach, atol=1e-5)
    assert torch.allclose(high, net(x) + reach, atol=1e-5)


def test_margins_are_those_of_the_label_to_each_other_class() -> None:
    net, x = made("mlp")
    labels = torch.tensor([0, 4, 2])
    logits = net(x)
    expected = torch.stack([z[y] - torch.cat([z[:y], z[y + 1 :]]) for z, y in zip(logits, labels, strict=True)])
    graph = trace(net, x)
    for method in METHODS:
        assert torch.allclose(lower_margins(graph, x, labels, Ball(0.0), method), expected, atol=1e-5)
    rows = margins_of(labels, 5)
    together = lower_margins(graph, x, labels, Ball(0.05))
    low, high = bounds(graph, x, Ball(0.05))
    apart = (rows.clamp(min=0) @ low.unsqueeze(2) + rows.clamp(max=0) @ high.unsqueeze(2)).squeeze(2)
    assert (together >= apart - 1e-5).all()
    assert (together > apart + 1e-3).any()


def test_bounds_follow_the_weights_and_their_gradient_is_that_of_differences() -> None:
    net, x = made("conv")
    net, x = net.double(), x.double()
    graph = trace(net, x)
    weight = net.get_parameter("3.weight")

    def value() -> Tensor:
        return bounds(graph, x, Ball(0.03), "crown-ibp")[0].sum()

    before = value()
    before.backward()
    assert weight.grad is not None
    direction = torch.randn(weight.shape, generator=generator(8), dtype=torch.double)
    slope = (weight.grad * direction).sum().item()
    ends = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight += step * direction
            ends.append(value().item())
            weight -= step * direction
    assert ends[0] != before.item()
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


class Calls(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (lambda x: torch.sin(x * 2), r"'sin'.*no rule for operator aten.sin"),
        (lambda x: x - x.mean(0), "'mean'.*axis 0, the batch"),
        (lambda x: x.flatten(1).t() @ x.flatten(1), "axis 0"),
        (lambda x: x.sum(), "sums over all axes"),
        (lambda x: F.pad(x, (1, 1), value=2.0), "another number than 0"),
        (lambda x: torch.ones(2, 3), "does not depend on what is perturbed"),
        (lambda x: (x**3).sum((1, 2, 3)), "power 3"),
    ],
)  # fmt: skip
def test_what_has_no_rule_is_named_with_its_place(fn: Any, said: str) -> None:
    with pytest.raises(UnsupportedOperator, match=said):
        trace(Calls(fn), images())


def test_wrong_uses_are_named() -> None:
    net, x = made("mlp")
    with pytest.raises(UnsupportedOperator, match="no parameter is called 'nowhere'"):
        trace(net, x, weights=("nowhere",))
    net.register_parameter("idle", nn.Parameter(torch.ones(2)))
    with pytest.raises(UnsupportedOperator, match="no operator of the graph reads 'idle'"):
        trace(net, x, weights=("idle",))
    graph = trace(net, x)
    with pytest.raises(ValueError, match="batches of 3, not of 2"):
        bounds(graph, x[:2], Ball(0.1))
    with pytest.raises(ValueError, match=r"no method 'crwn'.*crown"):
        Propagation(graph, x, Ball(0.1), "crwn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"want a ball for each of input, got them for 5\.weight"):
        bounds(graph, x, {"5.weight": Ball(0.1)})
    with pytest.raises(ValueError, match="no norm"):
        Ball(0.1, "l3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not negative"):
        Ball(-0.1)


def test_a_network_that_draws_at_each_call_is_refused() -> None:
    with pytest.raises(UnsupportedOperator, match="does not compute what the model does"):
        trace(Calls(lambda x: x.flatten(1) + torch.randn(3, 64)), images())


def test_what_is_written_over_through_a_view_is_refused_though_the_example_shows_no_difference() -> None:
    def by_view(x: Tensor) -> Tensor:
        h = x * 2
        h.flatten(1).relu_()  # nothing changes where all are positive
        return h - 2 * x

    def of_view(x: Tensor) -> Tensor:
        h = x * 2
        part = h[:, :, :2]
        h.relu_()
        return part - 2 * x[:, :, :2]

    x = images() + 0.1
    for fn in (by_view, of_view):
        with pytest.raises(UnsupportedOperator, match=r"'sub'.*written over"):
            trace(Calls(fn), x)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Unflatten(1, (2, 2)), nn.ReLU(inplace=True))
    assert (bounds(trace(net, x), x, Ball(0.01))[1] >= 0).all()


def test_tracing_leaves_the_modes_of_the_modules() -> None:
    net, x = made("conv")
    net.train()
    net[0].eval()  # type: ignore[index]
    modes = [m.training for m in net.modules()]
    trace(net, x)
    assert [m.training for m in net.modules()] == modes


def test_a_vision_transformer_of_transformers() -> None:
    from perturbed.plans.digits import vit

    x = images(2)
    net = filled(vit(4), x, 0.7)
    graph = trace(net, x)
    eps = 0.002
    found = [bounds(graph, x, Ball(eps), method) for method in METHODS]
    with torch.no_grad():
        for z in on_the_boundary(x, eps, "linf", 30):
            output = net(z).logits
            for low, high in found:
                assert (output >= low - SLACK).all()
                assert (output <= high + SLACK).all()
    assert (found[2][1] - found[2][0]).mean() < (found[0][1] - found[0][0]).mean()
