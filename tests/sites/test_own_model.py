"""``Plan.from_model``: any model and data become a plan that trains as asked and leaves the caller's model alone."""

import ast
import copy
import dataclasses
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
from own_models import (
    Counted,
    Scaled,
    bert,
    classify,
    denoising,
    images,
    llama,
    points,
    scaled,
    texts,
    unet,
    vit,
)
from torch import nn
from torch.utils.data import Subset, TensorDataset

import perturbed as pt
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.errors import PlanError
from perturbed.evidence.pool import Job, Pool
from perturbed.evidence.settings import load_plan
from perturbed.inputs.noise import InputNoise
from perturbed.optim.optimisers import AdamW

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"
from_model = pt.Plan.from_model


def run(plan, seed=0):
    return Engine(plan, seed, Store(None)).run()


def first_batch(plan, seed=0):
    stage = plan.stages[0]
    ctx = Engine(plan, seed, Store(None))._ctx(stage, stage.steps)
    return next(stage.data(ctx))


def key(plan, seed=0):
    return Engine(plan, seed, Store(None)).key("finetune")


def pictures():
    return [{"images": example["pixel_values"]} for example in images()]


CASES = {
    "bert": (bert, texts, {}, ("language", "class", "input_ids", 3)),
    "llama": (llama, lambda: texts(labels=False), {}, ("language", "next-token", "input_ids", 40)),
    "vit": (vit, images, {}, ("vision", "class", "pixel_values", 3)),
    "unet": (unet, pictures, {"loss": denoising}, ("diffusion", "noise", "images", None)),
    "plain": (scaled, points, {"loss": classify}, ("other", "class", "x", None)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_family_trains_and_the_model_given_stays_as_it_was(name):
    make, data, more, facts = CASES[name]
    model = make().eval()
    before = copy.deepcopy(model.state_dict())
    plan = from_model(model, data=data(), held_out=data(), steps=2, batch=4, optim=AdamW(1e-2), **more)
    result, untrained = run(plan), run(plan.replace(stages=(dataclasses.replace(plan.stages[0], steps=0),)))
    assert result.diverged is None
    assert result.weights != untrained.weights
    assert result.scores["loss"] != untrained.scores["loss"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert (plan.facts.modality, plan.facts.target, plan.facts.input, plan.facts.classes) == facts
    assert ("accuracy" in result.scores) == (facts[1] == "class")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"facts": {"tokenizer": SimpleNamespace(encode=list)}}, "give a function that returns it"),
        ({"measures": [len]}, "no Measure: pt.Measure"),
    ],
)
def test_what_is_not_of_its_kind_is_said_before_training(more, words):
    with pytest.raises(PlanError, match=words):
        from_model(bert(), data=texts(), steps=1, batch=4, **more)


def test_a_bare_torch_optimiser_is_told_to_be_wrapped():
    def bare(model, ctx):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    plan = from_model(bert(), data=texts(), steps=1, batch=4, optim=bare)
    with pytest.raises(PlanError, match=r"optim gives a SGD; wrap it, as in pt\.Optim"):
        run(plan)


def test_the_loss_on_labels_is_the_cross_entropy_of_the_logits():
    model = bert().eval().requires_grad_(False)
    plan = from_model(bert(), data=texts(), steps=1, batch=4)
    batch = first_batch(plan)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert run(plan).curves["loss"][0][1] == pytest.approx(float(F.cross_entropy(logits, batch["labels"])), abs=1e-6)


def test_a_causal_model_without_labels_learns_the_next_token_and_no_padding():
    model = llama().eval().requires_grad_(False)
    plan = from_model(llama(), data=texts(labels=False), steps=1, batch=4)
    batch = first_batch(plan)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(ids[:, 1:])
    real = mask[:, 1:].bool()
    found = run(plan).curves["loss"][0][1]
    assert not real.all()
    assert found == pytest.approx(float(losses[real].mean()), abs=1e-5)
    assert abs(found - float(losses.mean())) > 1e-4, "padding must not count"


@torch.no_grad()
def test_held_out_measures_are_those_of_the_whole_set_with_a_short_last_batch():
    model, test = scaled(), points(10)
    plan = from_model(model, data=points(), held_out=test, steps=0, batch=4, loss=classify)
    x, labels = torch.stack([e["x"] for e in test]), torch.tensor([e["labels"] for e in test])
    scores = run(plan).scores
    assert scores["loss"] == pytest.approx(float(F.cross_entropy(model(x), labels)), abs=1e-6)
    assert scores["accuracy"] == pytest.approx(float((model(x).argmax(1) == labels).float().mean()), abs=1e-6)
    parts = [float(F.cross_entropy(model(x[i : i + 4]), labels[i : i + 4])) for i in (0, 4, 8)]
    assert abs(scores["loss"] - sum(parts) / 3) > 1e-4, "the short batch must not weigh as much as the others"
    assert [m.better for m in plan.measures] == ["lower", "higher"]


def test_an_arm_that_changes_its_training_loss_is_measured_by_the_plans_own():
    plan = from_model(scaled(), data=points(), held_out=points(), steps=0, batch=4, loss=classify)
    doubled = dataclasses.replace(plan.stages[0], loss=lambda m, b, ctx: 2 * classify(m, b, ctx))
    assert run(plan.replace(stages=(doubled,))).scores == run(plan).scores


# --- data ---


def same_data():
    x, labels = torch.stack([e["x"] for e in points()]), torch.tensor([e["labels"] for e in points()])
    columns = {"x": x.tolist(), "label": labels.tolist()}
    more = TensorDataset(torch.cat([x, x]), torch.cat([labels, labels]))
    return {
        "dicts of lists": [{"x": e["x"].tolist(), "label_ids": e["labels"]} for e in points()],
        "arrays": [{"x": e["x"].numpy(), "labels": e["labels"]} for e in points()],
        "datasets": datasets.Dataset.from_dict(columns),
        "datasets, torch": datasets.Dataset.from_dict(columns).with_format("torch"),
        "tensors": TensorDataset(x, labels),
        "subset": Subset(more, range(12)),
        "own class": Counted(),
    }


@pytest.mark.parametrize("kind", same_data())
def test_the_same_examples_train_alike_in_any_container(kind):
    def plan(data):
        return from_model(scaled(), data=data, steps=5, batch=4, loss=classify, optim=AdamW(1e-2))

    assert run(plan(same_data()[kind])).weights == run(plan(points())).weights


def test_every_example_comes_once_an_epoch_in_an_order_of_the_seed():
    rows = [{"x": torch.full((4,), float(i)), "labels": i % 3} for i in range(12)]

    def order(seed):
        seen = []
        plan = from_model(
            scaled(), data=rows, steps=3, batch=4,
            loss=lambda m, b, ctx: (seen.extend(b["x"][:, 0].tolist()), classify(m, b, ctx))[1],
        )  # fmt: skip
        run(plan, seed)
        return seen

    assert sorted(order(0)) == list(range(12))
    assert order(0) == order(0) != order(1)


def test_columns_that_are_no_tensors_are_left_out_and_said_once(capsys):
    data = [{**example, "text of a test": "some words"} for example in texts()]
    plan = from_model(bert(), data=data, held_out=data, steps=1, batch=4)
    from_model(bert(), data=data, steps=1, batch=4)
    said = capsys.readouterr().err
    assert said.count("left out of the batches, as they are no tensors: text of a test") == 1
    assert set(first_batch(plan)) == {"input_ids", "attention_mask", "labels"}
    with pytest.raises(PlanError, match=r"model takes 'input_ids', but that column is a str.*collate="):
        from_model(bert(), data=[{"input_ids": "words", "label": 1}] * 4, steps=1, batch=4)


def test_a_column_that_the_model_does_not_know_is_there_for_ones_own_loss_only():
    data = [{**example, "weight": 2.0} for example in texts()]

    def weighted(model, batch, ctx):
        return batch["weight"].mean() * model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    run(from_model(bert(), data=data, held_out=data, steps=1, batch=4))
    assert run(from_model(bert(), data=data, held_out=data, steps=1, batch=4, loss=weighted)).scores["loss"] > 2


def pad(examples):
    ids = [torch.tensor(e["input_ids"]) for e in examples]
    return {"input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True)}


def test_ragged_examples_want_a_collate_and_get_it():
    data = [{"input_ids": list(range(1, 4 + i % 2))} for i in range(8)]
    with pytest.raises(PlanError, match=r"'input_ids' has examples of shapes \[3\] and \[4\].*collate="):
        from_model(llama(), data=data, steps=1, batch=4)
    plan = from_model(llama(), data=data, held_out=data, steps=1, batch=4, collate=pad)
    assert run(plan).scores["loss"] > 0
    with pytest.raises(PlanError, match="must give a dict of tensors, but gave list"):
        from_model(llama(), data=data, steps=1, batch=4, collate=list)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is an empty data set"),
        (datasets.Dataset.from_dict({"x": []}), "data is an empty data set"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"x": [[1.0]]})}),
            "DatasetDict of 'train': give",
        ),
        (datasets.Dataset.from_dict({"x": [1.0]}).to_iterable_dataset(), r"no length or no \[i\]"),
        (points(3), r"data has 3 examples for batch=4: choose a batch between 1 and 3"),
        ([1.0, 2.0, 3.0, 4.0], r"an example is a float, not a dict or a pair"),
        ([{"x": "a"}, {"x": "b"}], "the model takes 'x', but that column is a str"),
        ([{"words": "a"}] * 4, r"no column of the data is a tensor \(there is words\)"),
        ([{"labels": 1}] * 4, "nothing to put in"),
        ([{"x": [1.0] * 4, "labels": 1}, {"labels": 2}] * 2, "'x' is a tensor in some examples and missing"),
    ],
)
def test_data_that_make_no_batch_are_named(data, message):
    with pytest.raises(PlanError, match=message):
        from_model(scaled(), data=data, steps=1, batch=4, loss=classify)
    with pytest.raises(PlanError, match="held_out is an empty"):
        from_model(scaled(), data=points(), held_out=[], steps=1, batch=4, loss=classify)


# --- the model, loss and prediction ---


def test_without_a_loss_to_be_had_the_error_says_which_to_give():
    with pytest.raises(PlanError, match=r"Scaled has no loss of its own: give loss=, a function of \(model, "):
        from_model(scaled(), data=points(), steps=1, batch=4)
    with pytest.raises(PlanError, match=r"no loss on input_ids, attention_mask \(it wants labels in the data\)"):
        from_model(bert(), data=texts(labels=False), steps=1, batch=4)
    with pytest.raises(PlanError, match="UNet2DModel has no loss of its own"):
        from_model(unet(), data=pictures(), steps=1, batch=4)
    with pytest.raises(PlanError, match=r"give a torch\.nn\.Module"):
        from_model("bert-base", data=texts(), steps=1, batch=4)
    with pytest.raises(PlanError, match="gave a dict, not a torch"):
        from_model(dict, data=texts(), steps=1, batch=4)


def test_predict_gives_logits_without_the_labels_or_says_what_the_model_lacks():
    plan = from_model(bert(), data=texts(), steps=1, batch=4)
    batch = first_batch(plan)
    logits = plan.predict(bert().eval(), {**batch, "labels": torch.full((4,), 99)}, None)  # no such class
    assert torch.equal(
        logits, bert().eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    )
    with_sample = {"sample": torch.rand(2, 1, 8, 8), "timestep": torch.tensor([1, 2])}
    plan = from_model(unet(), data=pictures(), steps=1, batch=4, loss=denoising)
    assert plan.predict(unet(), with_sample, None).shape == (2, 1, 8, 8)
    with pytest.raises(PlanError, match="needs 'sample', but the batches have images"):
        plan.predict(unet(), first_batch(plan), None)
    sequential = nn.Sequential(nn.Linear(4, 3))
    plan = from_model(sequential, data=points(), held_out=points(), steps=1, batch=4, loss=classify)
    assert 0 <= run(plan).scores["accuracy"] <= 1


def fresh():
    return Scaled()


def fresh_of(ctx):
    return Scaled(scale=1.0 + ctx.seed)


def test_a_function_makes_the_model_anew_for_each_seed_and_a_model_begins_alike():
    def begun(model, seed):
        before = torch.get_rng_state()
        plan = from_model(model, data=points(), steps=0, batch=4, loss=classify)
        found = Engine(plan, seed, Store(None)).model_at("init")
        assert torch.equal(torch.get_rng_state(), before)
        return found

    weights = [begun(fresh, seed).linear.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert begun(fresh_of, 4).scale == 5.0
    assert torch.equal(begun(scaled(), 0).linear.weight, begun(scaled(), 1).linear.weight)


def test_facts_can_be_overridden_and_carry_the_held_out_examples():
    facts = {"input_range": (0.0, 1.0), "domain": "toys", "modality": "speech"}
    plan = from_model(vit(), data=images(), held_out=images(5), steps=1, batch=4, facts=facts)
    assert (plan.facts.modality, plan.facts.input_range, plan.facts.get("domain")) == ("speech", (0.0, 1.0), "toys")
    assert plan.facts.get("held_out")()["pixel_values"].shape == (5, 1, 8, 8)
    noisy = pt.apply(plan, [InputNoise(0.5)])
    assert run(noisy).weights != run(plan).weights
    with pytest.raises(PlanError, match="requires the fact input_range"):
        pt.apply(from_model(vit(), data=images(), steps=1, batch=4), [InputNoise(0.5)])


# --- keys ---


def test_what_decides_the_bits_decides_the_key():
    def of(model, data=None, **more):
        return key(from_model(model, data=data or texts(), steps=1, batch=4, **more))

    keys = [of(bert()), of(bert(hidden_act="relu")), of(bert(layer_norm_eps=1e-3)), of(bert(), texts(11))]
    moved, frozen, eager = bert(), bert(), bert()
    with torch.no_grad():
        moved.classifier.bias[0] += 1e-3
    frozen.classifier.bias.requires_grad_(False)
    eager.set_attn_implementation("eager")
    keys += [of(m) for m in (moved, frozen, eager)]
    assert len(set(keys)) == len(keys)
    assert not any(k.startswith("unkeyed") for k in keys)
    assert of(bert()) == of(bert().eval()) == keys[0]


def test_an_attribute_that_no_state_dict_holds_is_in_the_key():
    keys = [key(from_model(scaled(s), data=points(), steps=1, batch=4, loss=classify)) for s in (1.0, 1.0, 2.0)]
    assert keys[0] == keys[1] != keys[2]


def test_data_enter_by_content():
    def of(data):
        return key(from_model(scaled(), data=data, steps=1, batch=4, loss=classify))

    changed = points()
    changed[7]["x"] = changed[7]["x"] + 1e-3
    assert of(points()) == of(points()) != of(changed)
    for kind in ("datasets", "tensors", "subset", "arrays"):
        assert of(same_data()[kind]) == of(same_data()[kind])
        assert not of(same_data()[kind]).startswith("unkeyed")


def test_another_process_finds_the_same_key():
    code = "from test_own_model import language_key; print(language_key())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == language_key()


def language_key():
    return key(from_model(llama(), data=texts(labels=False), held_out=texts(labels=False), steps=1, batch=4))


def test_what_cannot_be_told_runs_unshared_and_one_line_says_so(capsys):
    plan = from_model(scaled(), data=points(), steps=1, batch=4, loss=lambda m, b, ctx: classify(m, b, ctx))
    assert run(plan).diverged is None
    assert key(plan) != key(plan)
    assert capsys.readouterr().err.count("no checkpoint is shared or resumed where") == 1
    assert key(from_model(scaled(), data=Counted(), steps=1, batch=4, loss=classify)).startswith("unkeyed")


def test_what_is_done_to_the_model_or_the_list_later_changes_no_run():
    model, data = scaled(), points()
    plan = from_model(model, data=data, steps=3, batch=4, loss=classify)
    before = run(plan).weights
    nn.init.zeros_(model.linear.weight)
    data.clear()
    assert run(plan).weights == before


# --- workers and the example ---


def test_workers_give_the_same_results_keyed_or_not(tmp_path):
    keyed = from_model(bert(), data=texts(), held_out=texts(), steps=2, batch=4)
    shift = 0.5
    closed = from_model(
        bert(), data=datasets.Dataset.from_list(texts()), held_out=texts(), steps=2, batch=4,
        loss=lambda m, b, ctx: shift + m(input_ids=b["input_ids"], labels=b["labels"]).loss,
    )  # fmt: skip
    found = Pool(tmp_path, workers=2).run([Job("keyed", keyed, 0), Job("closed", closed, 1)])
    for result, alone in zip(found, (run(keyed, 0), run(closed, 1)), strict=True):
        assert (result.weights, result.scores) == (alone.weights, alone.scores)


def test_the_example_is_short_and_answers(monkeypatch, capsys):
    tree = ast.parse(EXAMPLE.read_text())
    own = [
        n for n in ast.walk(tree) if isinstance(n, ast.stmt) and not isinstance(getattr(n, "value", None), ast.Constant)
    ]
    assert len(own) <= 15
    compare = pt.compare
    monkeypatch.setattr(
        pt, "compare", lambda *a, **how: compare(*a, **{**how, "seeds": 1, "workers": 1}), raising=False
    )
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    noise = ast.literal_eval(capsys.readouterr().out)["noise"]
    assert noise["n"] == 1
    assert -0.5 < noise["effect"] < 0.2


def test_the_example_serves_the_command_line():
    plan = load_plan(f"{EXAMPLE}:plan")()
    assert plan.name == "ViTForImageClassification"
    assert [m.name for m in plan.measures] == ["loss", "accuracy"]
    assert len(plan.facts.get("held_out")) == 450
    short = plan.replace(stages=(dataclasses.replace(plan.stages[0], steps=1),))
    assert run(short).scores["loss"] < 4
