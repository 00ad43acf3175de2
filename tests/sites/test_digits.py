from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vision_toys import run

from perturbed.core.keys import describe
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.errors import PlanError
from perturbed.plans import digits
from perturbed.plans.digits import Digits, Split, cnn, load, vit


def test_images_are_scikit_learn_s_on_the_unit_range() -> None:
    from sklearn.datasets import load_digits

    split = load("digits", 450)
    pixels = torch.cat([split[part]["pixels"] for part in ("train", "test")])
    labels = torch.cat([split[part]["labels"] for part in ("train", "test")])
    theirs = load_digits()
    assert pixels.shape == (1797, 1, 8, 8)
    assert (pixels.min(), pixels.max()) == (0, 1)
    ours = {(tuple((x * 16).round().long().flatten().tolist()), int(y)) for x, y in zip(pixels, labels, strict=True)}
    assert ours == {(tuple(x.astype(int)), int(y)) for x, y in zip(theirs.data, theirs.target, strict=True)}


def test_split_is_disjoint_and_keeps_each_class_s_share() -> None:
    split = load("digits", 450)
    train, test = split["train"], split["test"]
    assert (len(train["labels"]), len(test["labels"])) == (1347, 450)
    shares = [torch.bincount(part["labels"], minlength=10) / len(part["labels"]) for part in (train, test)]
    assert (shares[0] - shares[1]).abs().max() < 0.003
    whole = torch.cat([train["pixels"], test["pixels"]]).flatten(1)
    assert len(whole.unique(dim=0)) == 1797  # no image occurs twice, so none is on both sides


def test_split_is_the_same_for_every_seed_and_the_order_is_not() -> None:
    plan = Digits()()
    firsts = []
    for seed in (0, 1):
        stage = plan.stage("pretrain")
        ctx = Engine(plan, seed, Store(None))._ctx(stage, stage.steps)
        firsts.append(next(stage.data(ctx))["pixels"])
    assert not torch.equal(*firsts)
    assert torch.equal(plan.facts.more["held_out"]()["pixels"], load("digits", 450)["test"]["pixels"])
    assert len(plan.facts.more["seen"]()["labels"]) == 450


def test_networks_are_of_the_size_they_say() -> None:
    x = torch.rand(3, 1, 8, 8)
    assert sum(p.numel() for p in cnn(16).parameters()) == 21_546
    assert cnn(16)(x).shape == (3, 10)
    transformer = vit(16)
    assert type(transformer).__name__ == "ViTForImageClassification"
    assert transformer.config._attn_implementation == "sdpa"
    assert transformer(x).logits.shape == (3, 10)
    assert 15_000 < sum(p.numel() for p in transformer.parameters()) < 25_000


@pytest.mark.parametrize(("model", "steps", "reached"), [("cnn", 150, 0.93), ("vit", 300, 0.8)])
def test_it_learns(model: Any, steps: int, reached: float) -> None:
    result = run(Digits(model=model, pretrain_steps=steps, finetune_steps=0)())
    assert result.scores["accuracy"] is not None
    assert result.scores["accuracy"] > reached


def test_the_plan_costs_nothing_until_it_runs(monkeypatch: Any) -> None:
    monkeypatch.setattr(digits, "load", lambda *a: pytest.fail("loaded"))
    plan = Digits(data="not there")()
    assert [(s.name, s.steps) for s in plan.stages] == [("pretrain", 420), ("finetune", 168)]


def test_fields_decide_the_content_key() -> None:
    keys = [str(describe(d().stages)) for d in (Digits(), Digits(), Digits(held_out=300), Digits(finetune_lr=0.01))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert describe(Split("digits", 450, "train")) != describe(Split("digits", 450, "test"))


def save(path: Path, pixels: Any, labels: Any) -> str:
    np.savez(path, pixels=pixels, labels=labels)
    return str(path)


def test_a_file_can_stand_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 10
    pixels = np.clip(labels[:, None, None, None] / 10 + rng.normal(0, 0.02, (200, 1, 8, 8)), 0, 1)
    held = save(tmp_path / "own.npz", pixels, labels)
    result = run(Digits(data=held, held_out=50, batch=25, pretrain_steps=30, finetune_steps=5)())
    assert result.scores["accuracy"] is not None
    assert result.scores["accuracy"] > 0.15
    one = Split(held, 50, "train").fingerprint()
    load.cache_clear()
    save(tmp_path / "own.npz", pixels[::-1], labels)
    assert Split(held, 50, "train").fingerprint() != one


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    flat, labels = np.zeros((40, 64)), np.arange(40) % 10
    image = np.zeros((40, 1, 8, 8))
    for data, told in [
        (str(tmp_path / "absent.npz"), "give 'digits' or the path"),
        (save(tmp_path / "flat.npz", flat, labels), r"pixels must be \[N, 1, 8, 8\]"),
        (save(tmp_path / "range.npz", image + 16, labels), r"in \[0, 1\]"),
        (save(tmp_path / "class.npz", image, labels + 1), "whole numbers in 0…9"),
    ]:
        with pytest.raises(PlanError, match=told):
            load(data, 10)
    np.savez(tmp_path / "names.npz", images=image)
    with pytest.raises(PlanError, match="arrays pixels and labels"):
        load(str(tmp_path / "names.npz"), 10)
    with pytest.raises(PlanError, match="held_out=1790 of 1797"):
        load("digits", 1790)
    with pytest.raises(PlanError, match="did you mean 'cnn'"):
        Digits(model="cn")  # type: ignore[arg-type]
