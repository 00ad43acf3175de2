"""What the engine costs beside a loop written by hand, and beside the Transformers Trainer.

Each pair runs in one process: short spells of both loops in turn, in alternating order, so that both see the same
machine; times are CPU seconds of the one thread; the figure is the median over pairs of the ratio of times a step.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from perturbed.core.context import Ctx, FeatureHooks
from perturbed.core.optimiser import Optim
from perturbed.core.plan import Batch, Facts, Plan, Stage
from perturbed.core.run import Engine, _Training, threads
from perturbed.core.store import Store

# one thread of one process: its own CPU time is its wall time on an idle machine, and others' load does not enter it
clock = time.process_time
RATIO, EXTRA_US = 1.03, 100.0  # the targets
LM_BATCH, LM_LENGTH, VOCABULARY = 16, 128, 1024


@dataclass(frozen=True)
class Ring:
    """Batches drawn beforehand, given round and round: neither loop is charged for making data."""

    batches: tuple[Batch, ...]

    def __call__(self, ctx: Ctx) -> RingStream:
        return RingStream(itertools.cycle(self.batches))

    def fingerprint(self) -> str:
        return "ring"


@dataclass
class RingStream:
    """An endless iterator over the ring."""

    batches: Iterator[Batch]

    def __next__(self) -> Batch:
        return next(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def llama(ctx: Ctx | None = None) -> nn.Module:
    """A 2-layer Llama-class language model of width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LM_LENGTH, use_cache=False, attn_implementation="sdpa",
    ))  # fmt: skip


def llama_loss(model: nn.Module, batch: Batch, ctx: Ctx | None) -> Tensor:
    loss: Tensor = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    return loss


def token_batches() -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (8, LM_BATCH, LM_LENGTH), generator=generator)
    return tuple({"input_ids": i, "labels": i} for i in ids)


def mlp(ctx: Ctx | None = None) -> nn.Module:
    """A small perceptron whose step takes about half a millisecond."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))


def mlp_loss(model: nn.Module, batch: Batch, ctx: Ctx | None) -> Tensor:
    return cross_entropy(model(batch["x"]), batch["labels"])


def point_batches() -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 64, generator=generator)
    return tuple({"x": rows, "labels": (rows.sum(1) > 0).long()} for rows in x)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)


def optim(model: nn.Module, ctx: Ctx) -> Optim:
    return Optim(adamw(model), clip=1.0)


def by_hand(model: nn.Module, loss: Callable[..., Tensor], batches: tuple[Batch, ...]) -> Callable[[int], None]:
    """The loop as anyone writes it: forward, backward, clip, step, and the loss read off."""
    optimizer, stream, curve = adamw(model), itertools.cycle(batches), []
    model.train()

    def steps(n: int) -> None:
        for _ in range(n):
            value = loss(model, next(stream), None)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(value.item())

    return steps


def by_engine(build: Callable[..., nn.Module], loss: Callable[..., Tensor], batches: tuple[Batch, ...]) -> Any:
    """The engine's own loop, entered again and again."""
    stage = Stage(name="train", steps=10**6, data=Ring(batches), loss=loss, optim=optim)
    facts = Facts(modality="bench", target="class")
    plan = Plan(build=build, stages=(stage,), predict=loss, measures=(), facts=facts)
    engine = Engine(plan, 0, Store(None), checkpoint_s=1e9, report=lambda progress: None)
    model, ctx, parent = engine._begin(stage)
    training = _Training(engine, stage, model, ctx, parent)
    training.model.train()
    hooks = FeatureHooks(training.bare, (), ctx)
    count = itertools.count()

    def steps(n: int) -> None:
        for step in itertools.islice(count, n):
            training._step(step)
            training._watch(step + 1, hooks)

    return steps


def paired(one: Callable[[int], None], two: Callable[[int], None], spell: int, pairs: int) -> dict[str, float]:
    """Median ratio (one over two) and difference of the times a step, in pairs of spells in alternating order."""
    one(spell), two(spell)
    ratios, extras, times = [], [], []
    for pair in range(pairs):
        taken = {}
        for steps in (one, two) if pair % 2 else (two, one):
            began = clock()
            steps(spell)
            taken[steps] = (clock() - began) / spell
        ratios.append(taken[one] / taken[two])
        extras.append((taken[one] - taken[two]) * 1e6)
        times.append(taken[two] * 1e3)
    return {
        "ratio": statistics.median(ratios), "extra_us": statistics.median(extras), "step_ms": statistics.median(times)
    }  # fmt: skip


def against_hand(kind: str) -> dict[str, float]:
    """The engine's loop over the loop by hand, on the language model (``lm``) or the perceptron (``mlp``)."""
    build, loss, batches = (llama, llama_loss, token_batches()) if kind == "lm" else (mlp, mlp_loss, point_batches())
    spell, pairs = (5, 20) if kind == "lm" else (100, 30)
    return paired(by_engine(build, loss, batches), by_hand(build(), loss, batches), spell, pairs)


def trainer_run(batches: tuple[Batch, ...], steps: int) -> float:
    """CPU seconds of ``steps`` steps of the Transformers Trainer on the same model, batches, optimiser and clipping."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = clock()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = clock() - self.began

    rows = [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(LM_BATCH)]
    model, watch = llama(), Clock()
    constant = torch.optim.lr_scheduler.LambdaLR
    optimizer = adamw(model)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=LM_BATCH, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=True, max_grad_norm=1.0, dataloader_num_workers=0,
        )  # fmt: skip
        scheduler = constant(optimizer, lambda step: 1.0)
        Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler), callbacks=[watch]).train()
    return float(watch.seconds)


def against_trainer(steps: int = 30, rounds: int = 5) -> dict[str, float]:
    """Engine over Trainer, and Trainer over the loop by hand, on the language model, in alternating order."""
    batches = token_batches()
    loops = {"engine": by_engine(llama, llama_loss, batches), "hand": by_hand(llama(), llama_loss, batches)}
    for steps_of in loops.values():
        steps_of(10)
    trainer_run(batches, 5)
    over, under = [], []
    for turn in range(rounds):
        taken: dict[str, float] = {}
        for name in ("engine", "hand", "trainer") if turn % 2 else ("trainer", "hand", "engine"):
            if name == "trainer":
                taken[name] = trainer_run(batches, steps)
            else:
                began = clock()
                loops[name](steps)
                taken[name] = clock() - began
        over.append(taken["engine"] / taken["trainer"])
        under.append(taken["trainer"] / taken["hand"])
    return {"engine_over_trainer": statistics.median(over), "trainer_over_hand": statistics.median(under)}


def main() -> dict[str, Any]:
    """Measure, print a table and tell whether the targets are met."""
    with threads(1):
        lm, small, trainer = against_hand("lm"), against_hand("mlp"), against_trainer()
    found = {"lm": lm, "mlp": small, "trainer": trainer, "targets": {"ratio": RATIO, "extra_us": EXTRA_US}}
    found["met"] = lm["ratio"] <= RATIO and small["extra_us"] <= EXTRA_US and trainer["engine_over_trainer"] <= 1
    rows = [
        ("language model: engine / by hand", f"{lm['ratio']:.3f}", f"≤ {RATIO}", f"{lm['step_ms']:.1f} ms a step"),
        ("perceptron: engine − by hand", f"{small['extra_us']:.0f} µs", f"≤ {EXTRA_US:.0f} µs",
         f"{small['step_ms']:.2f} ms a step"),
        ("language model: engine / Trainer", f"{trainer['engine_over_trainer']:.3f}", "≤ 1", ""),
        ("language model: Trainer / by hand", f"{trainer['trainer_over_hand']:.3f}", "", ""),
    ]  # fmt: skip
    for row in rows:
        print("{:36}{:>10}  {:>9}  {}".format(*row), file=sys.stderr)
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
