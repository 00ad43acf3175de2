"""Paired randomness: every draw is a function of (seed, stage, name, step) alone."""

import dataclasses
import itertools
import random

import numpy
import pytest
import torch
import toy

from perturbed.core.plan import Feature, Stage, apply
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.core.streams import Streams


def run(plan, seed=0):
    return Engine(plan, seed, Store(None)).run()


def weights(plan, ref, seed=0):
    return Engine(plan, seed, Store(None)).snapshot(ref)["model"]


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def draws(streams, name="a", every="step", n=3):
    return torch.rand(n, generator=streams.rng(name, every))


def at(step, seed=0, stage="s"):
    streams = Streams(seed)
    streams.tick(stage, step)
    return streams


def test_a_draw_is_told_by_seed_stage_name_and_step_and_by_nothing_else():
    keys = itertools.product((0, 1), ("s", "t"), ("a", "b"), (0, 1))
    values = {key: tuple(draws(at(key[3], key[0], key[1]), key[2]).tolist()) for key in keys}
    assert len(set(values.values())) == 16
    long_way = Streams(1)
    for step in range(2):
        long_way.tick("t", step)
        for name in ("x", "b", "y"):
            drawn = draws(long_way, name)
    assert tuple(drawn.tolist()) != values[1, "t", "b", 1]  # y was drawn last …
    long_way.tick("t", 1)
    assert tuple(draws(long_way, "b").tolist()) == values[1, "t", "b", 1]  # … b is as if nothing else had been drawn


def test_a_handle_taken_outside_the_loop_is_keyed_again_each_step():
    streams = at(0)
    handle = streams.rng("a")
    outside = []
    for step in range(3):
        streams.tick("s", step)
        outside.append(torch.rand(3, generator=handle))
    inside = [draws(at(step)) for step in range(3)]
    assert all(map(torch.equal, outside, inside))
    assert not torch.equal(outside[0], outside[1])


def test_a_second_call_of_a_name_within_a_step_goes_on():
    streams = at(0)
    first, second = draws(streams), draws(streams)
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat((first, second)), torch.rand(6, generator=at(0).rng("a")))


def test_every_says_when_the_same_draws_come_again():
    def drawn(every, seed=0):
        return {
            (stage, step): tuple(draws(at(step, seed, stage), "a", every).tolist()) for stage in "st" for step in (0, 1)
        }

    step, stage, run_ = drawn("step"), drawn("stage"), drawn("run")
    assert len(set(step.values())) == 4
    assert stage["s", 0] == stage["s", 1] != stage["t", 0] == stage["t", 1]
    assert len(set(run_.values())) == 1
    assert run_ != drawn("run", seed=1)


def test_the_clock_brings_the_draws_of_a_stage_again_also_through_a_handle():
    streams = at(0)
    handle, drawn = streams.rng("a", "stage"), []
    for step in range(3):
        streams.tick("s", step)
        drawn.append(torch.rand(3, generator=handle))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_once_is_not_moved_by_the_clock():
    streams = at(0)
    counter = streams.once("perm")
    first = torch.rand(2, generator=counter)
    streams.tick("s", 1)
    rest = torch.rand(2, generator=counter)
    assert torch.equal(torch.cat((first, rest)), torch.rand(4, generator=at(5).once("perm")))


def test_a_scope_entered_again_gives_the_same_draws_and_leaves_the_default_generator_alone():
    streams = at(0)
    before = torch.get_rng_state()
    seen = []
    for _ in range(2):
        with streams.scope("loss"):
            seen.append(torch.cat((torch.rand(3), draws(streams), draws(streams, "b"))))
    assert torch.equal(*seen)
    with streams.scope("loss", micro=1):
        assert not torch.equal(torch.rand(3), seen[0][:3])
    with streams.scope("other"):
        assert not torch.equal(torch.rand(3), seen[0][:3])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_scope_within_a_scope_does_not_move_the_outer_one():
    plain, nested = at(0), at(0)
    with plain.scope("inputs"):
        expected = torch.cat((torch.rand(2), torch.rand(2), draws(plain), draws(plain)))
    with nested.scope("inputs"):
        first, drawn = torch.rand(2), draws(nested)
        with nested.scope("loss"):
            torch.rand(5)
            draws(nested)
        found = torch.cat((first, torch.rand(2), drawn, draws(nested)))
    assert torch.equal(expected, found)


def test_ranks_draw_differently_except_in_a_shared_scope():
    drawn = []
    for rank in (0, 1):
        streams = Streams(0, rank)
        streams.tick("s", 0)
        with streams.scope("build", shared=True):
            shared = torch.rand(3)
        drawn.append((draws(streams), shared))
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


# ---- in whole runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["*", "pretrain", "tune"])
def test_an_intervention_that_draws_everywhere_moves_no_other_draw(stage):
    plan = toy.plan()
    control, fidgety = run(plan), run(apply(plan, [toy.Fidget(stage)]))
    assert fidgety.weights == control.weights
    assert fidgety.scores == control.scores
    assert fidgety.curves == control.curves


def test_on_a_language_model_class_too():
    plan = toy.llama_plan()
    control = run(plan)
    assert run(apply(plan, [toy.Fidget(where="model.layers.*.mlp")])).weights == control.weights
    assert run(plan, seed=1).weights != control.weights


def test_with_one_global_stream_the_same_insertion_moves_everything(monkeypatch):
    """The property above is the streams' doing: with streams that all draw from one generator it is gone."""
    monkeypatch.setattr(Streams, "rng", lambda self, name, every="step": torch.default_generator)
    plan = toy.plan()
    assert run(apply(plan, [toy.Fidget()])).weights != run(plan).weights


def test_without_forked_scopes_it_is_gone_as_well(monkeypatch):
    from contextlib import nullcontext

    plan = toy.plan()
    monkeypatch.setattr(Streams, "scope", lambda self, *a, **k: nullcontext())

    def outcome(plan):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return run(plan).weights

    assert outcome(plan) == outcome(plan)
    assert outcome(apply(plan, [toy.Fidget()])) != outcome(plan)


def test_two_arms_of_a_seed_share_initialisation_data_order_and_dropout():
    seen = {}

    def spy(arm):
        def inputs(batch, ctx):
            if ctx.step == 0:
                seen[arm, ctx.stage, "init"] = {k: v.clone() for k, v in ctx.model.state_dict().items()}
            seen[arm, ctx.stage, ctx.step] = batch["x"].clone()
            return batch

        def hidden(h, ctx):
            seen.setdefault((arm, ctx.stage, ctx.step, "kept"), h != 0)
            return h

        return inputs, hidden

    for arm, factor in (("control", 1.0), ("treated", 3.0)):
        inputs, hidden = spy(arm)
        plan = toy.plan().add_inputs("*", inputs).add_feature("*", Feature("dropout", hidden))
        plan = plan.edit("*", lambda s, f=factor: dataclasses.replace(s, loss=lambda m, b, c: f * toy.loss(m, b, c)))
        run(plan)
    assert equal(seen["control", "pretrain", "init"], seen["treated", "pretrain", "init"])
    for stage, steps in (("pretrain", 6), ("tune", 4)):
        for step in range(steps):
            assert torch.equal(seen["control", stage, step], seen["treated", stage, step])
    # dropout of 0.3 on rectified units: where both arms' units are positive, the same ones are dropped
    first = [seen[arm, "pretrain", 0, "kept"] for arm in ("control", "treated")]
    assert torch.equal(*first)
    assert not equal(weights(toy.plan(), "pretrain", seed=0), weights(toy.plan(), "pretrain", seed=1))


def test_a_renamed_stage_draws_anew_but_begins_from_the_same_initialisation():
    one = toy.one_stage()
    two = one.replace(stages=(dataclasses.replace(one.stages[0], name="other"),))
    assert equal(
        Engine(one, 0, Store(None)).model_at("init").state_dict(),
        Engine(two, 0, Store(None)).model_at("init").state_dict(),
    )
    assert not equal(weights(one, "train"), weights(two, "other"))


def test_two_loss_calls_in_a_step_see_the_same_dropout_and_the_same_feature_noise():
    values = []

    def attack(batch, ctx):
        values.append([])
        values[-1] += [float(ctx.loss(ctx.model, batch, ctx).detach()) for _ in range(3)]
        return batch

    def spying_loss(model, batch, ctx):
        value = toy.loss(model, batch, ctx)
        if ctx.model.training:
            values[-1].append(float(value.detach()))
        return value

    run(toy.one_stage(loss=spying_loss, inputs=attack, features=(Feature("norm", toy.feature_noise),)))
    for step in values:
        assert len(step) == 7  # three calls, each seen from inside and from outside, and the update's own
        assert len(set(step)) == 1
    assert len({step[0] for step in values}) == len(values)


def test_an_attack_of_zero_size_equals_no_attack_under_dropout():
    """With one scope a step, looking at the loss first would shift the dropout of the update."""

    def look(batch, ctx):
        buffers = [b.clone() for b in ctx.model.buffers()]
        ctx.loss(ctx.model, batch, ctx)
        for buffer, before in zip(ctx.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        return batch

    assert run(toy.one_stage(inputs=look)).weights == run(toy.one_stage()).weights


def test_global_generators_are_untouched_by_a_whole_run():
    def states():
        return random.getstate(), torch.get_rng_state().tolist(), str(numpy.random.get_state())

    before = states()
    run(apply(toy.plan(), [toy.Fidget()]))
    run(toy.rich(steps=12))
    assert states() == before


def test_a_global_seed_changes_nothing_in_a_run():
    outcomes = set()
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            outcomes.add(run(toy.plan()).weights)
    assert len(outcomes) == 1


def test_measuring_in_the_midst_of_training_moves_no_training_draw():
    plan = toy.plan()
    assert run(plan).weights == run(plan.replace(measures=plan.measures[:1])).weights


def test_a_stage_that_runs_again_elsewhere_in_the_plan_keeps_its_draws():
    """Streams are named after the stage, so a stage inserted before it moves its start but not its data."""
    seen = {}

    def spy(batch, ctx):
        seen.setdefault(ctx.stage, []).append(batch["x"].clone())
        return batch

    plan = toy.one_stage().add_inputs("*", spy)
    run(plan)
    alone = seen.pop("train")
    warm = Stage(name="warm", steps=2, data=toy.Points(), loss=toy.loss, optim=toy.adam)
    run(plan.insert(warm, before="train"))
    assert all(map(torch.equal, alone, seen["train"]))
