"""Measures of samples, against closed forms, brute force and SciPy."""

from dataclasses import dataclass, replace

import pytest
import scipy.linalg
import torch
from own_models import generator

from perturbed.core.plan import Facts
from perturbed.core.run import Engine, threads
from perturbed.core.store import Store
from perturbed.errors import PlanError
from perturbed.inference.diffusion import DDIM
from perturbed.inference.guidance import Unlabelled
from perturbed.measures.generation import (
    Generation,
    class_spread,
    confidence,
    frechet_distance,
    judge_of,
    precision_recall,
    sampled,
)
from perturbed.plans.digits_diffusion import DigitsDiffusion


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def points(number, dim=5, seed=0, mean=0.0, scale=1.0):
    return mean + scale * torch.randn(number, dim, generator=generator(seed), dtype=torch.float64)


# --- Fréchet distance ---


def test_frechet_distance_is_that_with_scipy_s_matrix_root():
    mix = points(5, seed=9)
    one, two = points(300) @ mix, points(200, seed=1, mean=0.5, scale=2)
    s1, s2 = torch.cov(one.T), torch.cov(two.T)
    root = scipy.linalg.sqrtm((s1 @ s2).numpy()).real.trace()
    expected = float((one.mean(0) - two.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * root)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(two, one) == pytest.approx(expected, rel=1e-8)
    assert abs(expected - float((one.mean(0) - two.mean(0)).square().sum())) > 1, "covariances count"


def test_frechet_distance_of_single_features_of_shifts_and_of_flat_clouds():
    one, two = points(500, 1, scale=3), points(400, 1, seed=1, mean=2)
    expected = (one.mean() - two.mean()) ** 2 + (one.std() - two.std()) ** 2
    assert frechet_distance(one, two) == pytest.approx(float(expected), rel=1e-8)
    cloud = points(100)
    assert frechet_distance(cloud, cloud) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(cloud, cloud + 2) == pytest.approx(4 * 5, rel=1e-9)
    flat = torch.cat([points(50, 2), torch.zeros(50, 3)], 1)  # singular covariances
    assert frechet_distance(flat, flat.roll(1, 1)) > 0.1
    assert frechet_distance(flat, flat + 1) == pytest.approx(5, rel=1e-6)
    with pytest.raises(PlanError, match="at least 2 rows of features, got 1"):
        frechet_distance(cloud[:1], cloud)


# --- precision and recall ---


def brute(real, fake, k):
    def radius(of, i):
        return sorted(float((of[i] - of[j]).norm()) for j in range(len(of)) if j != i)[k - 1]

    near_real, near_fake = [radius(real, i) for i in range(len(real))], [radius(fake, i) for i in range(len(fake))]
    gaps = [[float((r - f).norm()) for f in fake] for r in real]
    rows, columns = range(len(real)), range(len(fake))
    return {
        "precision": sum(any(gaps[i][j] <= near_real[i] for i in rows) for j in columns) / len(fake),
        "recall": sum(any(gaps[i][j] <= near_fake[j] for j in columns) for i in rows) / len(real),
        "coverage": sum(any(gaps[i][j] <= near_real[i] for j in columns) for i in rows) / len(real),
    }


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_brute_force(k):
    real, fake = points(40, 2), points(30, 2, seed=1, mean=1.2, scale=0.6)
    found = precision_recall(real, fake, k)
    assert found == pytest.approx(brute(real, fake, k))
    assert 0 < found["precision"] < 1
    swapped = precision_recall(fake, real, k)
    assert (swapped["precision"], swapped["recall"]) == pytest.approx((found["recall"], found["precision"]))
    assert found["precision"] != pytest.approx(found["recall"]), "they are not each other"


def test_precision_falls_with_strangers_and_recall_with_what_is_missing():
    real = torch.cat([points(60, 3), points(60, 3, seed=1, mean=50)])
    half = points(80, 3, seed=2)
    found = precision_recall(real, half)
    assert found["precision"] > 0.8
    assert 0.3 < found["recall"] <= 0.5
    assert found["coverage"] <= 0.5
    strangers = precision_recall(real, torch.cat([real, points(120, 3, seed=3, mean=-200)]))
    assert strangers["precision"] == pytest.approx(0.5)
    assert strangers["recall"] == 1
    assert precision_recall(real, real) == {"precision": 1, "recall": 1, "coverage": 1}
    outlier = torch.cat([half[:4], torch.full((4, 3), 25.0) * torch.tensor([[-1.0], [1], [2], [3]])])
    loose = precision_recall(real, outlier.double(), k=3)
    assert loose["recall"] > 0.9 > 0.5 > loose["coverage"], "outliers among samples raise recall and not coverage"
    with pytest.raises(PlanError, match="neighbour k=3 wants more than 3 points, got 3"):
        precision_recall(real[:3], real)


def test_confidence_and_spread_are_their_formulas():
    logits = torch.tensor([[0.0, 0.0], [torch.tensor(3.0).log(), 0.0]])
    assert confidence(logits) == pytest.approx((0.5 + 0.75) / 2)
    features, classes = points(9, 4), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    expected = (features[:4].var(0).sum() + features[4:8].var(0).sum()) / 2
    assert class_spread(features, classes) == pytest.approx(float(expected))
    assert class_spread(features[:2], torch.tensor([0, 1])) == 0.0


# --- the measure ---


def judge(pixels):
    """Four numbers of an image for features; the class is the brightest row's."""
    rows = pixels.flatten(2).mean(1)
    return torch.stack([rows.mean(1), rows.std(1), rows.amax(1), rows.amin(1)], 1), pixels.mean((1, 3))


def made():
    return judge


def drawn(plan, number, chunk=500):
    with Engine(plan, 0, Store(None)).finished("pretrain") as run:
        return sampled(run, number, DDIM(2), chunk=chunk)


@dataclass(frozen=True)
class Echo:
    """Predict slot that notes the labels that it is given and sees no noise."""

    def __call__(self, model, batch, ctx):
        ctx.artifacts.setdefault("labels", []).append(batch["labels"].tolist())
        return torch.zeros_like(batch["noisy"])


def small(held_out=60, **more):
    return DigitsDiffusion(width=8, steps=0, samples=24, sampling_steps=2, held_out=held_out, judge_steps=1, **more)()


def test_samples_are_in_range_and_begin_alike_whatever_the_chunks_and_arms():
    plan, telling = small(), small(labelled=True)
    (images, classes), (parts, _), (told, same) = (drawn(*how) for how in ((plan, 23), (plan, 23, 5), (telling, 23)))
    assert images.shape == (23, 1, 8, 8)
    assert 0 <= images.min() < images.max() <= 1
    assert classes.tolist() == same.tolist() == [i % 10 for i in range(23)]
    assert torch.allclose(images, parts, atol=1e-5)
    assert not torch.allclose(images, told, atol=1e-3)
    still, _ = drawn(plan.replace(predict=Echo()), 23)
    assert torch.equal(still, drawn(plan.replace(predict=Unlabelled(Echo())), 23)[0]), "the same noise with labels"


def test_labels_are_told_only_where_asked_and_each_chunk_its_own():
    turns = [i % 10 for i in range(12)]
    for predict, chunk, expected in (
        (Unlabelled(Echo()), 500, [[10] * 12] * 2),
        (Echo(), 500, [turns] * 2),
        (Echo(), 7, [turns[:7]] * 2 + [turns[7:]] * 2),
    ):
        plan = small().replace(predict=predict)
        with Engine(plan, 0, Store(None)).finished("pretrain") as run:
            sampled(run, 12, DDIM(2), chunk=chunk)
            assert run.artifacts["labels"] == expected


@pytest.mark.parametrize(("labelled", "held_out"), [(False, 60), (True, 60), (False, 530)])
def test_the_measure_is_its_parts(labelled, held_out):
    plan = small(held_out, labelled=labelled)  # real images are read 512 at a time
    plan = plan.replace(facts=replace(plan.facts, more={**plan.facts.more, "judge": made}))
    with Engine(plan, 0, Store(None)).finished("pretrain") as run:
        scores = Generation(24, DDIM(2), k=2, suffix="_few")(run)
        images, classes = sampled(run, 24, DDIM(2))
    features, logits = judge(images)
    real = judge(plan.facts.get("held_out")()["pixels"])[0]
    expected = precision_recall(real, features, 2) | {
        "frechet": frechet_distance(real, features), "confidence": confidence(logits),
        "spread": class_spread(features, logits.argmax(-1)),
        "rightness": sum(int(row.argmax()) == int(c) for row, c in zip(logits, classes, strict=True)) / 24,
    }  # fmt: skip
    assert scores == pytest.approx({f"{name}_few": value for name, value in expected.items()}, rel=1e-5)


def test_without_a_judge_the_fact_is_named():
    with pytest.raises(PlanError, match="fact judge: give the plan's facts"):
        judge_of(Facts(modality="diffusion", target="noise"))
