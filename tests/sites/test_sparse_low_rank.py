"""Replacing modules by name, sparse plus low-rank layers, and what a model takes to train and store."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from own_models import WORDS, bert, generator, llama, unet, vit
from torch import nn

import perturbed.weights.sparse_low_rank as site
from perturbed.core.context import Ctx
from perturbed.core.plan import Facts, Measure, Plan, Stage, apply
from perturbed.core.run import Engine, Run, accelerator
from perturbed.core.store import Store
from perturbed.core.streams import Streams
from perturbed.errors import PlanError
from perturbed.measures.parameters import Ranks, Storage, effective_rank, storage
from perturbed.optim.optimisers import AdamW
from perturbed.weights.replace import replace_modules
from perturbed.weights.sparse_low_rank import SparseLowRank, SparseLowRankLinear, dense_weight, merged


def context(seed=0):
    return Ctx(Streams(seed), accelerator(), Facts(modality="language", target="next-token"))


def layer(rank=3, density=0.2, scale=0.25, bias=True, columns=10, rows=7):
    """A layer away from its start, where ``up`` is 0."""
    made = SparseLowRankLinear(columns, rows, rank, density, scale, bias, generator())
    if made.up is not None:
        made.up.data = torch.randn(rows, rank, generator=generator(1))
    return made


def by_hand(made):
    """The dense weight entry after entry, from the definition."""
    rows, columns = made.out_features, made.in_features
    made = copy.deepcopy(made).requires_grad_(False)
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            if made.rank:
                weight[i, j] = made.scale * sum(float(made.up[i, r] * made.down[r, j]) for r in range(made.rank))
    if made.values is not None:
        for place, value in zip(made.support.tolist(), made.values.flatten().tolist(), strict=True):
            weight[place // columns, place % columns] += value
    return weight


# ---- replacing ----------------------------------------------------------------------------------------------------


def test_replaces_what_matches_in_its_place_and_nothing_else():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)))
    first, seen = model[0], []
    replace_modules(model, "2.*", lambda name, m: seen.append(name) or nn.Bilinear(1, 1, m.out_features))
    assert seen == ["2.0", "2.1"]
    assert model[0] is first
    assert [m.out_features for m in model[2]] == [4, 5]
    assert [n for n, _ in model.named_children()] == ["0", "1", "2"]
    assert all(isinstance(m, nn.Bilinear) for m in model[2])


def test_a_module_under_two_names_is_made_once_and_stays_shared():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}).eval()
    replace_modules(model, "*", lambda name, m: nn.Identity())
    assert model["a"] is model["b"][0]
    assert not model["a"].training


def test_a_model_that_matches_itself_is_returned_anew():
    assert isinstance(replace_modules(nn.Linear(2, 2), "*", lambda name, m: nn.Identity()), nn.Identity)


def test_nothing_to_replace_is_told_with_the_nearest_name():
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    with pytest.raises(PlanError, match=r"'projj' matches no Linear .* did you mean 'proj'"):
        replace_modules(model, "projj", lambda name, m: m)
    with pytest.raises(PlanError, match="matches no Linear"):
        replace_modules(model, "norm", lambda name, m: m)


def test_tied_weights_are_not_parted():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(PlanError, match=r"head\.weight is also embed\.weight"):
        replace_modules(model, "*", lambda name, m: nn.Identity())
    assert replace_modules(model, "*", lambda name, m: m) is model, "what stays is not parted"


# ---- the layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "density"), [(3, 0.2), (3, 0.0), (0, 0.2), (0, 1.0)])
def test_weight_and_output_are_those_of_the_definition(rank, density):
    made = layer(rank, density)
    weight = by_hand(made)
    torch.testing.assert_close(made.weight.double(), weight, rtol=0, atol=1e-6)
    x = torch.randn(2, 5, 10, generator=generator(2))
    torch.testing.assert_close(made(x).double(), x.double() @ weight.T + made.bias.double(), rtol=0, atol=1e-5)
    if rank and density:
        wrong = layer(rank, density, scale=1.0)
        wrong.values.data *= 0.25  # the scale is of the product alone
        wrong.up.data *= 0.25
        wrong_weight = by_hand(wrong)
        assert (made.weight.double() - wrong_weight).abs().max() > 0.05


def test_support_is_fixed_distinct_and_as_large_as_the_density_says():
    made = SparseLowRankLinear(64, 48, 4, 0.03, rng=generator())
    assert len(made.support) == math.floor(0.03 * 64 * 48) == made.values.numel() == 92
    assert made.support.unique().tolist() == made.support.tolist()
    assert 0 <= made.support[0] < made.support[-1] < 64 * 48
    assert "support" in made.state_dict()
    assert "support" not in dict(made.named_parameters())
    assert sum(p.numel() for p in made.parameters()) == 4 * (48 + 64) + 92
    counts = torch.zeros(12)
    g = generator(5)
    for _ in range(4000):
        counts[SparseLowRankLinear(4, 3, 1, 0.25, rng=g).support] += 1
    assert counts.sum() == 4000 * 3
    assert ((counts - 1000) / math.sqrt(4000 * 0.25 * 0.75)).abs().max() < 4.5, "some place is drawn more often"


def test_starts_as_the_sparse_part_alone_with_draws_of_the_stated_size():
    made = SparseLowRankLinear(400, 300, 20, 0.5, bias=True, rng=generator())
    assert made.weight.count_nonzero() == 60_000
    for drawn, fan in ((made.values, 400), (made.down, 400), (made.bias, 300)):
        bound = 1 / math.sqrt(fan)
        assert drawn.abs().max() <= bound
        assert drawn.abs().max() > 0.97 * bound
        assert float(drawn.detach().double().mean()) == pytest.approx(0, abs=4 * bound / math.sqrt(3 * drawn.numel()))
    product = SparseLowRankLinear(400, 300, 20, 0.0, 1.0, rng=generator())
    assert float(product.weight.detach().var()) == pytest.approx(1 / (9 * 400), rel=0.1)  # as two linear layers
    assert torch.linalg.matrix_rank(product.weight) == 20


def test_gradients_are_those_of_plain_autograd_and_of_finite_differences():
    made = layer().double()
    x = torch.randn(2, 4, 10, dtype=torch.float64, generator=generator(2), requires_grad=True)
    names, parts = zip(*made.named_parameters(), strict=True)
    assert set(names) == {"values", "down", "up", "bias"}
    weighting = torch.randn(2, 4, 7, dtype=torch.float64, generator=generator(3))
    ours = torch.autograd.grad((made(x) * weighting).sum(), (x, *parts))
    plain = torch.autograd.grad((F.linear(x, made.weight, made.bias) * weighting).sum(), (x, *parts))
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    shape = (7, 10)

    def outputs(x, up, down, values, bias):
        return site._Product.apply(x, up, down, values, made.support, bias, 0.25, shape)

    assert torch.autograd.gradcheck(outputs, (x, made.up, made.down, made.values, made.bias))
    # the entries get the gradient of the dense weight at their places, and no other's
    dense = torch.einsum("bto,bti->oi", weighting, x).flatten()
    torch.testing.assert_close(ours[1 + names.index("values")].flatten(), dense[made.support])
    shifted = dense[(made.support + 1) % 70]
    assert not torch.allclose(ours[1 + names.index("values")].flatten(), shifted)


def test_frozen_parts_and_inputs_get_no_gradient():
    made = layer()
    made.values.requires_grad_(False)
    made(torch.randn(4, 10)).sum().backward()
    assert made.values.grad is None
    assert made.up.grad is not None
    assert made.down.grad is not None


def test_no_dense_weight_is_saved_for_the_backward_pass_or_in_the_checkpoint():
    made, x = layer(columns=40, rows=30, bias=False), torch.randn(8, 40, requires_grad=True)

    def saved(forward):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            forward(x)
        return sizes

    assert 30 * 40 not in saved(made)
    assert sum(saved(made)) == x.numel() + 3 * (30 + 40) + 2 * 240
    assert 30 * 40 in saved(lambda x: F.linear(x, made.weight)), "the test would see one"
    assert all(t.numel() < 30 * 40 for t in made.state_dict().values())
    assert "support" in made.state_dict()


def test_whole_support_without_product_is_a_dense_layer():
    dense = nn.Linear(10, 7, bias=False)
    whole = SparseLowRank(rank=0, density=1.0, start="layer").layer(dense, generator())
    x = torch.randn(3, 5, 10)
    assert torch.equal(whole(x), dense(x))
    assert set(whole.state_dict()) == {"values"}
    for module in (whole, dense):
        module(x).square().sum().backward()
    assert torch.equal(whole.values.grad.view(7, 10), dense.weight.grad)


def test_merging_leaves_every_output_as_it_was_and_the_model_alone():
    model = SparseLowRank(rank=3, density=0.1, where="*layers*").rewrite(llama(), context()).eval()
    for module in model.modules():
        if isinstance(module, SparseLowRankLinear):
            module.up.data.normal_(generator=generator())
    ids = torch.randint(WORDS, (2, 6), generator=generator())
    dense = merged(model)
    assert torch.equal(dense(ids).logits, model(ids).logits)
    assert not any(isinstance(m, SparseLowRankLinear) for m in dense.modules())
    assert set(dense.state_dict()) == set(llama().state_dict())
    fresh = llama().eval()
    fresh.load_state_dict(dense.state_dict())  # a checkpoint that anyone can load
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert any(isinstance(m, SparseLowRankLinear) for m in model.modules())
    with_bias = layer()
    x = torch.randn(4, 10)
    assert torch.equal(with_bias.merge()(x), with_bias(x))


def test_works_under_autocast():
    made, x = layer(), torch.randn(4, 10, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    for p in (x, *made.parameters()):
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()
    torch.testing.assert_close(out.float(), made(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("rank", "density"), [(-1, 0.5), (1, -0.1), (1, 1.1), (0, 0.0), (0, 0.001)])
def test_impossible_sizes_are_told(rank, density):
    with pytest.raises(PlanError, match="rank="):
        SparseLowRankLinear(10, 10, rank, density)


# ---- the intervention ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Made:
    """Build slot and data of a real class."""

    kind: str

    def __call__(self, ctx):
        return {"llama": llama, "bert": bert, "vit": vit, "unet": unet}[self.kind]()


@dataclasses.dataclass(frozen=True)
class Fed:
    kind: str

    def __call__(self, ctx):
        return self

    def __next__(self):
        g = generator(1)
        if self.kind in ("llama", "bert"):
            return {"input_ids": torch.randint(WORDS, (4, 6), generator=g)}
        return {"pixels": torch.rand(4, 1, 8, 8, generator=g)}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def outputs(model, batch, ctx):
    x = next(iter(batch.values()))
    return model(x, 3).sample if isinstance(x, torch.Tensor) and "UNet" in type(model).__name__ else model(x).logits


def loss(model, batch, ctx):
    return (outputs(model, batch, ctx) - 1).square().mean()


def plan_of(kind, stages=("pretrain",)):
    made = [Stage(name=n, steps=3, data=Fed(kind), loss=loss, optim=AdamW(1e-2)) for n in stages]
    return Plan(
        build=Made(kind), stages=tuple(made), predict=outputs, facts=Facts(modality="any", target="one"),
        measures=(Measure("storage", Storage()),),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "where", "layers"),
    [("llama", "*layer*", 7), ("bert", "*layer*", 6), ("vit", "*layer*", 6), ("unet", "*attentions*", 16)],
)
def test_trains_real_classes_unchanged(kind, where, layers):
    plan = plan_of(kind)
    treated = apply(plan, [SparseLowRank(rank=2, density=0.1, where=where)])
    engine = Engine(treated, 0, Store(None))
    result = engine.run()
    assert result.diverged is None
    ours = {n: m for n, m in engine.model_at("pretrain").named_modules() if isinstance(m, SparseLowRankLinear)}
    assert len(ours) == layers
    start = SparseLowRank(rank=2, density=0.1, where=where).rewrite(engine.model_at("init"), context())
    for name, module in ours.items():
        begun = start.get_submodule(name)
        assert torch.equal(module.support, begun.support)
        assert not torch.equal(module.values, begun.values)
    assert result.scores["parameters_trained"] < Engine(plan, 0, Store(None)).run().scores["parameters_trained"]


def test_layers_draw_apart_and_each_seed_its_own():
    made = [SparseLowRank(rank=2, density=0.1).rewrite(llama(), context(seed)) for seed in (0, 0, 1)]
    one, same, other = ({n: p for n, p in m.state_dict().items() if "self_attn" in n} for m in made)
    assert all(torch.equal(one[n], same[n]) for n in one)
    supports = [n for n in one if n.endswith("support")]
    assert not any(torch.equal(one[n], other[n]) for n in supports)
    assert not torch.equal(one[supports[0]], one[supports[1]])


def test_a_later_stage_goes_on_with_the_layers_of_the_earlier():
    plan = plan_of("llama", ("pretrain", "finetune")).edit("finetune", lambda s: dataclasses.replace(s, steps=0))
    engine = Engine(apply(plan, [SparseLowRank(rank=2, density=0.1)]), 0, Store(None))
    one, two = (engine.model_at(s).state_dict() for s in ("pretrain", "finetune"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_frozen_sparse_part_does_not_move():
    plan = apply(plan_of("llama"), [SparseLowRank(rank=2, density=0.1, train_sparse=False)])
    engine = Engine(plan, 0, Store(None))
    after = engine.model_at("pretrain")
    start = SparseLowRank(rank=2, density=0.1, train_sparse=False).rewrite(engine.model_at("init"), context())
    for name, module in after.named_modules():
        if isinstance(module, SparseLowRankLinear):
            assert torch.equal(module.values, start.get_submodule(name).values)
            assert not torch.equal(module.down, start.get_submodule(name).down)


def test_precision_device_and_bias_are_those_of_the_layer():
    old = nn.Linear(10, 7).double()
    new = SparseLowRank(rank=2, density=0.5, start="layer").layer(old, generator())
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    assert new.support.dtype == torch.int64
    assert torch.equal(new.bias, old.bias)
    assert torch.equal(new.weight.flatten()[new.support], old.weight.flatten()[new.support])
    paper = SparseLowRank(rank=2, density=0.5).layer(old, generator())
    assert not torch.equal(paper.bias, old.bias)


def test_a_product_alone_begins_random_since_blocks_of_zeros_never_leave_zero():
    batch = {"input_ids": torch.randint(WORDS, (4, 6), generator=generator())}

    def moved(zero):
        model = SparseLowRank(rank=2, density=0.0).rewrite(llama(), context())
        layers = [m for m in model.modules() if isinstance(m, SparseLowRankLinear)]
        for layer in layers:
            assert bool((layer.up != 0).any())
            layer.up.data.mul_(not zero)
        outputs(model, batch, None).square().sum().backward()
        return [bool((layer.up.grad != 0).any()) for layer in layers]

    assert all(moved(zero=False))
    assert not any(moved(zero=True))


def test_impossible_settings_are_told():
    with pytest.raises(PlanError, match="no start 'papper': did you mean 'paper'"):
        SparseLowRank(start="papper")
    with pytest.raises(PlanError, match="density=2"):
        SparseLowRank(density=2)


# ---- what a model takes -------------------------------------------------------------------------------------------


def test_storage_counts_tied_tensors_once_and_places_as_bytes():
    made = layer(bias=False)
    assert storage(made) == {
        "parameters_trained": 3 * 17 + 14, "parameters_stored": 3 * 17 + 14,
        "megabytes_stored": ((3 * 17 + 14) * 4 + 14 * 8) / 1e6,
    }  # fmt: skip
    made.values.requires_grad_(False)
    assert storage(made)["parameters_trained"] == 3 * 17
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    tied["head"].weight = tied["embed"].weight
    assert storage(tied) == {"parameters_trained": 20, "parameters_stored": 20, "megabytes_stored": 80 / 1e6}


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(6)) == (6, pytest.approx(6))
    assert effective_rank(torch.ones(4, 9)) == (1, pytest.approx(1, abs=1e-6))
    shares = torch.tensor([0.5, 0.25, 0.25])
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator()))[0]
    rank, effective = effective_rank(rotation @ torch.diag(shares) @ rotation.T)
    assert rank == 3
    assert effective == pytest.approx(2**1.5, rel=1e-5)  # entropy of 1/2, 1/4, 1/4 is 1.5 bits


def test_a_sparse_part_fills_the_spectrum_that_a_product_leaves_empty():
    found = {}
    for density in (0.0, 0.3):
        model = nn.ModuleDict({"layer": SparseLowRankLinear(20, 20, 3, density, 1.0, rng=generator())})
        ctx = context()
        ctx.model = model
        found[density] = Ranks()(Run(model, lambda batch: batch, {}, {}, ctx))
    assert found[0.0]["rank_share"] == pytest.approx(3 / 20)
    assert found[0.3]["rank_share"] > 0.9
    assert found[0.0]["effective_rank_share"] <= 3 / 20 < found[0.3]["effective_rank_share"]
    with pytest.raises(PlanError, match="no module with a weight matrix"):
        list(Ranks("nowhere").weights(copy.deepcopy(model)))


def test_dense_weight_adds_where_product_and_entries_meet():
    up, down = torch.ones(2, 1), torch.full((1, 3), 2.0)
    weight = dense_weight((2, 3), up, down, 0.5, torch.tensor([10.0, 20.0]), torch.tensor([1, 5]))
    assert weight.tolist() == [[1, 11, 1], [1, 1, 21]]
