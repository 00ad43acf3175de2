"""Next-token prediction within packed documents."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch
from perturbed.data.packing import attention_mask, position_ids, segments_of, targets


def causal_logits(model: Module, batch: Batch) -> Tensor:
    """Logits [B, T, V] of a Transformers causal language model.

    A batch with ``segment_ids`` [B, T] is read without attention across segments, its positions counted from the start
    of each; one that gives ``attention_mask`` (such as [B, 1, T, T], bool) and ``position_ids`` is read by those.
    """
    given = {k: batch[k] for k in ("attention_mask", "position_ids") if k in batch}
    if "segment_ids" in batch and not given:
        segments = batch["segment_ids"]
        given = {"attention_mask": attention_mask(segments), "position_ids": position_ids(segments)}
    return model(input_ids=batch["input_ids"], **given).logits  # type: ignore[no-any-return]


def predict_tokens(model: Module, batch: Batch, ctx: Ctx) -> Tensor:
    """Predict slot: logits [B, T, V]; those at t are of token t + 1."""
    return causal_logits(model, batch)


def token_losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of each token given those before it in its segment.

    Args:
        logits: [B, T, V] or [B, T - 1, V] of the tokens of ``batch``.
        batch: ``input_ids`` and ``segment_ids`` [B, T]; ``loss_mask`` [B, T] where some tokens are no targets; and
            ``labels`` [B, T], the tokens to predict, where the input has others in their place.

    Returns:
        Losses [B, T - 1] of tokens 1 … T - 1, and which of them are targets [B, T - 1], bool: never the first of a
        segment.
    """
    following = batch.get("labels", batch["input_ids"])[:, 1:]
    losses = F.cross_entropy(logits[:, : following.shape[1]].flatten(0, 1), following.flatten(), reduction="none")
    return losses.view_as(following), targets(batch)


def next_token_loss(model: Module, batch: Batch, ctx: Ctx) -> Tensor:
    """Loss slot: mean cross-entropy in nats over the targets of ``batch`` (see ``token_losses``).

    Raises:
        PlanError: the batch has no ``segment_ids``.
    """
    whole = {"input_ids": batch["input_ids"], "segment_ids": segments_of(batch)}
    shown = {k: v[:, :-1] for k, v in whole.items()}  # the last token is only predicted
    losses, wanted = token_losses(causal_logits(model, shown), batch)
    return (losses * wanted).sum() / wanted.sum().clamp(min=1)
