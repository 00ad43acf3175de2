"""Losses of policies."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch


def predict_action(model: Module, batch: Batch, ctx: Ctx) -> Tensor:
    """Predict slot: actions [B, A] for the batch's ``observations`` [B, D]."""
    return model(batch["observations"])  # type: ignore[no-any-return]


def cloning_loss(model: Module, batch: Batch, ctx: Ctx) -> Tensor:
    """Loss slot: mean squared error of ``predict_action`` against the demonstrated ``actions`` [B, A]."""
    return F.mse_loss(predict_action(model, batch, ctx), batch["actions"])
