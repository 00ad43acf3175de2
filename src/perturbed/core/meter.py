"""What a run costs: seconds, operations, tokens, gradient passes, memory, parameters."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from perturbed.core.plan import Batch


@dataclass
class Cost:
    """Cost of a stage, or of the stages that an arm uses.

    ``grad_passes`` counts differentiable loss evaluations on a batch; ``flops`` those of training steps.
    ``measuring_cpu_s`` is what prediction and measures took: there a change at inference shows.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    flops: int = 0
    tokens: int = 0
    examples: int = 0
    grad_passes: int = 0
    peak_bytes: int = 0
    params_trained: int = 0
    params_stored: int = 0
    measuring_cpu_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Costs of both; memory and parameters are the larger of the two."""
        largest = {"peak_bytes", "params_trained", "params_stored"}
        fields = dataclasses.asdict(self)
        for name, value in dataclasses.asdict(other).items():
            fields[name] = max(fields[name], value) if name in largest else fields[name] + value
        return Cost(**fields)


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


# torch has no formula for the attention kernels that run on a CPU
_FORMULAS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up operations by torch's formulas; its own ``FlopCounterMode`` breaks ``autograd.grad`` on an input."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in _FORMULAS:
            self.flops += _FORMULAS[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


class Meter:
    """Adds up a stage's cost while it trains; its state is saved with each checkpoint."""

    def __init__(self) -> None:
        self.cost = Cost()
        self._flops: dict[str, int] = {}
        self._shapes: list[torch.Size] = []
        self._last = self._steps = 0
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        _reset_peak()

    @contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """Count one training step on ``batch``: the first of each shape under torch's counter, and now and then anew.

        What a step does may follow a schedule (a radius that grows from 0), so steps 8, 64, 512, … begin again.
        """
        self._steps += 1
        if self._steps.bit_count() == 1 and self._steps.bit_length() % 3 == 1:
            self._flops, self._shapes = {}, []
        shapes = [v.shape for v in batch.values()]
        if shapes == self._shapes:
            yield
        else:
            yield from self._count(str([(k, *v.shape) for k, v in batch.items()]))
            self._shapes = shapes
        self.cost.flops += self._last
        self.cost.examples += len(next(iter(batch.values())))
        if "attention_mask" in batch and batch["attention_mask"].dim() == 2:
            self.cost.tokens += int(batch["attention_mask"].sum())
        elif "input_ids" in batch:
            self.cost.tokens += batch["input_ids"].numel()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside costs nothing."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self._wall += time.perf_counter() - wall
        self._cpu += time.process_time() - cpu

    def _count(self, shape: str) -> Iterator[None]:
        if shape in self._flops:
            yield
        else:
            with _Counter() as counter:  # type: ignore[no-untyped-call]
                yield
            self._flops[shape] = counter.flops
        self._last = self._flops[shape]

    def read(self, model: Module) -> Cost:
        """The cost so far."""
        self.cost.wall_s += time.perf_counter() - self._wall
        self.cost.cpu_s += time.process_time() - self._cpu
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self.cost.peak_bytes = max(self.cost.peak_bytes, _peak())
        parameters = list(model.parameters())
        self.cost.params_trained = sum(p.numel() for p in parameters if p.requires_grad)
        self.cost.params_stored = sum(p.numel() for p in parameters)
        return self.cost

    def state_dict(self, model: Module) -> dict[str, Any]:
        """Cost so far, the shapes that were counted, and the number of steps."""
        return {"cost": dataclasses.asdict(self.read(model)), "flops": dict(self._flops), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.cost, self._flops, self._steps = Cost(**state["cost"]), dict(state["flops"]), state["steps"]


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not permitted: the peak is then the process's since its start


def _peak() -> int:
    """Largest memory in use since the last reset: the accelerator's, else this process's."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 0
