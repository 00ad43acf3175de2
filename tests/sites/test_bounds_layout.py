"""Bounds of models that move the batch axis: those of the same network written batch first, or a refusal."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from balls import generator, on_the_boundary, worst
from torch import Tensor, nn

from perturbed.measures.bounds import Ball, UnsupportedOperator, bounds, lower_margins, trace
from perturbed.measures.bounds.layout import Place
from perturbed.measures.bounds.propagate import Method, Norm

METHODS: tuple[Method, ...] = ("ibp", "crown-ibp", "crown")
WIDTH, HEADS, LENGTH, CLASSES = 8, 2, 5, 3
SLACK = 1e-4


def filled(net: nn.Module, seed: int = 0) -> Any:
    """Weights and running statistics of our own draw, in eval mode."""
    rng = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.7 * p[0].numel() ** -0.5 * torch.randn(p.shape, generator=rng) if p.dim() > 1 else p)
            if p.dim() == 1:
                p.copy_(0.2 * torch.randn(p.shape, generator=rng))
        for m in net.modules():
            if isinstance(m, nn.LayerNorm | nn.BatchNorm1d):
                m.weight.add_(1.0)
            if isinstance(m, nn.BatchNorm1d):
                m.running_mean.normal_(generator=rng)  # type: ignore[union-attr]
                m.running_var.uniform_(0.5, 2, generator=rng)  # type: ignore[union-attr]
    return net.eval()


def sequences(count: int = 3) -> Tensor:
    """Examples [B, T, D]."""
    return torch.randn(7, LENGTH, WIDTH, generator=generator(1))[:count]


class Attention(nn.Module):
    """torch's attention and a linear layer on the mean over time."""

    def __init__(self, batch_first: bool, need_weights: bool = True, heads: int = HEADS):
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, heads, batch_first=batch_first)
        self.out, self.need_weights, self.time = nn.Linear(WIDTH, CLASSES), need_weights, int(batch_first)

    def forward(self, x: Tensor, mask: Tensor | None = None, pad: Tensor | None = None) -> Tensor:
        h, _ = self.attend(x, x, x, attn_mask=mask, key_padding_mask=pad, need_weights=self.need_weights)
        return self.out(h.mean(self.time))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """torch's transformer layer and a linear layer on the mean over time."""

    def __init__(self, batch_first: bool, norm_first: bool = False, act: str = "relu"):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 12, batch_first=batch_first, norm_first=norm_first, activation=act
        )
        self.out, self.time = nn.Linear(WIDTH, CLASSES), int(batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).mean(self.time))  # type: ignore[no-any-return]


def attended(m: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Attention of [B, T, D] with the weights of torch's, in which the batch is axis 0 throughout."""
    q, k, v = (part.view(*part.shape[:2], m.num_heads, -1).transpose(1, 2)
               for part in F.linear(x, m.in_proj_weight, m.in_proj_bias).chunk(3, 2))  # fmt: skip
    shares = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(2, 3), 3)
    return m.out_proj((shares @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class BatchFirst(nn.Module):
    """The network of ``Attention`` or ``Layer``, written by hand on [B, T, D]."""

    def __init__(self, of: Any):
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.of, Attention):
            return self.of.out(attended(self.of.attend, x).mean(1))  # type: ignore[no-any-return]
        layer = self.of.layer
        act = F.relu if layer.activation is F.relu else F.gelu

        def fed(h: Tensor) -> Tensor:
            return layer.linear2(act(layer.linear1(h)))  # type: ignore[no-any-return]

        if layer.norm_first:
            x = x + attended(layer.self_attn, layer.norm1(x))
            x = x + fed(layer.norm2(x))
        else:
            x = layer.norm1(x + attended(layer.self_attn, x))
            x = layer.norm2(x + fed(x))
        return self.of.out(x.mean(1))  # type: ignore[no-any-return]


TORCH: dict[str, Callable[[bool], nn.Module]] = {
    "attention": Attention, "attention without weights": lambda first: Attention(first, False),
    "one head": lambda first: Attention(first, heads=1),
    "layer": Layer, "layer, norms first, gelu": lambda first: Layer(first, True, "gelu"),
}  # fmt: skip


class Sequence(nn.Module):
    """Time first [T, B, D]: positions, a convolution in time, rows in one axis, a scan; [2, B, K]."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(LENGTH, 1, WIDTH))
        self.conv, self.norm = nn.Conv1d(WIDTH, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.rows, self.step, self.out = nn.Linear(6, 6), nn.Linear(12, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv((x + self.place).permute(1, 2, 0))).relu().permute(2, 0, 1)
        h = self.rows(h.reshape(-1, 6)).tanh().view(LENGTH, -1, 6)
        state = x.new_zeros(x.shape[1], 6)
        for now in h.unbind(0)[:2]:
            state = self.step(torch.cat([state, now], 1)).tanh()
        return self.out(torch.stack([state, h.mean(0)]))  # type: ignore[no-any-return]


def by_hand(net: Sequence, x: Tensor) -> Tensor:
    """``Sequence`` of [B, T, D], to [B, 2, K]."""
    h = net.norm(net.conv((x + net.place.transpose(0, 1)).transpose(1, 2))).relu().transpose(1, 2)
    h = net.rows(h).tanh()
    state = torch.zeros(len(x), 6)
    for t in range(2):
        state = net.step(torch.cat([state, h[:, t]], 1)).tanh()
    return net.out(torch.stack([state, h.mean(1)], 1))  # type: ignore[no-any-return]


class Calls(nn.Module):
    def __init__(self, fn: Callable[..., Tensor], **modules: nn.Module):
        super().__init__()
        self.fn = fn
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor, **rest: Tensor) -> Tensor:
        return self.fn(x, **rest)


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize("name", TORCH)
def test_layers_of_torch_have_the_bounds_of_the_same_network_batch_first(name: str, batch_first: bool) -> None:
    net, x = filled(TORCH[name](batch_first)), sequences()
    given, axis = (x, 0) if batch_first else (x.transpose(0, 1), 1)
    graph, plain = trace(net, given, axis=axis), trace(BatchFirst(net), x)
    for method in METHODS:
        low, high = bounds(graph, given, Ball(0.0), method)
        assert torch.allclose(low, net(given), atol=1e-5)
        assert torch.allclose(high, net(given), atol=1e-5)
        for ball in (Ball(0.003), Ball(0.01, "l2"), Ball(0.02, "l1")):
            found = bounds(graph, given, ball, method)
            assert agree(found, bounds(plain, x, ball, method))
            assert not agree(found, bounds(plain, x, Ball(1.01 * ball.eps, ball.norm), method))


@torch.no_grad()
def test_a_network_on_sequences_has_the_bounds_of_the_same_batch_first() -> None:
    net, x = filled(Sequence()), sequences()
    time_first = x.transpose(0, 1)
    graph, plain = trace(net, time_first, axis=1), trace(Calls(lambda z: by_hand(net, z), net=net), x)
    for method in METHODS:
        for ball in (Ball(0.05), Ball(0.2, "l2", legal=(-1.0, 1.0)), Ball(0.5, "l1")):
            found = bounds(graph, time_first, ball, method)
            assert found[0].shape == net(time_first).shape == (2, 3, CLASSES)
            expected = [end.transpose(0, 1) for end in bounds(plain, x, ball, method)]
            assert agree(found, (expected[0], expected[1]))
    rows = torch.randn(1, 4, 2, CLASSES, generator=generator(2))
    assert agree(bounds(graph, time_first, Ball(0.05), rows=rows), bounds(plain, x, Ball(0.05), rows=rows))
    with pytest.raises(ValueError, match="batches of 3, not of 2"):
        bounds(graph, time_first[:, :2], Ball(0.1))


@pytest.mark.parametrize("name", ["attention", "layer", "sequence"])
def test_nothing_in_the_ball_is_out_of_bounds(name: str) -> None:
    net = filled(Sequence() if name == "sequence" else TORCH[name](False))
    x = sequences().transpose(0, 1)
    graph = trace(net, x, axis=1)
    norms: tuple[Norm, ...] = ("linf", "l2", "l1")
    for norm, eps in zip(norms, (0.01, 0.05, 0.1), strict=True):
        near = list(on_the_boundary(x, eps, norm, 30, axis=1))
        if norm == "linf":
            near += [worst(net, x, eps, at) for at in range(CLASSES)]
        with torch.no_grad():
            outputs = torch.stack([net(z) for z in near])
            found = {method: bounds(graph, x, Ball(eps, norm), method) for method in METHODS}
        for method, (low, high) in found.items():
            assert (outputs >= low - SLACK).all(), method
            assert (outputs <= high + SLACK).all(), method
        if norm == "linf":  # bounds so wide would hold of anything
            with torch.no_grad():
                assert (outputs.amax(0) - net(x)).mean() > 0.5 * (found["crown"][1] - net(x)).mean()


@torch.no_grad()
@pytest.mark.parametrize("name", [*TORCH, "sequence"])
def test_an_example_has_the_same_bounds_in_any_company_and_alone(name: str) -> None:
    net = filled(Sequence() if name == "sequence" else TORCH[name](False))
    x = sequences(LENGTH).transpose(0, 1)  # as many examples as moments: only their places tell them apart
    together = bounds(trace(net, x, axis=1), x, Ball(0.003), "crown")
    other = torch.cat([x[:, 2:3], -x[:, :2]], 1)
    in_company = bounds(trace(net, other, axis=1), other, Ball(0.003), "crown")
    alone = bounds(trace(net, x[:, 2:3], axis=1), x[:, 2:3], Ball(0.003), "crown")
    for ends in zip(together, in_company, alone, strict=True):
        assert torch.allclose(ends[0][..., 2, :], ends[1][..., 0, :], rtol=1e-4, atol=1e-5)
        assert torch.allclose(ends[0][..., 2, :], ends[2][..., 0, :], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ends[0][..., 2, :], ends[0][..., 1, :], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_of_padded_sequences_bounds_are_those_of_what_is_not_padding(batch_first: bool, need_weights: bool) -> None:
    net, x, kept = filled(Attention(batch_first, need_weights)), sequences(), (3, 5, 4)
    pad = torch.arange(LENGTH) >= torch.tensor(kept)[:, None]
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    rest = {"pad": pad, "mask": causal}
    first = Calls(lambda z, **held: net.attend(z, z, z, key_padding_mask=held["pad"], attn_mask=held["mask"],
                                               need_weights=need_weights)[0], net=net)  # fmt: skip
    given, axis = (x, 0) if batch_first else (x.transpose(0, 1), 1)
    graph = trace(first, given, rest=rest, axis=axis)
    for method in METHODS:
        whole = [end if batch_first else end.transpose(0, 1) for end in bounds(graph, given, Ball(0.05), method)]
        for i, n in enumerate(kept):
            z = x[i : i + 1, :n] if batch_first else x[i : i + 1, :n].transpose(0, 1)
            short = trace(first, z, rest={"pad": pad[i : i + 1, :n], "mask": causal[:n, :n]}, axis=axis)
            expected = bounds(short, z, Ball(0.05), method)
            for one, other in zip(whole, expected, strict=True):
                assert torch.allclose(one[i, :n], other.flatten(0, 1), atol=1e-4)


@torch.no_grad()
def test_heads_unbound_from_one_projection() -> None:
    """As vision transformers do it: the batch goes behind the axis of query, key and value, and comes back."""
    net, x = filled(Attention(True)), sequences()

    def heads(z: Tensor) -> Tensor:
        m, (batch, length, width) = net.attend, z.shape
        qkv = F.linear(z, m.in_proj_weight, m.in_proj_bias).reshape(batch, length, 3, HEADS, width // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch * length, width)
        return net.out(m.out_proj(h).view(batch, length, width).mean(1))  # type: ignore[no-any-return]

    graph, plain = trace(Calls(heads, net=net), x), trace(BatchFirst(net), x)
    assert agree(bounds(graph, x, Ball(0.01)), bounds(plain, x, Ball(0.01)))
    labels = torch.tensor([0, 2, 1])
    apart = [lower_margins(g, x, labels, Ball(0.01)) for g in (graph, plain)]
    assert torch.allclose(apart[0], apart[1], atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_of_attention_may_move_with_the_input(axis: int) -> None:
    net, x = filled(Attention(axis == 0)), sequences()
    given = x if axis == 0 else x.transpose(0, 1)
    balls = {"attend.in_proj_weight": Ball(0.01), "attend.out_proj.bias": Ball(0.05, "l2"), "out.weight": Ball(0.02)}
    graph, rng = trace(net, given, weights=tuple(balls), axis=axis), generator(4)
    with torch.no_grad():
        every = {m: bounds(graph, given, balls | {"input": Ball(0.01)}, m) for m in METHODS}
        for z in on_the_boundary(given, 0.01, "linf", 30, axis=axis):
            moved = {}
            for name, ball in balls.items():
                step = torch.randn(net.get_parameter(name).shape, generator=rng)
                step = step.sign() if ball.norm == "linf" else step / step.norm()
                moved[name] = net.get_parameter(name) + ball.eps * step
            output = torch.func.functional_call(net, moved, (z,))
            for low, high in every.values():
                assert (output >= low - SLACK).all()
                assert (output <= high + SLACK).all()
    if axis:
        with pytest.raises(UnsupportedOperator, match=r"'linear'.*perturb the input too"):
            trace(net, given, weights=("attend.in_proj_weight",), inputs=False, axis=1)


def rearranged(seed: int) -> Callable[[Tensor], Tensor]:
    """A random chain of reshapes, permutations and affine steps that keeps the examples of a batch apart."""

    def chain(z: Tensor) -> Tensor:
        draw = random.Random(seed)
        for _ in range(10):
            kind, axes = draw.randrange(5), [*range(z.dim())]
            if kind == 0:
                draw.shuffle(axes)
                z = z.permute(axes)
            elif kind == 1 and z.dim() > 2:
                at = draw.choice(axes[:-1])
                z = z.flatten(at, at + 1)
            elif kind == 2:  # the batch of 5 may lie anywhere in such an axis
                at = draw.choice(axes)
                parts = draw.choice([2, 3, 5, 6, 10, 15])
                z = z.view(*z.shape[:at], parts, -1, *z.shape[at + 1 :]) if z.shape[at] % parts == 0 else z
            elif kind == 3 and z.dim() < 5:
                at = draw.choice(axes)
                z = z.unsqueeze(at).expand(*z.shape[:at], 2, *z.shape[at:])
            else:
                z = z * torch.linspace(-1, 2, z.shape[-1]) + z.unsqueeze(0).squeeze(0)
        return z

    return chain


def test_random_rearrangements_are_bounded_exactly_or_refused() -> None:
    """Of a map that is affine in each example, the bounds are its value and the sums of its Jacobian."""
    x, refused = torch.randn(3, 5, 2, generator=generator(5)), []
    for seed in range(60):
        net = Calls(rearranged(seed))
        try:
            graph = trace(net, x, axis=1)
        except UnsupportedOperator as e:
            refused.append(str(e))
            continue
        low, high = bounds(graph, x, Ball(0.1))
        jacobian = torch.autograd.functional.jacobian(net, x).abs().sum((-3, -2, -1))  # type: ignore[no-untyped-call]
        assert torch.allclose(low, net(x) - 0.1 * jacobian, atol=1e-4)
        assert torch.allclose(high, net(x) + 0.1 * jacobian, atol=1e-4)
    assert len(refused) <= 30
    assert all("divides axis" in why for why in refused)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_batch_of_one_has_nothing_to_mix(axis: int) -> None:
    """Whichever of its axes of one is taken for the batch, it is the function of one example that is bounded."""
    x = sequences(1) if axis == 0 else sequences(1).transpose(0, 1)
    weight = torch.randn(WIDTH, generator=generator(9))
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda z: z.unsqueeze(0).select(0, 0).unsqueeze(2).flatten(0, 2) * weight, weight.abs().expand(LENGTH, WIDTH)),
        (lambda z: (z * weight).flatten(0, 1).view(1, 1, -1).sum((0, 1)), weight.abs().repeat(LENGTH)),
        (lambda z: z - z.mean(axis, keepdim=True), torch.zeros_like(x)),
        (lambda z: (z * weight).transpose(0, axis).expand(4, LENGTH, WIDTH).sum((0, 1)), 4 * LENGTH * weight.abs()),
        (lambda z: F.conv1d(z.view(1, 1, -1), torch.ones(1, 1, 2)), torch.tensor(2.0)),
    ]
    for fn, reach in cases:
        low, high = bounds(trace(Calls(fn), x, axis=axis), x, Ball(0.1), "crown")
        assert low.shape == fn(x).shape
        assert torch.allclose(low, fn(x) - 0.1 * reach, atol=1e-5)
        assert torch.allclose(high, fn(x) + 0.1 * reach, atol=1e-5)


def test_pooling_of_what_has_no_batch_is_refused() -> None:
    """A batch of one that was expanded and mixed is one example's, whose first axis is none of images."""
    for fn in (
        lambda z: F.avg_pool1d(z.expand(4, LENGTH, WIDTH) + torch.ones(4, 1, 1), 2),
        lambda z: F.avg_pool2d(z.unsqueeze(1).expand(4, 3, LENGTH, WIDTH) * 2, 2),
    ):
        with pytest.raises(UnsupportedOperator, match="wants the batch as axis 0 of its input, which has none"):
            trace(Calls(fn), sequences(1))


def test_what_stands_beside_the_batch_is_broadcast_to_it() -> None:
    """Fixed values with the batch, with one in its place, or without its axis; alone in an axis and with others."""
    x, rng = torch.randn(3, 5, 2, generator=generator(6)), generator(7)
    for shape in [(3, 5, 2), (3, 1, 2), (1, 5, 1), (5, 2), (5, 1), (2,), (4, 3, 5, 2), (4, 1, 5, 1), (4, 3, 1, 1)]:
        by = torch.randn(shape, generator=rng)
        for net in (lambda z, by=by: z * by - by, lambda z, by=by: by - z / (2 + by.abs())):
            low, high = bounds(trace(Calls(net), x, axis=1), x, Ball(0.1))
            assert torch.allclose((high + low) / 2, net(x), atol=1e-5)
            slope = (net(x + 1) - net(x)).abs()
            assert torch.allclose((high - low) / 2, 0.1 * slope, atol=1e-5)
    same = torch.randn(5, 1, generator=rng)
    low, high = bounds(trace(Calls(lambda z: z * same.expand_as(z) + torch.ones_like(z)), x, axis=1), x, Ball(0.1))
    assert torch.allclose((high - low) / 2, (0.1 * same.abs()).expand(3, 5, 2), atol=1e-5)
    by = torch.randn(15, 2, generator=rng)
    low, high = bounds(trace(Calls(lambda z: z.flatten(0, 1) * by), x, axis=1), x, Ball(0.1))
    assert torch.allclose((high - low) / 2, 0.1 * by.abs(), atol=1e-5)
    low, high = bounds(trace(Calls(lambda z: z.flatten(0, 1) @ by.T), x, axis=1), x, Ball(0.1))
    assert torch.allclose((high - low) / 2, 0.1 * by.abs().sum(1).expand(15, 15), atol=1e-5)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (lambda x: x - x.mean(1, keepdim=True), "'mean'.*axis 1, the batch"),
        (lambda x: x.softmax(1), "'softmax'.*axis 1, the batch"),
        (lambda x: x.permute(1, 2, 0).softmax(0), "'softmax'.*axis 0, the batch"),
        (lambda x: x.flatten(0, 1).sum(0), "'sum.*axis 0, the batch"),
        (lambda x: x.flatten(1).view(4, 2, 16), "'view'.*divides axis 1"),
        (lambda x: x + x.transpose(0, 1), "'add'.*mixes the examples.*axis 1.*axis 0"),
        (lambda x: x[:, :, None] - x[:, None], "'sub'.*mixes the examples"),
        (lambda x: x @ x.transpose(1, 2), "'matmul'.*mixes the examples|'matmul'.*the batch"),
        (lambda x: torch.cat([x, x], 1), "'cat'.*axis 1, the batch"),
        (lambda x: torch.stack([x, x.transpose(0, 1)]), "'stack'.*mixes the examples"),
        (lambda x: x[:, 0], "'select'.*axis 1, the batch"),
        (lambda x: x[:, 1:], "'slice.*axis 1, the batch"),
        (lambda x: F.layer_norm(x, (4, 8)), "'layer_norm'.*the batch"),
        (lambda x: F.linear(x.transpose(1, 2), torch.ones(3, 4)), "'linear'.*axis 2, the batch"),
        (lambda x: F.pad(x, (0, 0, 1, 0)), "'pad'.*the batch"),
        (lambda x: F.conv1d(x, torch.ones(2, 4, 1)), "'conv1d'.*wants the batch as axis 0.*axis 1"),
        (lambda x: F.conv1d(x.flatten(0, 1).unsqueeze(1), torch.ones(2, 1, 1)), "'conv1d'.*together with other"),
        (lambda x: F.conv1d(x[0], torch.ones(4, 4, 1)), "'conv1d'.*no rule where 3 axes are a batch"),
        (lambda x: F.scaled_dot_product_attention(x, x, x), "'scaled_dot_product_attention'.*axis 1, the batch"),
    ],
)  # fmt: skip
def test_what_mixes_examples_is_named_with_its_place(fn: Any, said: str) -> None:
    with pytest.raises(UnsupportedOperator, match=said):
        trace(Calls(fn), torch.randn(4, 4, 8, generator=generator(8)), axis=1)


def test_attention_over_the_batch_by_mistake_is_refused() -> None:
    """A time-first layer given [B, T, D] attends to the other examples."""
    for net in (filled(Attention(False)), filled(Layer(False))):
        with pytest.raises(UnsupportedOperator, match=r"(bmm|scaled_dot_product_attention)'.*the batch"):
            trace(net, sequences(LENGTH))


def test_a_wrong_place_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Place.reshaped

    def exchanged(self: Place, *args: Any) -> Place | None:
        found = right(self, *args)
        return found and Place(found.axis, found.inner, found.outer)

    def staying(self: Place, order: list[int]) -> tuple[list[int], Place]:
        return moved(self, order)[0], self

    moved = Place.permuted
    x = sequences().transpose(0, 1)
    for name, wrong in (("reshaped", exchanged), ("permuted", staying)):
        monkeypatch.setattr(Place, name, wrong)
        with pytest.raises((UnsupportedOperator, RuntimeError)):
            trace(filled(Attention(False)), x, axis=1)
        monkeypatch.undo()
    trace(filled(Attention(False)), x, axis=1)


def test_places_take_values_apart_and_put_them_together() -> None:
    batch = 4
    for place, shape in [
        (Place(0), (4, 2)),
        (Place(2), (3, 2, 4)),
        (Place(1, 3, 2), (5, 24, 2)),
        (Place(0, 3), (12, 2)),
    ]:
        value = torch.arange(math.prod(shape)).view(shape)
        apart = place.apart(value)
        assert apart.shape == (batch, *place.own(shape))
        assert torch.equal(place.together(apart), value)
        axis = place.axis or 0
        number = torch.arange(shape[axis]) // place.inner % batch  # the example of each entry of that axis
        for i in range(batch):
            mine = value.index_select(axis, (number == i).nonzero().squeeze(1))
            assert torch.equal(apart[i].flatten(), mine.flatten())


@torch.no_grad()
def test_only_minus_infinity_in_what_is_added_to_scores_is_a_mask() -> None:
    x = sequences()
    for added in (
        torch.tensor([1, 0, 1, 1, 0]),
        torch.tensor([1, 0, 1, 1, 0]).bool(),
        torch.tensor([0.0, -1e9, 1, 2, 3]),
    ):
        net = Calls(lambda z, added=added: torch.softmax(z[..., :5] + added, -1))
        low, high = bounds(trace(net, x), x, Ball(0.01))
        assert (low <= net(x) + 1e-6).all()
        assert (high >= net(x) - 1e-6).all()
        assert (high - low).max() < 0.02
    masked = Calls(lambda z: torch.softmax(z[..., :5] + torch.tensor([0, 0, 0, -math.inf, -math.inf]), -1))
    fewer = Calls(lambda z: torch.softmax(z[..., :3], -1))
    found, expected = bounds(trace(masked, x), x, Ball(0.1)), bounds(trace(fewer, x), x, Ball(0.1))
    assert agree((found[0][..., :3], found[1][..., :3]), expected)
    assert not found[0][..., 3:].any()


def test_an_axis_that_the_input_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="axis=3, but the input has 3 axes"):
        trace(filled(Layer(True)), sequences(), axis=3)


def test_tracing_leaves_the_fast_path_of_torch_as_it_was() -> None:
    net = filled(Layer(True))
    for fast in (False, True):
        torch.backends.mha.set_fastpath_enabled(fast)
        trace(net, sequences())
        assert torch.backends.mha.get_fastpath_enabled() is fast
