"""Noising, the loss and sampling, against closed forms."""

import math

import diffusers
import pytest
import torch
import torch.nn.functional as F
from own_models import generator, unet

from perturbed.core.context import Ctx
from perturbed.core.plan import Facts
from perturbed.core.run import accelerator, threads
from perturbed.core.streams import Streams
from perturbed.errors import PlanError
from perturbed.inference.diffusion import DDIM
from perturbed.objectives.diffusion import (
    LABELS,
    NOISY,
    TIMESTEPS,
    NoiseLoss,
    NoiseSchedule,
    centred,
    denoise,
    predict_noise,
    schedule_of,
    takes_labels,
    uncentred,
    unlabelled,
)
from perturbed.plans.digits_diffusion import dit
from perturbed.plans.digits_diffusion import unet as labelled_unet

FACTS = Facts(
    modality="diffusion", target="noise", output="noise", classes=10, input="pixels", input_range=(0.0, 1.0),
    more={"schedule": NoiseSchedule()},
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def context(facts=FACTS, step=0):
    streams = Streams(0)
    streams.tick("pretrain", step)
    return Ctx(streams, accelerator(), facts, "pretrain", 10)


def images(size=4, seed=0):
    return torch.rand(size, 1, 8, 8, generator=generator(seed))


def seeded(make, *args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*args).eval().requires_grad_(False)


# --- noising ---


def test_the_cosine_schedule_is_its_formula():
    kept, steps = NoiseSchedule().kept().double(), 1000

    def level(t):
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 499, 900):
        assert float(kept[t]) == pytest.approx(level(t + 1) / level(0), rel=2e-3)
    assert (kept.diff() < 0).all()
    assert kept[0] > 0.999
    assert kept[-1] < 1e-4
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert torch.allclose(NoiseSchedule("linear").kept().double(), (1 - betas).cumprod(0), rtol=1e-4)


def test_noised_images_keep_variance_one_and_the_share_of_their_timestep():
    schedule, g = NoiseSchedule(), generator()
    x, noise = torch.randn(3, 1, 64, 64, generator=g), torch.randn(3, 1, 64, 64, generator=g)
    t = torch.tensor([0, 500, 999])
    found = schedule.noised(x, noise, t)
    for i, time in enumerate(t):
        a = float(schedule.kept()[time])
        assert torch.allclose(found[i], math.sqrt(a) * x[i] + math.sqrt(1 - a) * noise[i], atol=1e-6)
    assert found.var(dim=(1, 2, 3)) == pytest.approx(torch.ones(3).numpy(), abs=0.1)


def test_images_move_to_minus_one_to_one_and_back():
    x = images()
    assert torch.allclose(uncentred(centred(x, FACTS), FACTS), x, atol=1e-6)
    assert centred(torch.tensor([0.0, 0.5, 1.0]), FACTS).tolist() == [-1, 0, 1]
    assert uncentred(torch.tensor([-3.0, 3.0]), FACTS).tolist() == [0, 1]


# --- the predictor ---


def test_labels_go_to_models_that_take_them_and_extra_channels_are_left():
    x, t = images(2), torch.tensor([3, 700])
    plain, labelled, transformer = seeded(unet), seeded(labelled_unet, 8), seeded(dit, 4)
    assert [takes_labels(m) for m in (plain, labelled, transformer)] == [False, True, True]
    none = unlabelled(x, FACTS)
    assert none.tolist() == [10, 10]
    assert torch.equal(denoise(plain, x, t, none), plain(x, t).sample)
    for label in (3, 10):
        labels = torch.full((2,), label)
        assert torch.equal(denoise(labelled, x, t, labels), labelled(x, t, class_labels=labels).sample)
    assert not torch.equal(denoise(labelled, x, t, none), denoise(labelled, x, t, torch.tensor([3, 3])))
    wide = seeded(lambda: diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=2, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, attention_head_dim=4,
    ))  # fmt: skip
    assert torch.equal(denoise(wide, x, t, none), wide(x, t).sample[:, :1])


def test_the_slot_reads_noisy_images_or_clean_ones_at_rest():
    model, x, t, y = seeded(labelled_unet, 8), images(2), torch.tensor([3, 700]), torch.tensor([1, 2])
    ctx, none = context(), torch.tensor([10, 10])
    assert torch.equal(predict_noise(model, {NOISY: x, TIMESTEPS: t, LABELS: y}, ctx), denoise(model, x, t, y))
    assert torch.equal(predict_noise(model, {NOISY: x, TIMESTEPS: t}, ctx), denoise(model, x, t, none))
    at_rest = denoise(model, 2 * x - 1, torch.zeros(2, dtype=torch.long), y)
    assert torch.equal(predict_noise(model, {"pixels": x, LABELS: y}, ctx), at_rest)


# --- the loss ---


class Told(torch.nn.Module):
    """Remembers what it is asked and answers with a constant."""

    config = {"num_class_embeds": 11}  # noqa: RUF012

    def forward(self, noisy, timesteps, class_labels):
        self.noisy, self.timesteps, self.labels = noisy, timesteps, class_labels
        return torch.full_like(noisy, 0.5)


def test_the_loss_is_the_squared_error_of_the_noise_that_was_put_in():
    model, x, y, schedule = Told(), images(500), torch.arange(500) % 10, NoiseSchedule()
    value = NoiseLoss(label_drop=0.3)(model, {"pixels": x, LABELS: y}, context())
    kept = schedule.kept()[model.timesteps].view(-1, 1, 1, 1)
    noise = (model.noisy - kept.sqrt() * (2 * x - 1)) / (1 - kept).sqrt()
    assert float(value) == pytest.approx(float((noise - 0.5).square().mean()), rel=1e-3)
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    spread = torch.bincount(model.timesteps // 100, minlength=10)
    assert spread.min() > 25, "timesteps are uniform"
    assert len(spread) == 10
    dropped = model.labels == 10
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.07)
    assert torch.equal(model.labels[~dropped], y[~dropped])


@pytest.mark.parametrize(("share", "expected"), [(0.0, {0, 1, 2}), (1.0, {10})])
def test_labels_are_all_shown_or_all_dropped_at_the_ends(share, expected):
    model = Told()
    NoiseLoss(share)(model, {"pixels": images(30), LABELS: torch.arange(30) % 3}, context())
    assert set(model.labels.tolist()) == expected


def test_noise_and_timesteps_are_new_at_each_step_and_the_same_for_each_arm():
    def asked(step):
        model = Told()
        NoiseLoss()(model, {"pixels": images(8)}, context(step=step))
        return model.noisy

    assert torch.equal(asked(0), asked(0))
    assert not torch.equal(asked(0), asked(1))


def test_what_the_facts_lack_is_named():
    bare = Facts(modality="diffusion", target="noise")
    with pytest.raises(PlanError, match="fact schedule, a NoiseSchedule, and found None"):
        schedule_of(bare)
    with pytest.raises(PlanError, match="wants the fact input"):
        NoiseLoss()(Told(), {"pixels": images()}, context(bare))


# --- sampling ---


def of_normal(mean, deviation, schedule):
    """The best predictor of the noise for independent pixels from N(mean, deviation^2)."""

    def predict(batch):
        kept = schedule.kept()[batch[TIMESTEPS]].view(-1, 1, 1, 1)
        variance = kept * deviation**2 + 1 - kept
        return (1 - kept).sqrt() * (batch[NOISY] - kept.sqrt() * mean) / variance

    return predict


def test_ddim_ends_in_the_distribution_that_its_predictor_knows():
    schedule, g = NoiseSchedule(), generator()
    noise, labels = torch.randn(200, 1, 8, 8, generator=g), torch.zeros(200, dtype=torch.long)
    target = torch.rand(1, 1, 8, 8, generator=g) - 0.5
    point = DDIM(20)(of_normal(target, 0.0, schedule), noise, labels, schedule)
    assert torch.allclose(point, target.expand_as(point), atol=1e-4)
    spread = DDIM(200, clip=False)(of_normal(0.3, 0.2, schedule), noise, labels, schedule)
    assert float(spread.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(spread.std()) == pytest.approx(0.2, abs=0.01)
    assert torch.corrcoef(torch.stack([spread.flatten(), noise.flatten()]))[0, 1] > 0.999, "it is deterministic"


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_is_its_recursion(clip):
    model, schedule = seeded(labelled_unet, 8), NoiseSchedule()
    noise, labels, seen = torch.randn(3, 1, 8, 8, generator=generator()), torch.tensor([1, 4, 10]), []

    def predict(batch):
        seen.append((int(batch[TIMESTEPS][0]), batch[LABELS]))
        return denoise(model, batch[NOISY], batch[TIMESTEPS], batch[LABELS])

    found = DDIM(4, clip)(predict, noise, labels, schedule)
    assert [t for t, _ in seen] == [999, 749, 499, 249]
    assert all(torch.equal(y, labels) for _, y in seen)
    x, kept = noise, [*schedule.kept()[[999, 749, 499, 249]], torch.tensor(1.0)]
    for i, t in enumerate((999, 749, 499, 249)):
        eps = denoise(model, x, torch.full((3,), t), labels)
        clean = (x - (1 - kept[i]).sqrt() * eps) / kept[i].sqrt()
        if clip:
            clean = clean.clamp(-1, 1)
            eps = (x - kept[i].sqrt() * clean) / (1 - kept[i]).sqrt()
        x = kept[i + 1].sqrt() * clean + (1 - kept[i + 1]).sqrt() * eps
    assert F.mse_loss(found, x) < 1e-10 * x.square().mean()
    assert (found.abs().max() <= 1) == clip


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(PlanError, match=r"steps=20 must be between 1 and the schedule's 10"):
        DDIM(20)(denoise, images(), torch.zeros(4), NoiseSchedule(steps=10))
    with pytest.raises(PlanError, match="steps=0"):
        DDIM(0)(denoise, images(), torch.zeros(4), NoiseSchedule())
