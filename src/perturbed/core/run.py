"""Carrying out one plan with one seed: stages, checkpoints, resume, measures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Module

from perturbed.core.context import Ctx, FeatureHooks, Past, ScopedLoss
from perturbed.core.keys import Unkeyed, describe, digest, machine, source_hash, tensors_hash, versions
from perturbed.core.meter import Cost, Meter
from perturbed.core.optimiser import Optim
from perturbed.core.plan import Batch, Measure, Plan, Stage, same_batch
from perturbed.core.store import Store, Tree, flatten, to_device
from perturbed.core.streams import Streams
from perturbed.errors import Interrupted, PlanError

CURVE_POINTS = 200
_RESULT = "/result"
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Progress:
    """Where a run is: ``step`` of ``steps`` of ``stage``; ``of_steps`` counts the whole plan."""

    stage: str
    step: int
    done: int
    of_steps: int


@dataclass(frozen=True)
class Run:
    """What a measure reads: the trained model, its prediction with the plan's features held, and what went before."""

    model: Module
    predict: Callable[[Batch], Tensor]
    past: Mapping[str, Module]
    artifacts: dict[str, Any]
    ctx: Ctx


@dataclass
class Result:
    """What came out of one run.

    Attributes:
        scores: named numbers; None where not finite, empty if the run diverged.
        curves: per metric (step counted over the plan, value); ``loss`` is the training loss.
        cost: of every stage the run used, whoever trained it.
        weights: hash of the final weights.
        diverged: stage and step at which the loss stopped being finite, or None.
        artifacts: what the run crafted, by name: itself if it is short JSON, else its hash.
    """

    scores: dict[str, float | None]
    curves: dict[str, Curve]
    cost: Cost
    weights: str
    diverged: str | None = None
    artifacts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The inverse of ``to_json``."""
        return cls(**{**data, "cost": Cost(**data["cost"])})


class Diverged(Exception):
    """The training loss stopped being finite."""


@functools.cache
def accelerator() -> Any:
    """Accelerate's handle on device, precision and processes, as ``accelerate launch`` or the machine sets them."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    # micro-batches are split and weighted here, so accelerate must not divide the loss again
    made = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
    if made.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise PlanError(f"{made.distributed_type} is not supported: checkpoints hold whole models; launch with DDP")
    return made


def release() -> None:
    """Let accelerate drop its models (its ``free_memory`` also collects garbage, 0.1 s that only GPUs need)."""
    handle = accelerator()
    if handle.device.type != "cpu":
        handle.free_memory()
    handle._models.clear()
    handle._optimizers.clear()


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Torch at ``number`` threads inside: the same number everywhere gives the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stopping:
    """Ctrl-C and SIGTERM wait for the end of the step, so that a whole checkpoint is left; a second one does not."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@dataclass
class Engine:
    """One plan with one seed on one store.

    Args:
        plan: the run.
        seed: training seed.
        store: checkpoints; equal stages of other plans and earlier processes are found there.
        checkpoint_s: seconds of training that a kill can cost at most.
        report: called a few times a second with the progress.
        keys: content keys worked out elsewhere (``all_keys``), where the slots' sources could be read.
    """

    plan: Plan
    seed: int
    store: Store
    checkpoint_s: float = 20.0
    report: Callable[[Progress], None] | None = None
    keys: dict[str, str] = field(default_factory=dict)
    _memory: Store = field(default_factory=lambda: Store(None))
    _stopping: Stopping = field(default_factory=Stopping)

    def run(self) -> Result:
        """Train what is missing, measure, and give the scores (kept too, so a second call costs nothing).

        Raises:
            Interrupted: stopped by Ctrl-C; a checkpoint was written.
            StoreError: the store cannot be read or written.
        """
        kept = self.kept()
        accelerator().wait_for_everyone()  # nobody writes before all have read: they must take the same turn
        if kept is not None:
            return kept
        with self._stopping:
            result = self._run()
        self._put(self.all_keys()[_RESULT], result.to_json())
        return result

    def kept(self) -> Result | None:
        """The result of an earlier run of the same content, or None."""
        tree = self._get(self.all_keys()[_RESULT])
        return None if tree is None else Result.from_json(tree)

    def _run(self) -> Result:
        cost, curves, scores, done = Cost(), dict[str, Curve](), dict[str, float | None](), 0
        try:
            for stage in self.plan.stages:
                tree = self.snapshot(stage.name, diverged=True)
                cost += Cost(**tree["cost"])
                for name, curve in tree["curves"].items():
                    curves.setdefault(name, []).extend((done + step, value) for step, value in curve)
                done += stage.steps
                if "diverged" in tree:
                    raise Diverged(tree["diverged"])
                for name, value in self._measure(stage, "stage").items():
                    scores[f"{name}@{stage.name}"] = value
                    curves.setdefault(name, []).append((done, math.nan if value is None else value))
        except Diverged as e:
            return Result({}, curves, cost, "", diverged=str(e))
        began = time.process_time()
        scores |= self._measure(stage, "end")
        cost.measuring_cpu_s = time.process_time() - began
        told = {name: _summary(artifact) for name, artifact in tree["artifacts"].items()}
        return Result(scores, curves, cost, tensors_hash(tree["model"]), artifacts=told)

    def model_at(self, ref: str) -> Module:
        """A fresh copy of the model at a snapshot: ``init``, ``stage`` or ``stage@step``."""
        if ref == "init":
            ctx = self._ctx(None)
            with threads(self.plan.threads), ctx.streams.scope("build", shared=True):
                return self.plan.build(ctx)
        tree = self.snapshot(ref)
        with threads(self.plan.threads):
            model, _, _ = self._begin(self.plan.stage(ref.partition("@")[0]))
        model.load_state_dict(tree["model"])
        return model

    def snapshot(self, ref: str, diverged: bool = False) -> Tree:
        """The saved tree of ``stage`` or ``stage@step``, trained if it is not in the store.

        Raises:
            Diverged: its training did not stay finite, unless ``diverged`` asks for what was left of it.
        """
        key = self.key(ref)
        tree = self._get(key)
        if tree is None:
            stage = self.plan.stage(ref.partition("@")[0])
            with self._alone(self.key(stage.name)):
                tree = self._get(key)
                accelerator().wait_for_everyone()
                if tree is None:
                    with threads(self.plan.threads), torch.enable_grad():
                        self._train(stage)
                    tree = self._get(key)
        assert tree is not None
        if "diverged" in tree and not diverged:
            raise Diverged(tree["diverged"])
        return tree

    def key(self, ref: str) -> str:
        """Content key of a snapshot: equal keys train to equal bits on one type of machine."""
        if ref == "init":
            return "init"
        name, _, step = ref.partition("@")
        stage = self.plan.stage(name)
        if step and int(step) == stage.steps:
            step = ""
        if name not in self.keys:
            self.keys[name] = self._stage_key(stage)
        return self.keys[name] + (f"-at-{step}" if step else "")

    def all_keys(self) -> dict[str, str]:
        """The keys of every stage and of the result."""
        if _RESULT not in self.keys:
            stages = [self.key(s.name) for s in self.plan.stages]
            content = [stages, self.plan.predict, self.plan.features, self.plan.measures]
            self.keys[_RESULT] = self._digest(content, stages)
        return self.keys

    def interrupt(self) -> None:
        """Ask the run to checkpoint and end after the step in hand."""
        self._stopping.asked = True

    @property
    def stopping(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._stopping.asked

    def stop(self, where: str) -> NoReturn:
        """End the run early; what was done is kept."""
        raise Interrupted(f"stopped {where}; the same command goes on from there")

    def _stage_key(self, stage: Stage) -> str:
        parents = [self.key(ref) for ref in (self.plan.previous(stage), *stage.reads)]
        stage = dataclasses.replace(stage, start=None)  # told by its parent's key, however it is spelled
        during = [m for m in self.plan.measures if isinstance(m.when, int) and m.of(stage.name)]
        watched = [during, self.plan.predict, self.plan.features] if during else []
        return self._digest([parents, self.plan.build, self.plan.facts, stage, watched], parents)

    def _digest(self, content: list[Any], parents: list[str]) -> str:
        if any(p.startswith("unkeyed") for p in parents):
            return f"unkeyed-{uuid.uuid4().hex}"
        try:
            what = describe(content)
        except Unkeyed as e:
            _say_once(f"perturbed: note: no checkpoint is shared or resumed where {e}")
            return f"unkeyed-{uuid.uuid4().hex}"
        where = [self.seed, settings(), self.plan.threads, versions(), machine(), source_hash(__name__)]
        return digest([what, where])

    def _get(self, key: str) -> Tree | None:
        return self._memory.get(key) if key.startswith("unkeyed") else self.store.get(key)

    def _put(self, key: str, tree: Tree) -> None:
        if key.startswith("unkeyed"):
            self._memory.put(key, tree)
        elif accelerator().is_main_process or self.store.root is None:
            self.store.put(key, tree)
        accelerator().wait_for_everyone()

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        main = accelerator().is_main_process and not key.startswith("unkeyed")
        with self.store.lock(key) if main else contextlib.nullcontext():
            accelerator().wait_for_everyone()
            yield

    def _ctx(self, stage: Stage | None, steps: int = 0) -> Ctx:
        handle = accelerator()
        streams = Streams(self.seed, handle.process_index, handle.device)
        streams.tick(stage.name if stage else "", 0)
        facts = (stage.facts if stage else None) or self.plan.facts
        return Ctx(streams, handle, facts, stage.name if stage else "", steps, _accumulate())

    def _begin(self, stage: Stage) -> tuple[Module, Ctx, Tree | None]:
        """The model as the stage finds it, with its weights slot applied."""
        ref, ctx, parent = self.plan.previous(stage), self._ctx(stage, stage.steps), None
        for read in stage.reads:  # now, not when a slot asks for it in the midst of something else
            if read != "init":
                self.snapshot(read)
        ctx.past = Past(stage.reads, self._past, f"stage {stage.name!r}")
        if ref != "init":
            parent = self.snapshot(ref)
            ctx.restore(parent)
        if stage.build is not None:
            with ctx.streams.scope("build", shared=True):
                model = stage.build(ctx)
        else:
            model = self.model_at(ref)
        ctx.model = model
        with ctx.streams.scope("weights", shared=True):
            model = stage.weights(model, ctx)
        ctx.model = model
        return model, ctx, parent

    def _past(self, ref: str) -> Module:
        return self.model_at(ref).to(accelerator().device)

    def _train(self, stage: Stage) -> None:
        model, ctx, parent = self._begin(stage)
        trainer = _Training(self, stage, model, ctx, parent)
        try:
            trainer.train()
        except Diverged as e:
            refs = [stage.name, *(f"{stage.name}@{step}" for step in stage.snapshots)]
            missing = [key for key in map(self.key, refs) if self._get(key) is None]
            accelerator().wait_for_everyone()
            for key in missing:
                self._put(key, {"diverged": str(e), **trainer.spent()})
        finally:
            release()
        self._drop(f"{self.key(stage.name)}-partial")

    def _drop(self, key: str) -> None:
        (self._memory if key.startswith("unkeyed") else self.store).drop(key)

    def _measure(self, stage: Stage, when: str) -> dict[str, float | None]:
        measures = [m for m in self.plan.measures if m.when == when and (when == "end" or m.of(stage.name))]
        if not measures:
            return {}
        with self.finished(stage.name, whole=when == "end") as run:
            return self.evaluate(run, measures)

    @contextlib.contextmanager
    def finished(self, ref: str, whole: bool = True) -> Iterator[Run]:
        """The run as it stands at a snapshot, in eval mode with the plan's features held, ready to be asked.

        ``ctx.past`` holds what was there by then; the facts are the plan's if this is the ``whole`` run, else the
        stage's. Draws do not depend on which stage it is.
        """
        name = ref.partition("@")[0]
        upto = self.plan.stages.index(self.plan.stage(name)) + 1
        before = [s.name for s in self.plan.stages[:upto]]
        steps = [f"{s.name}@{k}" for s in self.plan.stages[:upto] for k in s.snapshots]
        tree, model, ctx = self.snapshot(ref), self.model_at(ref), self._ctx(None)
        ctx.restore(tree)
        ctx.facts = self.plan.facts if whole else self.plan.stage(name).facts or self.plan.facts
        ctx.past = Past(("init", *before, *steps), self._past, "a measure")
        try:
            with threads(self.plan.threads):
                prepared = accelerator().prepare_model(model, evaluation_mode=True)
                with self._asked(prepared, ctx) as run:
                    yield run
        finally:
            release()

    @contextlib.contextmanager
    def _asked(self, model: Module, ctx: Ctx) -> Iterator[Run]:
        ctx.model = model.eval()

        def predict(batch: Batch) -> Tensor:
            ctx.batch = to_device(batch, ctx.device)
            return self.plan.predict(model, ctx.batch, ctx)

        with FeatureHooks(ctx.bare, self.plan.features, ctx):
            yield Run(model, predict, ctx.past, ctx.artifacts, ctx)

    def evaluate(self, run: Run, measures: list[Measure]) -> dict[str, float | None]:
        """Scores of ``measures``; None where a number is not finite."""
        scores: dict[str, float | None] = {}
        for measure in measures:
            if self.stopping and not run.ctx.stage:  # within a stage its loop stops, and leaves a checkpoint
                self.stop(f"before measure {measure.name!r}")
            with run.ctx.streams.scope(f"measure {measure.name}", shared=True):
                found = measure.fn(run)
            twice = sorted(found.keys() & scores.keys())
            if twice:
                raise PlanError(f"two measures give {twice[0]!r}, one of them {measure.name!r}: rename one")
            scores |= {k: float(v) if math.isfinite(v) else None for k, v in found.items()}
        return scores


class _Training:
    """The loop of one stage."""

    def __init__(self, engine: Engine, stage: Stage, model: Module, ctx: Ctx, parent: Tree | None):
        self.engine, self.stage, self.ctx, self.bare = engine, stage, ctx, model
        self.partial = f"{engine.key(stage.name)}-partial"
        self.meter, self.loss, self.alone = Meter(), ScopedLoss(stage.loss), ctx.world == 1
        self.curves: dict[str, Curve] = {"loss": []}
        self.model = accelerator().prepare_model(model.to(ctx.device))
        ctx.model, ctx.loss = self.model, self.loss
        ctx.optim = parent["optim"] if parent else None
        self.first = 0
        if stage.steps:
            with ctx.streams.scope("optim", shared=True):
                made: Any = stage.optim(self.model, ctx)
            if not isinstance(made, Optim):
                what = type(made).__name__
                raise PlanError(f"stage {stage.name!r}: optim gives a {what}; wrap it, as in pt.Optim(torch_optimiser)")
            self.optim = made
            self.optim.prepare(accelerator())
            ctx.optim = self.optim
            with ctx.streams.scope("data"):
                self.stream = stage.data(ctx)
            self.first = self._resume()

    def train(self) -> None:
        stage, engine = self.stage, self.engine
        saved = reported = time.monotonic()
        before = sum(s.steps for s in engine.plan.stages[: engine.plan.stages.index(stage)])
        total = sum(s.steps for s in engine.plan.stages)
        self.model.train()
        with FeatureHooks(self.bare, stage.features, self.ctx) as hooks:
            for step in range(self.first, stage.steps):
                if step in stage.snapshots:
                    self._save(f"{stage.name}@{step}")
                if self._any(engine.stopping):
                    self.checkpoint(step)
                    engine.stop(f"in stage {stage.name!r} at step {step}")
                self._step(step)
                self._watch(step + 1, hooks)
                now = time.monotonic()
                if engine.report and now - reported > 0.2:
                    reported = now
                    engine.report(Progress(stage.name, step + 1, before + step + 1, total))
                if self._any(now - saved > engine.checkpoint_s):
                    self.checkpoint(step + 1)
                    saved = time.monotonic()
        self._save(stage.name)

    def _step(self, step: int) -> None:
        stage, ctx = self.stage, self.ctx
        ctx.step = step
        ctx.streams.tick(stage.name, step)
        self.optim.at(step, stage.steps)
        with ctx.streams.scope("data"):
            batch = to_device(next(self.stream), ctx.device)
        ctx.batch = batch
        with self.meter.step(batch):
            if stage.inputs is not same_batch:  # a scope costs 10 µs
                with ctx.streams.scope("inputs"):
                    batch = ctx.batch = stage.inputs(batch, ctx)
            with ctx.streams.scope("update"):
                value = float(stage.update(self.model, batch, self.loss, self.optim, ctx))
        if self._any(not math.isfinite(value)):
            raise Diverged(f"the loss was {value} in stage {stage.name!r} at step {step}")
        if step % max(1, stage.steps // CURVE_POINTS) == 0 or step == stage.steps - 1:
            self.curves["loss"].append((step, value))

    def _watch(self, step: int, hooks: FeatureHooks) -> None:
        watched = [m for m in self.engine.plan.measures if isinstance(m.when, int) and m.of(self.stage.name)]
        due = [m for m in watched if step % m.when == 0]  # type: ignore[operator]
        if due:
            with self.meter.aside(), hooks.paused(), self.engine._asked(self.model, self.ctx) as run:
                for name, value in self.engine.evaluate(run, due).items():
                    name = name if name != "loss" else "measured loss"  # "loss" is that of training
                    self.curves.setdefault(name, []).append((step, math.nan if value is None else value))
            self.model.train()

    def _any(self, flag: bool) -> bool:
        """Whether ``flag`` holds in any process, so that all of them take the same turn."""
        if self.alone:
            return flag
        return bool(accelerator().reduce(torch.tensor(float(flag), device=self.ctx.device)) > 0)

    def spent(self) -> Tree:
        """Learning curves and cost so far."""
        self.meter.cost.grad_passes = self.ctx.grad_passes
        return {"curves": self.curves, "cost": dataclasses.asdict(self.meter.read(self.bare))}

    def _tree(self) -> Tree:
        return {
            "model": dict(accelerator().get_state_dict(self.model)),
            "optim": self.optim.state_dict() if self.stage.steps else None,
            **self.ctx.saved(),
            **self.spent(),
        }

    def _save(self, ref: str) -> None:
        self.engine._put(self.engine.key(ref), self._tree())

    def checkpoint(self, step: int) -> None:
        """Write what is needed to go on from ``step``."""
        extra = {"step": step, "stream": self.stream.state_dict(), "meter": self.meter.state_dict(self.bare)}
        self.engine._put(self.partial, {**self._tree(), **extra})

    def _resume(self) -> int:
        tree, engine, name = self.engine._get(self.partial), self.engine, self.stage.name
        if tree is None:
            return 0
        passed = [engine.key(f"{name}@{step}") for step in self.stage.snapshots if step < tree["step"]]
        if any(engine._get(key) is None for key in passed):
            return 0  # a snapshot on the way was lost: only the whole way makes it again
        self.bare.load_state_dict(tree["model"])
        self.optim.load_state_dict(tree["optim"])
        self.ctx.restore(tree)
        self.stream.load_state_dict(tree["stream"])
        self.meter.load_state_dict(tree["meter"])
        self.ctx.grad_passes, self.curves = tree["cost"]["grad_passes"], tree["curves"]
        return int(tree["step"])


def _summary(artifact: Tree, longest: int = 500) -> Any:
    tensors, skeleton = flatten(artifact)
    if not tensors and len(json.dumps(skeleton)) <= longest:
        return artifact
    return {"sha256": digest([skeleton, tensors_hash(tensors)])}


def settings() -> dict[str, Any]:
    """Device, precision, processes and accumulation of this process's runs."""
    handle = accelerator()
    return {
        "device": str(handle.device.type), "precision": str(handle.mixed_precision),
        "processes": int(handle.num_processes), "accumulate": _accumulate(),
    }  # fmt: skip


def _accumulate() -> int:
    return int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)
