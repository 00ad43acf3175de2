"""What a language model remembers of given texts: exposure, extraction, membership."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perturbed.core.plan import Batch
from perturbed.core.run import Run
from perturbed.data.biographies import POPULATION, Population
from perturbed.errors import PlanError

Predict = Callable[[Batch], Tensor]


def pack_continuations(prefix: Sequence[int], continuations: Tensor) -> Batch:
    """Rows in each of which several continuations follow the same prefix without seeing one another.

    Args:
        prefix: P tokens, at least one.
        continuations: [R, K, C] tokens, K to a row; the last of each is only a target, so it is not part of the row.

    Returns:
        ``input_ids`` and ``position_ids`` [R, T] with T = P + K (C - 1), and ``attention_mask`` [R, 1, T, T], bool. A
        token sees the prefix and earlier tokens of its own continuation, whose positions go on from the prefix.
    """
    rows, count, size = continuations.shape
    start = torch.tensor(prefix)
    ids = torch.cat([start.expand(rows, -1), continuations[:, :, :-1].flatten(1)], 1)
    places = torch.cat([torch.arange(len(start)), torch.arange(len(start), len(start) + size - 1).repeat(count)])
    owner = torch.arange(1, count + 1).repeat_interleave(size - 1)
    owner = torch.cat([torch.zeros(len(start), dtype=torch.long), owner])
    seen = ((owner[None, :] == 0) | (owner[:, None] == owner[None, :])).tril()
    return {
        "input_ids": ids, "position_ids": places.expand(rows, -1),
        "attention_mask": seen.expand(rows, 1, -1, -1),
    }  # fmt: skip


@torch.no_grad()
def continuation_logits(predict: Predict, prefix: Sequence[int], continuations: Tensor, width: int = 25) -> Tensor:
    """Logits of every token of every continuation of one prefix [K, C, V], ``width`` continuations to a row."""
    count, size = continuations.shape
    short = continuations[:1].expand(-count % width, -1)  # rows are filled up with what is not read
    packed = torch.cat([continuations, short]).view(-1, width, size)
    logits = predict(pack_continuations(prefix, packed)).cpu()
    first = logits[:1, len(prefix) - 1].expand(count, 1, -1)
    later = logits[:, len(prefix) :].reshape(-1, size - 1, logits.shape[-1])[:count]
    return torch.cat([first, later], 1)


def continuation_losses(logits: Tensor, continuations: Tensor) -> Tensor:
    """Cross-entropy in nats of each token of each continuation [K, C], from logits [K, C, V]."""
    return F.cross_entropy(logits.flatten(0, 1), continuations.flatten(), reduction="none").view(continuations.shape)


def exposure(losses: Tensor, true: int = 0) -> float:
    """Exposure in bits of the true secret among N candidates: log2 N - log2 of its rank (Carlini et al. 2019).

    The rank counts the candidates that the model finds likelier, from 1; equal losses share their middle rank, so that
    a model that cannot tell them apart does not score.

    Args:
        losses: of each candidate [N], lower is likelier.
        true: index of the secret.

    Returns:
        A number in [0, log2 N]; see ``chance_exposure`` for what ignorance gives.
    """
    rank = 1 + int((losses < losses[true]).sum()) + (int((losses == losses[true]).sum()) - 1) / 2
    return math.log2(len(losses)) - math.log2(rank)


def chance_exposure(candidates: int) -> float:
    """Mean exposure in bits of a secret that the model knows nothing of, its rank being uniform (1.40 of 100)."""
    return math.log2(candidates) - math.lgamma(candidates + 1) / math.log(2) / candidates


def extracted(logits: Tensor, continuation: Tensor) -> bool:
    """Whether greedy decoding from the prefix gives the continuation [C] token by token, from its logits [C, V].

    If every token is the likeliest after the true ones before it, the decoder never leaves the true path, and if one
    is not it does so there: nothing has to be generated.
    """
    return bool((logits.argmax(-1) == continuation).all())


def membership_auc(members: Tensor, others: Tensor) -> float:
    """Area under the curve of the attack that calls texts of low loss members [M], against others [N].

    It is the probability that a random member has a lower loss than a random other, ties counting half; 0.5 is chance.
    NaN where a side is empty.
    """
    if not len(members) or not len(others):
        return math.nan
    gap = others[None, :] - members[:, None]
    return float(((gap > 0).double() + (gap == 0).double() / 2).mean())


@dataclass(frozen=True)
class CodeMemory:
    """How well a model remembers the codes of a population of biographies, by duplication level.

    Args:
        people: how many at each level.
        levels: copies at each level.
        candidates: codes that are compared for each person, the true one included.
    """

    people: tuple[int, ...] = (24, 24, 12, 6)
    levels: tuple[int, ...] = (0, 4, 16, 64)
    candidates: int = 100

    def __call__(self, run: Run) -> dict[str, float]:
        """Means over the people of each level L, the model being given the line up to the code.

        Returns:
            ``exposure_L`` in bits; ``code_loss_L`` in nats per digit; ``extracted_L``, the share of codes that greedy
            decoding gives whole; and for L > 0 ``membership_L``, the area under the curve of telling these people from
            those of level 0 by the loss of their code (where there are such).
        """
        population = Population(self.people, self.levels, self.candidates)
        check_population(run.artifacts.get(POPULATION), population)
        drawn, groups = population(run.ctx)
        tokenizer = run.ctx.facts.tokenizer() if run.ctx.facts.tokenizer else None
        bits, nats, whole = [], [], []
        for person in drawn:
            prefix, codes = in_tokens(tokenizer, person.prefix, (person.code, *person.decoys))
            logits = continuation_logits(run.predict, prefix, codes)
            losses = continuation_losses(logits, codes)
            bits.append(exposure(losses.sum(1)))
            nats.append(float(losses[0].mean()))
            whole.append(float(extracted(logits[0], codes[0])))
        group, columns = torch.tensor(groups), torch.tensor([bits, nats, whole], dtype=torch.float64)
        scores: dict[str, float] = {}
        for i, level in enumerate(self.levels):
            chosen = columns[:, group == i]
            if chosen.shape[1]:
                names = (f"exposure_{level}", f"code_loss_{level}", f"extracted_{level}")
                scores |= dict(zip(names, chosen.mean(1).tolist(), strict=True))
        return scores | self._membership(columns[1], group)

    def _membership(self, losses: Tensor, group: Tensor) -> dict[str, float]:
        of = {level: losses[group == i] for i, level in enumerate(self.levels) if bool((group == i).any())}
        return {f"membership_{k}": membership_auc(v, of[0]) for k, v in of.items() if k and 0 in of}


def check_population(inserted: dict[str, Any] | None, measured: Population) -> None:
    """See that a run inserted the people that a measure asks about, or none.

    Raises:
        PlanError: other people were drawn, or a level is not the copies that were inserted.
    """
    if inserted is None:
        return
    own = measured.told()
    for name in ("people", "candidates"):
        if inserted[name] != own[name]:
            raise PlanError(f"{name} of the insertions is {inserted[name]}, of the measure {own[name]}")
    wrong = [(i, m) for i, m in zip(inserted["levels"], own["levels"], strict=True) if i not in (0, m)]
    if wrong:
        raise PlanError(f"level {wrong[0][1]} of the measure was inserted {wrong[0][0]} times")


def in_tokens(tokenizer: Any, prefix: str, continuations: Sequence[str]) -> tuple[list[int], Tensor]:
    """A prefix [P] and continuations [K, C] as tokens.

    Raises:
        ValueError: the continuations are not equally long, or merge with the prefix, so that they cannot share it.
    """
    start = list(tokenizer.encode(prefix, add_special_tokens=False))
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in continuations]
    if len({len(row) for row in rows}) != 1:
        raise ValueError("the continuations differ in tokens: the tokenizer must split digits one by one")
    if list(tokenizer.encode(prefix + continuations[0], add_special_tokens=False)) != start + list(rows[0]):
        raise ValueError("the tokenizer merges the prefix with what follows it: end the prefix at a token's border")
    return start, torch.tensor(rows)
