"""Whatever stops a run, the same command goes on and ends with the same bits."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import toy

from perturbed.core.plan import Stage
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.errors import Interrupted

HERE = Path(__file__).parent
PARTIAL = "*/*-partial.safetensors"


def outcome(result):
    """All that must be equal bit for bit; seconds and bytes differ from run to run."""
    counted = {k: v for k, v in dataclasses.asdict(result.cost).items() if not k.endswith(("_s", "_bytes"))}
    return result.weights, result.scores, result.curves, counted


@pytest.fixture(scope="module")
def unbroken():
    return outcome(Engine(toy.rich(), 0, Store(None)).run())


class Child:
    """``child.py`` on a store; ``until(n)`` returns once it reports n steps or more."""

    def __init__(self, root, seconds=0.05, checkpoint_s=0.2):
        command = [sys.executable, str(HERE / "child.py"), str(root), str(seconds), str(checkpoint_s)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr.readline() == "ready\n"

    def until(self, steps):
        for line in self.process.stderr:
            done = int(line.partition("/")[0])
            if done >= steps:
                return done
        raise AssertionError(f"ended before step {steps}")

    def end(self, number=None):
        if number:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def finish(root):
    code, out, err = Child(root, seconds=0.0).end()
    assert code == 0, err
    from perturbed.core.run import Result

    read = Result.from_json(json.loads(out))
    return outcome(dataclasses.replace(read, curves={k: [tuple(p) for p in c] for k, c in read.curves.items()}))


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_never_broken_and_loses_one_interval_at_most(tmp_path, unbroken):
    reached = 0
    for moment in (13, 22, 34):
        child = Child(tmp_path)
        began = child.until(reached - 5)  # the first report, 0.2 s after going on
        assert began > reached - 5
        reached = child.until(moment) if began < moment else began
        code, _, _ = child.end(signal.SIGKILL)
        assert code == -signal.SIGKILL
    assert reached >= 34
    assert list(tmp_path.glob(PARTIAL))
    assert finish(tmp_path) == unbroken
    assert not list(tmp_path.glob(PARTIAL))


SUICIDE = """
import os, signal, sys
from pathlib import Path
import toy
import perturbed.core.store as store
from perturbed.core.run import Engine
count, replace = [int(sys.argv[2])], os.replace
def dying(source, target):
    count[0] -= 1
    if count[0] == 0 and sys.argv[3] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if count[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
Engine(toy.rich(), 0, store.Store(Path(sys.argv[1])), checkpoint_s=0.0).run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_it_writes_a_checkpoint(tmp_path, unbroken, moment):
    for writes in (12,):
        command = [sys.executable, "-c", SUICIDE, str(tmp_path), str(writes), moment]
        assert subprocess.run(command, cwd=HERE, timeout=60).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("??/.writing-*"))) == (1 if moment == "before" else 0)
    assert finish(tmp_path) == unbroken


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, unbroken):
    child = Child(tmp_path, checkpoint_s=1000)
    reached = child.until(12)
    code, out, err = child.end(signal.SIGINT)
    assert (code, out) == (130, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("Interrupted: stopped in stage 'first' at step ")
    assert last.endswith("the same command goes on from there")
    (partial,) = tmp_path.glob(PARTIAL)
    step = Store(tmp_path).get(partial.stem)["step"]
    assert reached <= step == int(last.split("at step ")[1].split(";")[0])
    assert finish(tmp_path) == unbroken


# ---- the same in one process, at every step --------------------------------------------------------------------------


def crashing():
    plan = toy.rich(steps=12)
    return plan.edit("*", lambda s: dataclasses.replace(s, data=toy.CrashAt(s.data, s.name)))


@pytest.mark.parametrize("stage", ["first", "second"])
def test_stopped_at_any_step_it_goes_on_bit_for_bit(tmp_path, monkeypatch, stage):
    plan = crashing()
    expected = outcome(Engine(plan, 0, Store(None)).run())
    for step in range(12):
        store = Store(tmp_path / str(step))
        with monkeypatch.context() as patch:
            patch.setattr(toy.CrashAt, "armed", (stage, step))
            with pytest.raises(toy.Crash):
                Engine(plan, 0, store, checkpoint_s=0.0).run()
        engine = Engine(plan, 0, store, checkpoint_s=0.0)
        partial = store.get(engine.key(stage) + "-partial")
        assert (partial["step"] if partial else 0) == step
        assert outcome(engine.run()) == expected


@pytest.mark.parametrize("part", ["state", "artifacts", "nets", "optim", "stream"])
def test_a_checkpoint_without_one_of_its_parts_would_not_do(tmp_path, monkeypatch, part):
    """That the test above can fail: each part of the checkpoint matters to the bits."""
    plan, store = crashing(), Store(tmp_path)
    expected = outcome(Engine(plan, 0, Store(None)).run())
    with monkeypatch.context() as patch:
        patch.setattr(toy.CrashAt, "armed", ("first", 7))
        with pytest.raises(toy.Crash):
            Engine(plan, 0, store, checkpoint_s=0.0).run()
    engine = Engine(plan, 0, store)
    partial = engine.key("first") + "-partial"
    nothing = {"optim": toy_state(), "stream": {"at": 0, "epoch": 0}}.get(part, {})
    store.put(partial, {**store.get(partial), part: nothing})
    assert outcome(engine.run()) != expected


def toy_state():
    fresh = toy.adam(toy.Classifier(), None)
    return fresh.state_dict()


def test_snapshots_state_artifacts_and_nets_survive(tmp_path, monkeypatch):
    plan = crashing()
    whole, broken = Engine(plan, 0, Store(None)), Engine(plan, 0, Store(tmp_path), checkpoint_s=0.0)
    whole.run()
    monkeypatch.setattr(toy.CrashAt, "armed", ("first", 9))
    with pytest.raises(toy.Crash):
        broken.run()
    monkeypatch.setattr(toy.CrashAt, "armed", None)
    again = Engine(plan, 0, Store(tmp_path))
    for ref in ("first@3", "first@11", "first", "second"):
        one, two = whole.snapshot(ref), again.snapshot(ref)
        assert one["state"] == two["state"]
        assert torch.equal(one["artifacts"]["mean"], two["artifacts"]["mean"])
        for name, value in one["nets"]["pusher"]["module"].items():
            assert torch.equal(value, two["nets"]["pusher"]["module"][name])
        moments = zip(
            one["nets"]["pusher"]["optim"]["state"].values(),
            two["nets"]["pusher"]["optim"]["state"].values(),
            strict=True,
        )
        assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in moments)
    assert again.snapshot("first@3")["state"] == {"seen": 24}
    assert again.snapshot("second")["state"] == {"seen": 2 * 12 * 8}  # state comes with the snapshot begun from


def net_at_the_start(model, ctx):
    ctx.net("pusher", toy.tiny_net, toy.tiny_net_optim)
    return model


def test_a_net_that_a_slot_makes_before_the_first_step_survives_too(tmp_path, monkeypatch):
    plan = crashing().add_weights("first", net_at_the_start)
    expected = outcome(Engine(plan, 0, Store(None)).run())
    assert expected == outcome(Engine(crashing(), 0, Store(None)).run())
    monkeypatch.setattr(toy.CrashAt, "armed", ("first", 7))
    with pytest.raises(toy.Crash):
        Engine(plan, 0, Store(tmp_path), checkpoint_s=0.0).run()
    monkeypatch.setattr(toy.CrashAt, "armed", None)
    assert outcome(Engine(plan, 0, Store(tmp_path)).run()) == expected


@pytest.mark.parametrize("damage", [b"", b"rubbish" * 100])
def test_a_damaged_checkpoint_in_mid_stage_costs_the_stage_and_no_more(tmp_path, monkeypatch, capsys, damage):
    plan = crashing()
    expected = outcome(Engine(plan, 0, Store(None)).run())
    monkeypatch.setattr(toy.CrashAt, "armed", ("second", 7))
    with pytest.raises(toy.Crash):
        Engine(plan, 0, Store(tmp_path), checkpoint_s=0.0).run()
    monkeypatch.setattr(toy.CrashAt, "armed", None)
    (partial,) = tmp_path.glob(PARTIAL)
    partial.write_bytes(damage)
    assert outcome(Engine(plan, 0, Store(tmp_path)).run()) == expected
    assert "is damaged" in capsys.readouterr().err


def interrupting(batch, ctx):
    if ctx.step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return batch


def test_sigterm_waits_for_the_end_of_the_step_and_the_old_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    engine = Engine(toy.one_stage(inputs=interrupting), 0, Store(tmp_path))
    with pytest.raises(Interrupted, match="at step 5; the same command goes on"):
        engine.run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert engine.store.get(engine.key("train") + "-partial")["step"] == 5
    # going on is past step 4, so nothing interrupts it
    finished = Engine(toy.one_stage(inputs=interrupting), 0, Store(tmp_path)).run()
    assert finished.weights == Engine(toy.one_stage(), 0, Store(None)).run().weights


def interrupt_while_measuring(run):
    os.kill(os.getpid(), signal.SIGTERM)
    return {"m": 1.0}


def test_ctrl_c_while_measuring_in_mid_stage_leaves_a_checkpoint_with_the_measure_in_it(tmp_path):
    from perturbed.core.plan import Measure

    plan = toy.one_stage()
    plan = plan.replace(measures=(Measure("m", interrupt_while_measuring, when=4), Measure("n", toy.noisy, when=4)))
    engine = Engine(plan, 0, Store(tmp_path))
    with pytest.raises(Interrupted):
        engine.run()
    partial = engine.store.get(engine.key("train") + "-partial")
    assert partial["step"] == 4
    assert [step for step, _ in partial["curves"]["m"]] == [4]
    assert [step for step, _ in partial["curves"]["noisy"]] == [4]
    assert [step for step, _ in Engine(plan, 0, Store(tmp_path)).run().curves["noisy"]] == [4]


def test_ctrl_c_between_the_last_measures_loses_no_training(tmp_path, monkeypatch):
    from perturbed.core.plan import Measure

    plan = toy.one_stage().replace(measures=(Measure("m", interrupt_while_measuring), Measure("n", toy.noisy)))
    with pytest.raises(Interrupted, match="before measure 'n'"):
        Engine(plan, 0, Store(tmp_path)).run()
    monkeypatch.setattr(Engine, "_train", None)
    monkeypatch.setattr("os.kill", lambda *a: None)
    assert set(Engine(plan, 0, Store(tmp_path)).run().scores) == {"m", "noisy"}


def test_a_stage_that_ended_is_not_trained_again(tmp_path, monkeypatch):
    plan = toy.plan()
    Engine(plan, 0, Store(tmp_path)).run()
    trained = []
    monkeypatch.setattr(Engine, "_train", lambda self, s, real=Engine._train: trained.append(s.name) or real(self, s))
    longer = plan.insert(Stage(name="more", steps=2, data=toy.Points(), loss=toy.loss, optim=toy.adam), after="tune")
    shared = Engine(longer, 0, Store(tmp_path)).run()
    assert trained == ["more"]
    alone = Engine(longer, 0, Store(None)).run()
    assert outcome(shared) == outcome(alone)  # also its cost: a shared stage is charged to every arm that uses it


CLOSE = """
import signal, sys
from perturbed.core.run import Stopping
with Stopping() as s:
    signal.raise_signal(signal.SIGINT)
    assert s.asked
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("second")
"""


def test_a_second_ctrl_c_does_not_wait():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(CLOSE)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "second\n", done.stderr
