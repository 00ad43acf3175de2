"""How well a language model predicts text that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from perturbed.core.plan import Batch
from perturbed.core.run import Run
from perturbed.data.packing import pack
from perturbed.data.vocabulary import Text, byte_lengths
from perturbed.objectives.language import token_losses


@torch.no_grad()
def text_loss(
    predict: Callable[[Batch], Tensor], batches: Iterable[Batch], bytes_of: Tensor | None = None
) -> tuple[float, float]:
    """Loss on packed text.

    Args:
        predict: logits [B, T, V] of a batch.
        batches: with ``input_ids`` and ``segment_ids`` [B, T].
        bytes_of: bytes that each token stands for [V]; needed for the second number.

    Returns:
        Mean nats per target token, and bits per byte: the same total in bits over the bytes of the targets, which can
        be compared between vocabularies (NaN without ``bytes_of``).
    """
    nats, tokens, size = 0.0, 0, 0
    for batch in batches:
        losses, wanted = token_losses(predict(batch), batch)
        nats += float(losses[wanted].double().sum())
        tokens += int(wanted.sum())
        if bytes_of is not None:
            size += int(bytes_of[batch["input_ids"][:, 1:][wanted]].sum())
    if tokens == 0:
        return math.nan, math.nan
    return nats / tokens, nats / math.log(2) / size if size else math.nan


@dataclass(frozen=True)
class HeldOut:
    """Loss on the held-out documents of a corpus, the same windows for every seed and arm.

    Args:
        text: the corpus.
        length: targets in a window.
        windows: how many at most.
        batch: windows at a time.
    """

    text: Text
    length: int
    windows: int = 128
    batch: int = 32

    def __call__(self, run: Run) -> dict[str, float]:
        """``heldout_loss`` in nats per token, ``bits_per_byte``, and ``epochs``: how often training read its corpus."""
        packed = pack(self.text.test(), self.length + 1)
        used = min(self.windows, len(packed))
        batches = (
            packed.batch(torch.arange(first, min(first + self.batch, used))) for first in range(0, used, self.batch)
        )
        loss, bits = text_loss(run.predict, batches, byte_lengths(self.text.tokenizer()))
        read = {k: v["epochs"] for k, v in run.artifacts.items() if k.startswith("corpus ")}
        return {"heldout_loss": loss, "bits_per_byte": bits, "epochs": sum(read.values())}
