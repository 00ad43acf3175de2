"""Runs: where stages begin, what they may see, what comes out."""

import dataclasses
import itertools
import math

import pytest
import torch
import toy
from torch import nn

from perturbed.core.plan import Feature, Measure, Stage, apply
from perturbed.core.run import Engine, Result
from perturbed.core.store import Store
from perturbed.errors import PlanError


def engine(plan, seed=0):
    return Engine(plan, seed, Store(None))


def stage(name, **fields):
    return Stage(**{"name": name, "steps": 3, "data": toy.Points(), "loss": toy.loss, "optim": toy.adam, **fields})


def measures(*fns):
    return tuple(Measure(f.__name__, f) for f in fns)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---- the loop --------------------------------------------------------------------------------------------------------


def linear_build(ctx):
    return nn.Linear(6, 2)


def test_training_is_what_the_same_loop_by_hand_does():
    plan = toy.one_stage(steps=8, data=toy.Epochs()).replace(build=linear_build)
    running = engine(plan)
    model = running.model_at("init")
    ctx = running._ctx(plan.stages[0], 8)
    stream, optim = toy.Epochs()(ctx), torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    losses = []
    for step in range(8):
        optim.param_groups[0]["lr"] = 1e-2 * (1 - step / 9)
        batch = next(stream)
        value = nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
        losses.append((step, value.item()))
    assert equal(running.snapshot("train")["model"], state(model))
    assert running.run().curves["loss"] == losses


def test_the_same_seed_twice_is_the_same_and_another_is_not():
    results = [engine(toy.rich(steps=12), seed).run() for seed in (0, 0, 1)]
    assert results[0].weights == results[1].weights != results[2].weights
    assert results[0].scores == results[1].scores


def test_disk_and_memory_give_the_same(tmp_path):
    one, two = engine(toy.rich(steps=12)).run(), Engine(toy.rich(steps=12), 0, Store(tmp_path)).run()
    again = Engine(toy.rich(steps=12), 0, Store(tmp_path)).run()
    assert (one.weights, one.scores, one.curves) == (two.weights, two.scores, two.curves)
    assert again == two
    assert Result.from_json(two.to_json()) == two


def test_every_run_has_the_threads_of_its_plan_also_where_a_snapshot_is_asked_for_alone():
    seen = []

    def look(model, ctx):
        seen.append(torch.get_num_threads())
        return model

    before = torch.get_num_threads()
    for wanted in (1, 2):
        plan = toy.one_stage(weights=look).replace(threads=wanted)
        running = engine(plan)
        running.snapshot("train")
        running.model_at("train")
        running.run()
        assert set(seen) == {wanted}
        seen.clear()
    assert torch.get_num_threads() == before


def test_a_diverged_run_says_where_and_has_no_scores(tmp_path):
    plan = toy.plan().edit("tune", lambda s: dataclasses.replace(s, loss=toy.nan_from_step_three))
    for _ in range(2):  # trained, then from the store
        result = Engine(plan, 0, Store(tmp_path)).run()
        assert result.scores == {}
        assert result.diverged == "the loss was nan in stage 'tune' at step 3"
        assert all(math.isfinite(v) for _, v in result.curves["loss"])
    assert Engine(toy.plan(), 0, Store(tmp_path)).run().diverged is None


def test_a_score_that_is_not_finite_is_none_and_the_run_goes_on():
    def broken(run):
        return {"nan": math.nan, "inf": math.inf, "one": 1}

    result = engine(toy.one_stage().replace(measures=measures(broken))).run()
    assert result.scores == {"nan": None, "inf": None, "one": 1.0}
    assert result.diverged is None


def test_measures_at_the_end_after_each_stage_and_in_mid_stage():
    result = engine(toy.plan()).run()
    assert set(result.scores) == {"accuracy", "accuracy@pretrain", "accuracy@tune"}
    assert result.scores["accuracy"] == result.scores["accuracy@tune"]
    assert [step for step, _ in result.curves["noisy"]] == [2, 4, 6, 8, 10]  # counted over the plan
    assert [step for step, _ in result.curves["accuracy"]] == [6, 10]
    assert [step for step, _ in result.curves["loss"]] == list(range(10))


# ---- where stages begin ----------------------------------------------------------------------------------------------


def test_a_stage_goes_on_from_the_one_before_or_from_any_snapshot():
    seen = {}

    def look(model, ctx):
        seen[ctx.stage] = state(model)
        return model

    plan = toy.plan(stages=(
        stage("a", snapshots=(0, 2)), stage("b", weights=look), stage("c", start="a@2", weights=look),
        stage("d", start="init", weights=look), stage("e", start="a@0", weights=look),
        stage("f", start="a@3", weights=look),
    ), measures=())  # fmt: skip
    running = engine(plan)
    running.run()
    for name, ref in (("b", "a"), ("c", "a@2"), ("d", "init"), ("e", "init"), ("f", "a")):
        assert equal(seen[name], state(running.model_at(ref))), name
    assert not equal(seen["b"], seen["c"])
    assert not equal(seen["c"], seen["d"])


def test_a_snapshot_is_the_run_that_ends_there():
    short = toy.one_stage(steps=6, optim=constant_adam)
    long = toy.one_stage(steps=9, optim=constant_adam, snapshots=(6,))
    assert equal(engine(long).snapshot("train@6")["model"], engine(short).snapshot("train")["model"])


def constant_adam(model, ctx):
    from perturbed.core.optimiser import Optim

    return Optim(torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False))


def test_a_stage_may_keep_the_optimiser_of_the_snapshot_it_begins_from():
    def one(optim):
        plan = toy.plan(stages=(stage("a"), stage("b", optim=optim), stage("c", start="a", optim=optim)), measures=())
        running = engine(plan)
        running.run()
        return running

    kept, fresh = one(toy.adam_kept), one(toy.adam)
    assert not equal(kept.snapshot("b")["model"], fresh.snapshot("b")["model"])
    steps = {ref: kept.snapshot(ref)["optim"]["state"][0]["step"].item() for ref in "abc"}
    assert steps == {"a": 3, "b": 6, "c": 6}  # both begin from a, which neither has touched


def wide(ctx):
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))


def test_a_stage_with_a_model_of_its_own():
    plan = toy.plan(stages=(stage("teacher"), stage("student", build=wide), stage("after")))
    running = engine(plan)
    running.run()
    assert isinstance(running.model_at("student"), nn.Sequential)
    assert isinstance(running.model_at("after"), nn.Sequential)
    assert isinstance(running.model_at("teacher"), toy.Classifier)
    # its initialisation is its own: nothing before it in the plan moves it
    alone = engine(toy.plan(stages=(stage("student", build=wide),), measures=()))
    assert equal(running.snapshot("student")["model"], alone.snapshot("student")["model"])


def average(model, ctx):
    parts = [ctx.past[ref].state_dict() for ref in ("left", "right")]
    model.load_state_dict({k: (v + parts[1][k]) / 2 if v.is_floating_point() else v for k, v in parts[0].items()})
    return model


def test_a_stage_of_no_steps_merges_two_others():
    plan = toy.plan(stages=(
        stage("base"), stage("left", data=toy.Points(4)), stage("right", start="base"),
        stage("merge", steps=0, start="base", reads=("left", "right"), weights=average),
    ))  # fmt: skip
    running = engine(plan)
    result = running.run()
    left, right, merged = (running.snapshot(ref)["model"] for ref in ("left", "right", "merge"))
    assert torch.equal(merged["head.weight"], (left["head.weight"] + right["head.weight"]) / 2)
    assert not equal(left, right)
    assert result.scores["accuracy"] is not None
    assert len(result.curves["loss"]) == 9


# ---- past ------------------------------------------------------------------------------------------------------------


def test_past_models_are_frozen_copies_of_declared_snapshots():
    seen = []

    def look(batch, ctx):
        past = ctx.past["a@1"]
        assert past is ctx.past["a@1"]
        assert not past.training
        assert not any(p.requires_grad for p in past.parameters())
        seen.append(state(past))
        return batch

    plan = toy.plan(stages=(stage("a", snapshots=(1,)), stage("b", reads=("a@1",), inputs=look)), measures=())
    running = engine(plan)
    running.run()
    assert len(seen) == 3
    assert all(equal(s, state(running.model_at("a@1"))) for s in seen)


def test_an_undeclared_past_raises_and_says_so():
    def take(batch, ctx):
        ctx.past["a"]
        return batch

    plan = toy.plan(stages=(stage("a", snapshots=(1,)), stage("b", reads=("a@1",), inputs=take)))
    with pytest.raises(
        PlanError, match=r"stage 'b' takes past\['a'\] without declaring it in reads: did you mean 'a@1'"
    ):
        engine(plan).run()


def test_a_measure_may_look_at_every_snapshot():
    def drift(run):
        ends = [run.past[ref].head.weight for ref in ("init", "a@1", "a", "b")]
        assert torch.equal(ends[3], run.model.head.weight)
        return {f"moved {i}": (x - y).norm().item() for i, (x, y) in enumerate(itertools.pairwise(ends))}

    plan = toy.plan(stages=(stage("a", snapshots=(1,)), stage("b")), measures=measures(drift))
    assert all(v > 0 for v in engine(plan).run().scores.values())


def test_state_and_artifacts_come_with_the_snapshot_begun_from():
    def count(batch, ctx):
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        ctx.artifacts.setdefault("list", []).append(ctx.stage)
        return batch

    def told(run):
        assert run.artifacts["list"] == ["a"] * 3 + ["c"] * 3
        return {"n": run.ctx.state["n"]}

    plan = toy.plan(
        stages=(stage("a", inputs=count), stage("b", inputs=count), stage("c", start="a", inputs=count)),
        measures=measures(told),
    )
    running = engine(plan)
    assert running.run().scores == {"n": 6.0}
    assert running.snapshot("b")["artifacts"] == {"list": ["a"] * 3 + ["b"] * 3}


def test_state_that_cannot_be_saved_is_an_error_with_its_place():
    def keep(batch, ctx):
        ctx.state["model"] = ctx.model
        return batch

    with pytest.raises(PlanError, match="state/model holds a Classifier"):
        engine(toy.one_stage(inputs=keep)).run()


# ---- features --------------------------------------------------------------------------------------------------------


def zero(h, ctx):
    return h * 0


def test_features_are_held_in_training_and_leave_no_trace():
    calls = []

    def spy(h, ctx):
        calls.append((ctx.stage, ctx.model.training, h.shape, "labels" in ctx.batch))
        return h

    plan = toy.one_stage(features=(Feature("norm", spy),)).add_measures(Measure("curve", toy.noisy, when=1))
    running = engine(plan)
    assert running.run().weights == engine(toy.one_stage()).run().weights
    assert calls == [("train", True, (8, 16), True)] * 6  # neither while measuring, nor after


def test_hooks_go_even_where_a_step_fails():
    models = []

    def look(model, ctx):
        models.append(model)
        return model

    def fail(h, ctx):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine(toy.one_stage(features=(Feature("*", fail),), weights=look)).run()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in models[0].modules())


def test_a_features_whole_effect_is_that_of_the_changed_hidden_state():
    def expected(model, batch, ctx):
        h = model.norm(model.first(batch["x"]))
        return nn.functional.cross_entropy(model.head(model.dropout(torch.relu(h * 0))), batch["labels"])

    hooked = engine(toy.one_stage(features=(Feature("norm", zero),))).snapshot("train")["model"]
    assert equal(hooked, engine(toy.one_stage(loss=expected)).snapshot("train")["model"])
    assert not equal(hooked, engine(toy.one_stage()).snapshot("train")["model"])


def test_features_of_the_plan_are_held_while_predicting_only():
    def logits(run):
        return {"sum": run.predict({"x": torch.ones(2, 6)}).abs().sum().item()}

    plan = toy.one_stage().replace(measures=measures(logits))
    plain, muted = engine(plan), engine(plan.replace(features=(Feature("head", zero),)))
    assert muted.run().scores == {"sum": 0.0}
    assert plain.run().scores["sum"] > 0
    assert muted.run().weights == plain.run().weights


def test_features_act_on_the_first_tensor_of_a_tuple_a_list_or_a_model_output():
    from collections import namedtuple

    from transformers.modeling_outputs import BaseModelOutput

    from perturbed.core.context import _on_first

    h, other = torch.ones(2), torch.full((2,), 5.0)
    pair = namedtuple("pair", "a b")
    cases = [(h, other), [h, other], (None, h, other), pair(h, other), {"hidden": h, "other": other}]
    for output in cases:
        changed = _on_first(output, lambda t: t + 1)
        assert type(changed) is type(output)
        values = list(changed.values()) if isinstance(changed, dict) else list(changed)
        values = [v for v in values if v is not None]
        assert torch.equal(values[0], h + 1)
        assert torch.equal(values[1], other)
    output = BaseModelOutput(last_hidden_state=h, hidden_states=(other,))
    changed = _on_first(output, lambda t: t + 1)
    assert type(changed) is BaseModelOutput
    assert torch.equal(changed.last_hidden_state, h + 1)
    assert torch.equal(changed[0], h + 1)
    assert changed.hidden_states == (other,)
    assert torch.equal(output.last_hidden_state, h)


def test_features_on_a_transformers_model():
    plan = toy.llama_plan()
    for where in ("model.layers.0", "model.layers.*.self_attn", "model", "lm_head"):
        changed = plan.add_feature("*", Feature(where, halve))
        assert engine(changed).run().weights != engine(plan).run().weights, where


def halve(h, ctx):
    return h * 0.5


def test_feature_order_is_that_of_application():
    h = []

    def add(t, ctx):
        return t + 1

    def double(t, ctx):
        h.append(None)
        return t * 2

    def expect(model, batch, ctx):
        with torch.no_grad():
            model.head.weight.zero_(), model.head.bias.zero_()
        assert torch.all(model(batch["x"]) == 2)
        return toy.loss(model, batch, ctx)

    engine(toy.one_stage(loss=expect, features=(Feature("head", add), Feature("head", double)))).run()
    assert h


# ---- how a step is taken ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "batch"), [(2, 8), (3, 8), (8, 8), (16, 8)])
def test_micro_batches_give_the_gradient_of_the_whole_batch(monkeypatch, accumulate, batch):
    plan = toy.one_stage(steps=5, data=toy.Points(batch)).replace(build=linear_build)
    whole = engine(plan).snapshot("train")["model"]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(accumulate))
    parts = engine(plan).snapshot("train")["model"]
    assert not equal(parts, whole) or accumulate == 1
    assert all(torch.allclose(parts[k], whole[k], atol=1e-6) for k in whole)


def test_micro_batches_draw_dropout_of_their_own(monkeypatch):
    masks = []

    def spy(h, ctx):
        masks.append(h == 0)
        return h

    def dropping(ctx):
        return nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 2))

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    engine(toy.one_stage(steps=1, features=(Feature("1", spy),)).replace(build=dropping)).run()
    assert len(masks) == 2
    assert not torch.equal(*masks)


def test_sharpness_of_radius_zero_is_the_plain_step():
    """SAM at ρ = 0: two loss calls and gradients in a step equal one, dropout and batch statistics included."""

    def twice(model, batch, loss, optim, ctx):
        buffers = [b.clone() for b in model.buffers()]
        ctx.backward(loss(model, batch, ctx))
        optim.zero_grad()
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        value = loss(model, batch, ctx)
        ctx.backward(value)
        optim.step()
        optim.zero_grad()
        return value.detach()

    assert engine(toy.one_stage(update=twice)).run().weights == engine(toy.one_stage()).run().weights


def test_ctx_loss_is_of_the_training_stage_only():
    def ask(run):
        run.ctx.loss(run.model, {"x": torch.zeros(1, 6)}, run.ctx)

    with pytest.raises(PlanError, match=r"ctx\.loss is that of a training stage"):
        engine(toy.one_stage().replace(measures=measures(ask))).run()


def test_an_intervention_on_a_composed_plan_runs():
    plan = apply(toy.rich(steps=12), [toy.Scale(0.9), toy.Shift(0.1, stage="second"), toy.Fidget("first")])
    result = engine(plan).run()
    assert result.weights == engine(plan).run().weights
    assert result.weights != engine(toy.rich(steps=12)).run().weights
