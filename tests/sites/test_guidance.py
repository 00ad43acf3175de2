"""Guidance: the closed form, the work that it saves, and that nothing of it stays in the model."""

import ast
import dataclasses
import itertools
import runpy
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from own_models import generator, unet
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from perturbed.core.context import Ctx
from perturbed.core.plan import Facts, Plan, Stage, apply
from perturbed.core.run import accelerator, threads
from perturbed.core.streams import Streams
from perturbed.errors import PlanError
from perturbed.features.attention import edited_attention, identity_map, matching
from perturbed.inference.guidance import (
    ClassifierFree,
    Guided,
    Labels,
    PerturbedAttention,
    Prefix,
    Unlabelled,
    combine,
    guide,
    perturbed_attention,
)
from perturbed.objectives.diffusion import LABELS, NOISY, TIMESTEPS, NoiseSchedule, denoise, predict_noise
from perturbed.plans.digits_diffusion import dit as wide_dit
from perturbed.plans.digits_diffusion import unet as labelled_unet

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_pipeline.py"
MID, BLOCK = "mid_block.attentions.*", "transformer_blocks.2.attn1"


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):  # as the engine sets it; two threads on a busy machine wait for each other
        yield


def seeded(make, *args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(*args).eval().requires_grad_(False)
        for p in model.parameters():  # a DiT begins with gates of zero, at which no layer does anything
            nn.init.normal_(p, std=0.2) if p.dim() > 1 else None
        return model


MODELS = {"unet": (lambda: seeded(labelled_unet, 8), MID), "dit": (lambda: seeded(wide_dit, 4), BLOCK)}


def context(model):
    facts = Facts(
        modality="diffusion", target="noise", output="noise", classes=10, input="pixels",
        more={"schedule": NoiseSchedule()},
    )  # fmt: skip
    ctx = Ctx(Streams(0), accelerator(), facts)
    ctx.model = model
    return ctx


def batch(size=4):
    g = generator(1)
    x, t = torch.randn(size, 1, 8, 8, generator=g), torch.randint(0, 1000, (size,), generator=g)
    return {NOISY: x, TIMESTEPS: t, LABELS: torch.arange(size) % 10}


def plain(model, given):
    return denoise(model, given[NOISY], given[TIMESTEPS], given[LABELS])


def spoilt(model, given, where):
    with edited_attention(model, matching(model, where), identity_map):
        return plain(model, given)


def predict(model, given, *away):
    return Guided(predict_noise, away)(model, given, context(model))


def bare_plan(predict):
    return Plan(
        build=lambda ctx: unet(), stages=(Stage(name="none"),), predict=predict, measures=(),
        facts=Facts(modality="diffusion", target="noise", output="noise", classes=10),
    )  # fmt: skip


def test_combine_follows_the_difference_from_the_base():
    base, a, b = (torch.randn(3, generator=generator(i)) for i in range(3))
    assert torch.equal(combine(base, a, b, 0.0), base)
    assert torch.allclose(combine(base, a, b, 2.5), base + 2.5 * a - 2.5 * b)


# --- the prefix ---


def calls(model, run):
    """How often each leaf module computes while ``run`` runs, by name, and the operations."""
    found, leaves = {}, {n: m for n, m in model.named_modules() if not list(m.children())}

    def counting(name, forward):
        def count(*args, **kwargs):
            found[name] = found.get(name, 0) + 1
            return forward(*args, **kwargs)

        return count

    for name, module in leaves.items():
        module.forward = counting(name, module.forward)
    with FlopCounterMode(display=False) as counter:
        run()
    for module in leaves.values():
        del module.forward
    return found, counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_the_second_pass_computes_only_what_comes_after_the_first_changed_layer(name):
    make, where = MODELS[name]
    model, given = make(), batch()
    prefix = Prefix(model, matching(model, where))

    def first():
        with prefix.recorded():
            plain(model, given)

    def second():
        with prefix.replayed():
            return plain(model, given)

    once, all_flops = calls(model, first)
    again, few_flops = calls(model, second)
    naive, flops = calls(model, lambda: plain(model, given))
    assert once == naive
    assert all_flops == flops
    early, late = {
        "unet": (("conv_in", "down_blocks", "time_embedding", "mid_block.resnets.0"), ("mid_block.attentions", "up_")),
        "dit": (("pos_embed", "transformer_blocks.0.", "transformer_blocks.1."), ("transformer_blocks.2.attn1",)),
    }[name]
    # the last norm of a DiT asks the embedding within its first block once more
    repeated = {n for n in again if n.startswith(early)}
    assert all(n.startswith("transformer_blocks.0.norm1.emb.") and again[n] == 1 < naive[n] for n in repeated)
    assert {n for n in naive if n.startswith(late)} <= set(again)
    assert few_flops < {"unet": 0.8, "dit": 0.6}[name] * flops
    assert torch.equal(second(), plain(model, given))
    whole, _ = calls(model, lambda: predict(model, given, PerturbedAttention(where=where)))
    assert whole == {n: once[n] + again.get(n, 0) for n in once}


class Writing(nn.Module):
    """Writes in place, calls one module twice, and then does something of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.shared, self.last = nn.Linear(4, 4), nn.ReLU(inplace=True), Inner(), nn.Linear(4, 4)

    def forward(self, x):
        x = self.act(self.first(x))
        x = self.shared(x)
        x += 1.0  # after the module that made it has finished
        x = self.shared.linear(x) * 2
        return self.last(x)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) + 1


@torch.no_grad()
def test_outputs_that_were_written_over_are_computed_anew():
    model = seeded(Writing)
    x = torch.randn(5, 4, generator=generator())
    expected = model(x)
    prefix = Prefix(model, [model.last])
    with prefix.recorded():
        assert torch.equal(model(x), expected)
    for _ in range(2):
        with prefix.replayed():
            assert torch.equal(model(x), expected)
    with torch.inference_mode():
        with prefix.recorded():
            model(x)
        assert not prefix._kept, "inference mode does not tell what is written over"
        with prefix.replayed():
            assert torch.equal(model(x), expected)
    assert not any("forward" in vars(m) for m in model.modules())


# --- guided predictions ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_guidance_is_its_closed_form_of_two_whole_passes_bit_for_bit(name, scale):
    make, where = MODELS[name]
    model, given = make(), batch()
    good, bad = plain(model, given), spoilt(model, given, where)
    assert (good - bad).abs().max() > 1e-4
    assert torch.equal(predict(model, given, PerturbedAttention(scale, where)), good + scale * (good - bad))
    if scale == 0:
        assert torch.equal(predict(model, given, PerturbedAttention(scale, where)), good)
    else:  # the released code's g is one more
        released = bad + (scale + 1) * (good - bad)
        assert torch.allclose(predict(model, given, PerturbedAttention(scale, where)), released, atol=1e-5)
        assert not torch.allclose(bad + scale * (good - bad), released, atol=1e-5)
    assert torch.equal(plain(model, given), good)
    assert not any("forward" in vars(m) for m in model.modules())


def test_spoiling_nothing_is_plain_sampling_bit_for_bit():
    for make, where in MODELS.values():
        model, given = make(), batch()
        assert torch.equal(predict(model, given, PerturbedAttention(5.0, where, strength=0.0)), plain(model, given))


def test_a_neighbour_s_difference_has_the_same_size_in_another_place():
    model, given = seeded(labelled_unet, 8), batch()
    good = plain(model, given)
    own = predict(model, given, PerturbedAttention(1.0)) - good
    other = predict(model, given, PerturbedAttention(1.0, follow="neighbour")) - good
    assert torch.allclose(other, own.roll(1, 0), atol=1e-6)
    assert not torch.allclose(other, own, atol=1e-4)


def free_and_perturbed(model, given, w, s, where):
    """Item 4 of the paper's method, written out: both differences begin at the labelled prediction."""
    labelled, spoilt_ = plain(model, given), spoilt(model, given, where)
    unlabelled = plain(model, {**given, LABELS: torch.full((len(given[LABELS]),), 10)})
    return unlabelled + w * (labelled - unlabelled) + s * (labelled - spoilt_)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_composes_both_guidances_and_labels_to_the_formula_in_every_order(name):
    make, where = MODELS[name]
    model, given, (w, s) = make(), batch(), (2.0, 1.5)
    plan = bare_plan(Unlabelled(predict_noise))
    expected = free_and_perturbed(model, given, w, s, where)
    for order in itertools.permutations([Labels(), ClassifierFree(w), PerturbedAttention(s, where)]):
        found = apply(plan, order).predict(model, given, context(model))
        assert torch.allclose(found, expected, atol=1e-5), order
    from_labelled = expected + plain(model, given) - plain(model, {**given, LABELS: torch.full((4,), 10)})
    assert not torch.allclose(expected, from_labelled, atol=1e-3), "w is counted from the unlabelled prediction"
    untold = apply(plan, [ClassifierFree(w), PerturbedAttention(s, where)]).predict(model, given, context(model))
    without = {**given, LABELS: torch.full((4,), 10)}
    assert torch.allclose(untold, free_and_perturbed(model, without, w, s, where), atol=1e-5)
    assert not torch.allclose(untold, expected, atol=1e-3), "without labels nothing but the spoilt maps is followed"
    nested = Guided(Guided(predict_noise, (ClassifierFree(w),)), (PerturbedAttention(s, where),))
    wrong = nested(model, given, context(model))
    assert not torch.allclose(wrong, expected, atol=1e-3), "guidance of a guided prediction is another formula"


def test_both_guidances_cost_three_passes_of_which_the_last_begins_at_the_changed_layer():
    model, given = seeded(labelled_unet, 8), batch()
    away = ClassifierFree(2.0), PerturbedAttention(1.5)
    found, _ = calls(model, lambda: predict(model, given, *away))
    once, _ = calls(model, lambda: plain(model, given))
    assert found["conv_in"] == 2 * once["conv_in"]
    assert found["conv_out"] == 3 * once["conv_out"]


def test_labels_are_told_or_kept_beneath_the_guidance_whichever_came_first():
    away = (PerturbedAttention(1.0),)
    open_, closed = bare_plan(predict_noise), bare_plan(Unlabelled(predict_noise))
    for plan in (open_, closed):
        assert apply(plan, [Labels()]).predict is predict_noise
        assert apply(plan, [Labels(told=False)]).predict == Unlabelled(predict_noise)
        for order in ([Labels(), *away], [*away, Labels()]):
            assert apply(plan, order).predict == Guided(predict_noise, away)
        for order in ([Labels(told=False), *away], [*away, Labels(told=False)]):
            assert apply(plan, order).predict == Guided(Unlabelled(predict_noise), away)
    model, given = seeded(labelled_unet, 8), batch()
    seen = closed.predict(model, given, context(model))
    assert torch.equal(seen, plain(model, {**given, LABELS: torch.full((4,), 10)}))
    assert not torch.allclose(seen, plain(model, given), atol=1e-3)


def test_guidance_without_a_classifier_moves_a_labelled_prediction_by_its_weight():
    model, given = seeded(labelled_unet, 8), batch()
    off, tiny, strong = (
        predict(model, given, ClassifierFree(**fields))
        for fields in (ClassifierFree.OFF, ClassifierFree.TINY, ClassifierFree.STRONG)
    )
    assert torch.equal(off, plain(model, given))
    assert 0 < (tiny - off).norm() < (strong - off).norm()


def test_two_layers_may_be_guided_away_from_one_by_one():
    model, given = seeded(wide_dit, 4), batch()
    good, one, two = (
        plain(model, given),
        spoilt(model, given, BLOCK),
        spoilt(model, given, "transformer_blocks.1.attn1"),
    )
    found = predict(model, given, PerturbedAttention(1.0, BLOCK), PerturbedAttention(0.5, "transformer_blocks.1.attn1"))
    assert torch.equal(found, good + 1.0 * (good - one) + 0.5 * (good - two))


def test_plans_gather_guidance_in_one_slot_and_state_what_they_lack():
    plan = bare_plan(predict_noise)
    held = apply(plan, [PerturbedAttention(1.0), ClassifierFree(2.0)]).predict
    assert held == Guided(predict_noise, (PerturbedAttention(1.0), ClassifierFree(2.0)))
    assert plan.predict is predict_noise
    assert guide(plan, PerturbedAttention()).predict.inner is predict_noise
    nameless = plan.replace(facts=dataclasses.replace(plan.facts, classes=None))
    with pytest.raises(PlanError, match="ClassifierFree requires the fact classes"):
        apply(nameless, [ClassifierFree()])
    with pytest.raises(PlanError, match="requires the fact modality"):
        apply(plan.replace(facts=Facts(modality="vision", target="class")), [PerturbedAttention()])


def test_what_cannot_be_is_said():
    model = seeded(labelled_unet, 8)
    with pytest.raises(PlanError, match=r"eval mode first \(model\.eval\(\)\)"):
        predict(model.train(), batch(), PerturbedAttention())
    with pytest.raises(PlanError, match=r"eval mode first"), perturbed_attention(model):
        model(torch.randn(1, 1, 8, 8), 3)
    with pytest.raises(PlanError, match=r"no kind 'idenity'.*identity"):
        PerturbedAttention(kind="idenity")
    with pytest.raises(PlanError, match=r"strength=2 must be in \[0, 1\]"):
        PerturbedAttention(strength=2)
    with pytest.raises(PlanError, match="'own' or 'neighbour'"):
        PerturbedAttention(follow="other")


# --- without a plan ---


@torch.no_grad()
def test_the_model_s_own_call_is_guided_in_whatever_form_it_answers():
    model, x = seeded(unet), batch()[NOISY]
    good = model(x, 7).sample
    with edited_attention(model, matching(model, MID), identity_map):
        bad = model(x, 7).sample
    with perturbed_attention(model, 2.0):
        found = model(x, 7)
        assert type(found).__name__ == "UNet2DOutput"
        assert torch.equal(found.sample, good + 2.0 * (good - bad))
        assert torch.equal(model(sample=x, timestep=7, return_dict=False)[0], found.sample)
    with perturbed_attention(model, 0.0):
        assert torch.equal(model(x, 7).sample, good)
    assert torch.equal(model(x, 7).sample, good)
    assert not any("forward" in vars(m) for m in model.modules())


@torch.no_grad()
def test_a_learned_variance_comes_from_the_plain_pass():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    channels = {"in_channels": 1, "out_channels": 2, "num_embeds_ada_norm": 10}
    model = seeded(lambda: diffusers.DiTTransformer2DModel(**sizes, **channels))
    given = {"timestep": torch.tensor([3, 500]), "class_labels": torch.tensor([1, 10])}
    x = batch(2)[NOISY]
    good = model(x, **given).sample
    with perturbed_attention(model, 2.0, "transformer_blocks.1.attn1"):
        found = model(x, **given).sample
    assert torch.equal(found[:, 1:], good[:, 1:])
    assert not torch.allclose(found[:, :1], good[:, :1], atol=1e-4)
    whole = predict_noise(
        model, {NOISY: x, TIMESTEPS: given["timestep"], LABELS: given["class_labels"]}, context(model)
    )
    assert torch.equal(whole, good[:, :1])


def test_noise_velocity_and_clean_image_are_guided_alike():
    x, eps, bad, s = *(torch.randn(8, generator=generator(i)) for i in range(3)), 1.7
    a, b = 0.8, 0.6  # x = a clean + b noise
    guided_noise = eps + s * (eps - bad)

    def clean(noise):
        return (x - b * noise) / a

    def velocity(noise):
        return a * noise - b * clean(noise)

    for view in (clean, velocity):
        assert torch.allclose(combine(view(eps), view(eps), view(bad), s), view(guided_noise), atol=1e-5)


def save_pipeline(folder):
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=50)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = unet()
    diffusers.DDIMPipeline(unet=model, scheduler=scheduler).save_pretrained(folder)
    return folder


def test_the_example_is_short_and_samples_a_pipeline_in_a_folder(tmp_path, monkeypatch):
    tree = ast.parse(EXAMPLE.read_text())
    docs = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    lines = {n.lineno for n in ast.walk(tree) if isinstance(n, ast.stmt) and n not in docs}
    assert len(lines) <= 15
    assert len([line for line in EXAMPLE.read_text().splitlines() if line.strip()]) <= 20
    monkeypatch.setattr(sys, "argv", ["own_pipeline.py", str(save_pipeline(tmp_path / "pipeline"))])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    grids = {p.stem: np.asarray(Image.open(p)) for p in sorted((tmp_path / "pipeline").glob("*.png"))}
    assert list(grids) == ["scale 0.0", "scale 1.0", "scale 3.0"]
    plain_, one, three = (grid.astype(int) for grid in grids.values())
    assert 0 < abs(one - plain_).sum() < abs(three - plain_).sum()


def test_the_example_s_scale_zero_is_the_pipeline_itself(tmp_path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(save_pipeline(tmp_path / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)

    def sample():
        return pipeline(batch_size=2, num_inference_steps=4, generator=generator(3), output_type="np").images

    expected = sample()
    with perturbed_attention(pipeline.unet, 0.0):
        assert np.array_equal(sample(), expected)
    with perturbed_attention(pipeline.unet, 3.0):
        assert not np.allclose(sample(), expected, atol=1e-3)
    assert F.mse_loss(torch.tensor(sample()), torch.tensor(expected)) == 0
