"""Losses of classifiers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch


def class_logits(model: Module, pixels: Tensor) -> Tensor:
    """Logits [B, K] of a plain network, or of a Transformers one, whose output holds them as ``logits``."""
    output = model(pixels)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def predict_class(model: Module, batch: Batch, ctx: Ctx) -> Tensor:
    """Predict slot: logits [B, K] of the batch's ``pixels`` [B, C, H, W]."""
    return class_logits(model, batch["pixels"])


def cross_entropy(model: Module, batch: Batch, ctx: Ctx) -> Tensor:
    """Loss slot: mean cross-entropy in nats of ``pixels`` [B, C, H, W] against ``labels`` [B]."""
    return F.cross_entropy(class_logits(model, batch["pixels"]), batch["labels"])
