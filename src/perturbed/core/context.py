"""What every slot is given: random streams, clock, model, optimiser, past snapshots, state, artifacts."""

from __future__ import annotations

import copy
import fnmatch
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from perturbed.core.optimiser import Optim, plain
from perturbed.core.plan import Batch, Facts, Feature, LossFn, no_loss
from perturbed.core.streams import Every, Streams
from perturbed.errors import PlanError, nearest


class Net:
    """An auxiliary network with its optimiser; seeded by its name and saved in every checkpoint."""

    def __init__(self, module: Module, optim: Optim):
        self.module, self.optim = module, optim

    def step(self, loss: Tensor, ctx: Ctx) -> None:
        """One update of the network on ``loss``; no other gradient is touched."""
        self.optim.zero_grad()
        ctx.backward(loss, inputs=list(self.module.parameters()))
        self.optim.at(ctx.step, ctx.steps)
        self.optim.step()
        self.optim.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser state."""
        return {"module": dict(self.module.state_dict()), "optim": self.optim.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.module.load_state_dict(state["module"])
        self.optim.load_state_dict(state["optim"])


class Past(Mapping[str, Module]):
    """Frozen models of earlier snapshots: ``past["stage"]``, ``past["stage@step"]``, ``past["init"]``."""

    def __init__(self, allowed: tuple[str, ...], load: Callable[[str], Module], owner: str):
        self._allowed, self._load, self._owner = allowed, load, owner
        self._models: dict[str, Module] = {}

    def __getitem__(self, ref: str) -> Module:
        if ref not in self._allowed:
            known = nearest(ref, self._allowed)
            raise PlanError(f"{self._owner} takes past[{ref!r}] without declaring it in reads: {known}")
        if ref not in self._models:
            model = self._load(ref)
            self._models[ref] = model.eval().requires_grad_(False)
        return self._models[ref]

    def __iter__(self) -> Iterator[str]:
        return iter(self._allowed)

    def __len__(self) -> int:
        return len(self._allowed)


class Ctx:
    """What a slot may use.

    Attributes:
        seed: the training seed, which pairs the arms of a study.
        stage: name of the stage, empty while the run is measured at its end.
        step: update of the stage, counted from 0.
        steps: length of the stage.
        batch: the batch in hand (masks and labels, for features).
        model: the live model.
        optim: the live optimiser; while the ``optim`` slot runs, the optimiser state of the snapshot begun from.
        loss: the stage's loss, as attacks need it: dropout and feature noise are the same at each call in a step.
        facts: the stage's facts.
        past: frozen models of snapshots declared in ``reads``.
        state: scratch that lives for the run and is saved in every snapshot (tensors and JSON only).
        artifacts: crafted things, such as a universal perturbation; saved likewise.
        accelerator: accelerate's, for devices, precision and processes.
        device: where the model lives.
    """

    def __init__(
        self, streams: Streams, accelerator: Any, facts: Facts, stage: str = "", steps: int = 0, accumulate: int = 1
    ):
        self.streams, self.accelerator, self.facts = streams, accelerator, facts
        self.seed, self.stage, self.steps, self.accumulate = streams.seed, stage, steps, accumulate
        self.step = 0
        self.batch: Batch = {}
        self.model: Module = torch.nn.Identity()
        self.optim: Any = None
        self.loss: LossFn = no_loss
        self.past: Mapping[str, Module] = {}
        self.state: dict[str, Any] = {}
        self.artifacts: dict[str, Any] = {}
        self.nets: dict[str, Net] = {}
        self.grad_passes = 0
        self._net_states: dict[str, Any] = {}
        # read once: accelerate looks each of these up through several properties, at microseconds a step
        self.device, self._plain = torch.device(accelerator.device), plain(accelerator)

    @property
    def bare(self) -> Module:
        """The live model without the wrappers of data parallelism."""
        return self.accelerator.unwrap_model(self.model)  # type: ignore[no-any-return]

    @property
    def rank(self) -> int:
        """This process among ``world`` data-parallel ones."""
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        """Number of data-parallel processes."""
        return int(self.accelerator.num_processes)

    def rng(self, name: str, every: Every = "step") -> torch.Generator:
        """The CPU generator called ``name``.

        Args:
            name: what is drawn; what can occur twice in a plan puts its glob or stage in the name.
            every: new draws each ``step``, or the same ones again at each step of a ``stage`` or of the ``run``.
        """
        return self.streams.rng(name, every)

    def once(self, name: str, every: Every = "stage") -> torch.Generator:
        """A fresh generator that the clock does not touch, for draws that carry their own counter in ``name``."""
        return self.streams.once(name, every)

    def seeded(self, name: str) -> AbstractContextManager[None]:
        """Inside, torch's default generator is seeded for ``name``: for building modules that an intervention adds."""
        return self.streams.scope(name, shared=True)

    def backward(self, value: Tensor, inputs: list[Tensor] | None = None) -> None:
        """Back-propagate (through accelerate, where it scales the loss), only into ``inputs`` if given."""
        if self._plain:
            value.backward(inputs=inputs)  # type: ignore[no-untyped-call]
        else:
            self.accelerator.backward(value, inputs=inputs)

    def micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """The batch in ``accumulate`` parts, each with its share of the examples."""
        size = len(next(iter(batch.values()))) if self.accumulate > 1 else 0
        parts = min(self.accumulate, size)
        if parts <= 1:
            yield batch, 1
            return
        edges = [round(i * size / parts) for i in range(parts + 1)]
        for micro, (low, high) in enumerate(itertools.pairwise(edges)):
            last = micro == parts - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                self.loss.micro = micro  # type: ignore[attr-defined]
                yield {k: v[low:high] for k, v in batch.items()}, (high - low) / size
        self.loss.micro = 0  # type: ignore[attr-defined]

    def net(self, name: str, build: Callable[[], Module], optim: Callable[[Module], Optim]) -> Net:
        """The auxiliary network called ``name``, made at first use with an initialisation stream of its own."""
        if name not in self.nets:
            with self.streams.scope(f"net {name}", shared=True):
                module = self.accelerator.prepare_model(build())
                net = Net(module, optim(module))
                net.optim.prepare(self.accelerator)
            if name in self._net_states:
                net.load_state_dict(self._net_states[name])
            self.nets[name] = net
        return self.nets[name]

    def saved(self) -> dict[str, Any]:
        """State, artifacts and auxiliary networks, for a checkpoint."""
        nets = {**self._net_states, **{name: net.state_dict() for name, net in self.nets.items()}}
        return {"state": self.state, "artifacts": self.artifacts, "nets": nets}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take what ``saved`` gave (copied, so the snapshot stays as it is)."""
        saved = copy.deepcopy({k: saved[k] for k in ("state", "artifacts", "nets")})
        self.state, self.artifacts, self._net_states = saved["state"], saved["artifacts"], saved["nets"]
        for name in self.nets.keys() & self._net_states:  # made by a slot at the start of the stage
            self.nets[name].load_state_dict(self._net_states[name])


class ScopedLoss:
    """A stage's loss whose every call within a step sees the same dropout and the same feature noise."""

    def __init__(self, loss: LossFn):
        self.inner, self.micro = loss, 0

    def __call__(self, model: Module, batch: Batch, ctx: Ctx) -> Tensor:
        """The loss of ``model`` on ``batch``; counted as a gradient pass where gradients are on."""
        ctx.batch = batch
        ctx.grad_passes += torch.is_grad_enabled()
        with ctx.streams.scope("loss", self.micro):
            return self.inner(model, batch, ctx)


class FeatureHooks:
    """Feature functions held on a model; leaving the block removes every trace."""

    def __init__(self, model: Module, features: tuple[Feature, ...], ctx: Ctx):
        self.model, self.features, self.ctx, self.active = model, features, ctx, True
        self._handles: list[Any] = []

    def __enter__(self) -> FeatureHooks:
        for feature in self.features:
            self._handles += [m.register_forward_hook(self._hook(feature)) for m in self._modules(feature)]
        return self

    def _modules(self, feature: Feature) -> list[Module]:
        if not isinstance(feature.where, str):
            return [feature.where(self.model)]
        names = dict(self.model.named_modules())
        hit = [m for name, m in names.items() if fnmatch.fnmatchcase(name, feature.where)]
        if not hit:
            raise PlanError(f"feature glob {feature.where!r} matches no module: {nearest(feature.where, names)}")
        return hit

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The functions stand aside inside (while the run is measured in the midst of training)."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def _hook(self, feature: Feature) -> Callable[[Module, Any, Any], Any]:
        def act(module: Module, args: Any, output: Any) -> Any:
            return _on_first(output, lambda h: feature.fn(h, self.ctx)) if self.active else None

        return act


def _on_first(output: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """``output`` with its first tensor (of a tensor, tuple or mapping) replaced by ``fn`` of it."""
    if isinstance(output, Tensor):
        return fn(output)
    if isinstance(output, Mapping):
        name = next(k for k, v in output.items() if isinstance(v, Tensor))
        changed = copy.copy(output)
        changed[name] = fn(output[name])  # type: ignore[index]
        return changed
    at = next(i for i, v in enumerate(output) if isinstance(v, Tensor))
    items = (*output[:at], fn(output[at]), *output[at + 1 :])
    return output._make(items) if hasattr(output, "_make") else type(output)(items)
