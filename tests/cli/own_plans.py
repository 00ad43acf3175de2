"""Plan files as a user might write them, sound and not."""

from dataclasses import dataclass, replace

import torch

from perturbed.core.plan import Facts
from perturbed.plans.digits import Digits

SMALL = Digits(pretrain_steps=5, finetune_steps=3, held_out=40)
plan = SMALL()
not_a_plan = 42


def made():
    return SMALL()


def wants(size):
    return SMALL()


@dataclass(frozen=True)
class Explodes:
    inner: object

    def __call__(self, model, batch, ctx):
        loss = self.inner(model, batch, ctx)
        return loss * torch.nan if ctx.seed == 1 else loss


exploding = plan.edit("finetune", lambda s: replace(s, loss=Explodes(s.loss)))
without_range = plan.replace(facts=Facts(modality="vision", target="class", input="pixels"))
