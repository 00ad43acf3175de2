"""The plan of small diffusion models of digits, and the classifier that judges their samples."""

import pytest
import torch

from perturbed.core.plan import apply
from perturbed.core.run import Engine, threads
from perturbed.core.store import Store
from perturbed.errors import PlanError
from perturbed.inference.guidance import ClassifierFree, Labels, PerturbedAttention
from perturbed.measures.generation import confidence, judge_of
from perturbed.objectives.diffusion import denoise
from perturbed.plans.digits_diffusion import BUILDERS, DigitsDiffusion, OtherNetwork, dit, unet

LAYER = {"unet": "mid_block.attentions.*", "dit": "transformer_blocks.1.attn1"}
FEW = {"width": 8, "batch": 16, "steps": 6, "held_out": 60, "samples": 20, "sampling_steps": 2, "judge_steps": 21}


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def run(plan, seed=0):
    return Engine(plan, seed, Store(None)).run()


def test_networks_are_diffusers_classes_of_the_sizes_that_are_told():
    assert {name: type(make(8)).__name__ for name, make in BUILDERS.items()} == {
        "unet": "UNet2DModel", "dit": "DiTTransformer2DModel",
    }  # fmt: skip
    sizes = {make: round(sum(p.numel() for p in make(16).parameters()) / 1000) for make in (unet, dit)}
    assert sizes == {unet: 178, dit: 393}
    assert DigitsDiffusion.__doc__.count("178k") == DigitsDiffusion.__doc__.count("393k") == 1


def test_the_dit_drops_no_label_by_itself():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = dit(4).train()
    x, t, y = torch.rand(64, 1, 8, 8), torch.full((64,), 9), torch.arange(64) % 10
    for p in model.parameters():  # it begins with gates of zero
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(0)) if p.dim() > 1 else None
    with torch.no_grad():
        assert torch.equal(denoise(model, x, t, y), denoise(model, x, t, y))
        assert not torch.equal(denoise(model, x, t, y), denoise(model, x, t, torch.full_like(y, 10)))


@pytest.mark.parametrize("model", BUILDERS)
def test_the_same_plan_and_guidance_run_on_either_network(model):
    plan = DigitsDiffusion(model=model, **FEW)()
    control = run(plan)
    guided = run(apply(plan, [PerturbedAttention(3.0, LAYER[model])]))
    off = run(apply(plan, [PerturbedAttention(0.0, LAYER[model])]))
    nothing = run(apply(plan, [PerturbedAttention(3.0, LAYER[model], strength=0.0)]))
    assert {"precision", "recall", "coverage", "frechet", "confidence", "spread", "rightness"} == set(control.scores)
    assert off.scores == nothing.scores == control.scores
    assert guided.weights == control.weights
    assert guided.scores["frechet"] != control.scores["frechet"]


def test_labels_are_told_and_guided_by_where_asked():
    plan = DigitsDiffusion(labelled=True, **FEW)()
    control, guided = run(plan), run(apply(plan, [ClassifierFree(4.0)]))
    assert guided.scores["frechet"] != control.scores["frechet"]
    unlabelled = DigitsDiffusion(**FEW)()
    assert run(apply(unlabelled, [ClassifierFree(4.0)])).scores["frechet"] == run(unlabelled).scores["frechet"]
    told = run(apply(unlabelled, [Labels()]))
    assert (told.scores, told.weights) == (control.scores, control.weights)
    assert run(unlabelled).scores["frechet"] != control.scores["frechet"]
    assert run(apply(plan, [Labels(told=False)])).scores == run(unlabelled).scores


def test_another_network_is_that_of_the_plan_made_with_it():
    plan, other = DigitsDiffusion(**FEW)(), DigitsDiffusion(model="dit", **FEW)()
    for order in ([OtherNetwork(), Labels(told=False)], [Labels(told=False), OtherNetwork()]):
        changed = apply(plan, order)
        assert changed.replace(applied=()) == other
        assert Engine(changed, 0, Store(None)).all_keys() == Engine(other, 0, Store(None)).all_keys()
    assert apply(other, [OtherNetwork(model="unet")]).build == plan.build
    assert run(apply(plan, [OtherNetwork()])).scores == run(other).scores
    with pytest.raises(PlanError, match=r"OtherNetwork: no model 'ditt'.*dit"):
        OtherNetwork(model="ditt")
    with pytest.raises(PlanError, match="knows the networks of digits-diffusion, and plan 'digits-diffusion' builds"):
        apply(plan.replace(build=unet), [OtherNetwork()])


def test_it_learns():
    losses = [value for _, value in run(DigitsDiffusion(steps=60)().replace(measures=())).curves["loss"]]
    assert losses[0] > 0.8
    assert sum(losses[-10:]) / 10 < 0.45


@torch.no_grad()
def test_the_judge_knows_digits_it_has_not_seen_from_noise_whatever_the_seed():
    facts = DigitsDiffusion()().facts
    judge, test = judge_of(facts), facts.get("held_out")()
    features, logits = judge(test["pixels"])
    assert features.shape == (450, 32)
    assert (logits.argmax(-1) == test["labels"]).float().mean() > 0.95
    noise = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert confidence(judge(noise)[1]) < 0.85 < 0.98 < confidence(logits)
    before = torch.get_rng_state()
    assert judge_of(DigitsDiffusion()().facts) is judge
    again = judge_of(DigitsDiffusion(judge_steps=421)().facts)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(again(test["pixels"])[1], logits)


def test_wrong_fields_are_named():
    with pytest.raises(PlanError, match=r"no model 'unett'.*unet"):
        DigitsDiffusion(model="unett")
    with pytest.raises(PlanError, match="width=6 must be a multiple of 4"):
        DigitsDiffusion(width=6)
    with pytest.raises(PlanError, match=r"label_drop=1.5 must be in \[0, 1\]"):
        DigitsDiffusion(label_drop=1.5)
    for name in ("batch", "samples", "sampling_steps", "judge_steps"):
        with pytest.raises(PlanError, match=f"{name}=0 must be at least 1"):
            DigitsDiffusion(**{name: 0})
    with pytest.raises(PlanError, match=r"lr=-1.0 must be above 0"):
        DigitsDiffusion(lr=-1.0)
