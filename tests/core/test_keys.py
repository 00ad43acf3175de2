"""Content keys: equal where a run would be equal, different where anything that decides its bits differs."""

import dataclasses
import enum
import functools
import json
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import toy

from perturbed.core import keys, run
from perturbed.core.keys import Unkeyed, describe, digest
from perturbed.core.plan import Feature, Measure, apply
from perturbed.core.run import Engine
from perturbed.core.store import Store

HERE = Path(__file__).parent


def stage_keys(plan, seed=0):
    return {k: v for k, v in Engine(plan, seed, Store(None)).all_keys().items()}


def key(plan, name="train", seed=0):
    return stage_keys(plan, seed)[name]


def test_another_process_gives_the_same_keys():
    code = (
        "import json, toy, test_keys as t; print(json.dumps([t.stage_keys(p) for p in (toy.rich(), toy.llama_plan())]))"
    )
    for hash_seed in ("1", "2"):
        env = {"PYTHONHASHSEED": hash_seed, "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, env=env, timeout=60
        )
        assert json.loads(done.stdout) == [stage_keys(toy.rich()), stage_keys(toy.llama_plan())], done.stderr


CHANGES = {
    "steps": {"steps": 7}, "data field": {"data": toy.Points(9)}, "data class": {"data": toy.Epochs(8)},
    "loss": {"loss": toy.nan_from_step_three}, "optim": {"optim": toy.adam_kept}, "inputs": {"inputs": toy.push},
    "a field deep inside": {"inputs": toy.ScaleInputs(1.5)}, "weights": {"weights": toy.fidget_weights},
    "features": {"features": (Feature("norm", toy.feature_noise),)}, "snapshots": {"snapshots": (2,)},
    "where a feature sits": {"features": (Feature("head", toy.feature_noise),)}, "build": {"build": toy.build},
    "facts": {"facts": dataclasses.replace(toy.FACTS, classes=3)}, "update": {"update": toy.fidget_weights},
}  # fmt: skip


def test_equal_content_has_equal_keys_and_every_change_another():
    assert stage_keys(toy.one_stage()) == stage_keys(toy.one_stage())
    found = {"as it is": key(toy.one_stage())}
    found |= {name: key(toy.one_stage(**change)) for name, change in CHANGES.items()}
    plan = toy.one_stage()
    found["seed"] = key(plan, seed=1)
    found["threads"] = key(plan.replace(threads=2))
    found["plan facts"] = key(plan.replace(facts=dataclasses.replace(toy.FACTS, modality="speech")))
    found["plan build"] = key(plan.replace(build=toy.tiny_llama))
    found["measured in mid-stage"] = key(plan.add_measures(Measure("each", toy.noisy, when=2)))
    assert len(set(found.values())) == len(found)
    assert not any(k.startswith("unkeyed") for k in found.values())


def test_what_does_not_change_the_training_does_not_change_its_key():
    plan = toy.one_stage()
    other = plan.replace(name="another", predict=toy.token_logits, measures=(), applied=("something",))
    assert key(other) == key(plan)
    assert stage_keys(other)["/result"] != stage_keys(plan)["/result"]
    deaf = plan.replace(features=(Feature("norm", toy.feature_noise),))
    assert key(deaf) == key(plan)
    assert stage_keys(deaf)["/result"] != stage_keys(plan)["/result"]


def test_arms_share_the_stages_before_their_change_and_none_after():
    control, treated = stage_keys(toy.plan()), stage_keys(apply(toy.plan(), [toy.Scale(2.0, stage="tune")]))
    assert control["pretrain"] == treated["pretrain"]
    assert control["tune"] != treated["tune"]
    early = stage_keys(apply(toy.plan(), [toy.Scale(2.0, stage="pretrain")]))
    assert early["pretrain"] != control["pretrain"]
    assert early["tune"] != control["tune"]


def test_a_stage_that_begins_elsewhere_or_reads_more_has_another_key():
    plan = toy.rich()
    changed = plan.edit("second", lambda s: dataclasses.replace(s, start="first@11"))
    read = plan.edit("second", lambda s: dataclasses.replace(s, reads=("first@3", "init")))
    assert len({key(p, "second") for p in (plan, changed, read)}) == 3
    assert key(changed, "first") == key(plan, "first")


@pytest.mark.parametrize("change", ["versions", "machine"])
def test_another_version_or_machine_type_has_another_key(monkeypatch, change):
    before = key(toy.one_stage())
    other = {**getattr(keys, change)(), next(iter(getattr(keys, change)())): "another"}
    monkeypatch.setattr(run, change, lambda: other)
    assert key(toy.one_stage()) != before


# ---- sources ---------------------------------------------------------------------------------------------------------

MODULES = {
    "slots.py": "import helper\ndef loss(m, b, c):\n    return helper.f(b)\n",
    "helper.py": "import deep\ndef f(b):\n    import lazy\n    return deep.g(lazy.h(b))\n",
    "deep.py": "def g(b):\n    return b\n",
    "lazy.py": "def h(b):\n    return b\n",
    "unrelated.py": "x = 1\n",
}


def source_key(folder):
    code = "import slots; from perturbed.core.keys import describe, digest; print(digest(describe(slots.loss)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or pytest.fail(done.stderr)


@pytest.mark.slow
def test_the_source_counts_with_all_that_it_imports_from_beside_it(tmp_path):
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    before = source_key(tmp_path)
    (tmp_path / "unrelated.py").write_text("x = 2\n")
    assert source_key(tmp_path) == before
    seen = {before}
    for name in ("slots.py", "helper.py", "deep.py", "lazy.py"):
        (tmp_path / name).write_text(MODULES[name] + "# changed\n")
        seen.add(source_key(tmp_path))
    assert len(seen) == 5


def test_a_function_typed_in_at_a_prompt_has_no_source_and_so_no_key():
    code = (
        "from perturbed.core.keys import describe, Unkeyed\n"
        "def f(): return 1\n"
        "try: print(describe(f))\nexcept Unkeyed as e: print('unkeyed:', e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("unkeyed: __main__.f"), done.stdout + done.stderr
    module = types.ModuleType("made_up")
    exec("def f(): return 1\nclass C: pass", module.__dict__)
    for thing in (module.f, module.C):
        with pytest.raises(Unkeyed, match="made_up"):
            describe(thing)


def test_a_project_below_the_prefix_of_the_interpreter_counts(tmp_path, monkeypatch):
    """Debian's Python has the prefix /usr, and images put projects into /usr/src/app."""
    (tmp_path / "prefixed.py").write_text("def f(): return 1\n")
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    import prefixed

    first = describe(prefixed.f)
    keys.source_hash.cache_clear()
    (tmp_path / "prefixed.py").write_text("def f(): return 2\n")
    assert describe(prefixed.f) != first
    keys.source_hash.cache_clear()


# ---- values ----------------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Box:
    value: object = None
    more: dict = field(default_factory=dict)

    def method(self):
        return self.value


class Printed:
    def __init__(self, text):
        self.text = text

    def fingerprint(self):
        return self.text


class Plain:
    pass


def linear(value):
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(value), model.bias.fill_(0)
    return model


UNLIKE = [
    None, True, 1, 1.0, "1", 0.1, 0.1 + 1e-17 + 2e-17, -0.0, 0.0, float("inf"), "", [1], [[1]], [1, 2], [2, 1], {1, 2},
    {"a": 1}, {"a": 2}, {1: 1}, {"1": 1}, Box(1), Box(2), Box(1.0), Box(Box(1)), Box(1).method, Box(2).method,
    Colour.RED, Colour.BLUE, functools.partial(linear, 1), functools.partial(linear, 2),
    functools.partial(linear, value=1),
    torch.float32, torch.float64, torch.device("cpu"), Path("a"), Path("b"), Printed("a"), Printed("b"), linear(1),
    linear(2),
    torch.tensor([1.0]), torch.tensor([[1.0]]), torch.tensor([1], dtype=torch.int32), torch.tensor(1.0), torch.empty(0),
    torch.tensor([1.0]).bfloat16(), linear, torch.relu, torch.nn.Linear,
]  # fmt: skip


def test_unlike_values_are_described_unlike_and_equal_ones_alike():
    described = [digest(describe(v)) for v in UNLIKE]
    doubles = {(i, j) for i, a in enumerate(described) for j, b in enumerate(described) if i < j and a == b}
    assert {(UNLIKE[i], UNLIKE[j]) for i, j in doubles} <= {(0.1, 0.1 + 1e-17 + 2e-17)}
    assert described == [digest(describe(v)) for v in UNLIKE]
    assert describe(Box(1, {"a": 1, "b": 2})) == describe(Box(1, {"b": 2, "a": 1}))
    assert describe({"x", "y", "z"}) == describe({"z", "y", "x"})


@pytest.mark.parametrize("thing", [lambda: 0, Plain(), Plain().__init__, Box(Plain()), object()])
def test_what_cannot_be_told_is_not_keyed(thing):
    with pytest.raises(Unkeyed):
        describe(thing)


def test_a_closure_runs_and_one_line_says_that_nothing_is_shared(tmp_path, capsys):
    run._say_once.cache_clear()
    factor = 2.0
    plan = toy.plan().add_inputs("tune", lambda batch, ctx: {**batch, "x": factor * batch["x"]})
    store = Store(tmp_path)
    results = [Engine(plan, seed, store).run() for seed in (0, 0)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("perturbed: note: no checkpoint is shared or resumed where ")
    assert "<lambda> is a closure" in lines[0]
    named = Engine(apply(toy.plan(), [toy.Scale(2.0, stage="tune")]), 0, Store(None)).run()
    assert results[0].weights == results[1].weights == named.weights
    assert [e.key for e in store.entries()] == [key(plan, "pretrain")]  # what lies before the closure is shared


@dataclass(frozen=True)
class Counter:
    """A slot that changes itself in place: its key cannot tell."""

    seen: list = field(default_factory=list)

    def __call__(self, batch, ctx):
        self.seen.append(len(self.seen))
        return batch


def test_a_slot_changed_in_place_gets_another_key_the_next_time():
    counter = Counter()
    plan = toy.one_stage(inputs=counter)
    before = key(plan)
    Engine(plan, 0, Store(None)).run()
    assert counter.seen
    assert key(plan) != before  # so the contract's rerun sees a difference, and nothing false is shared
