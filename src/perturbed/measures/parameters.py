"""What a model takes to train and to store, and how its weights' singular values fall off."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from perturbed.core.run import Run
from perturbed.errors import PlanError, nearest


def storage(model: Module) -> dict[str, float]:
    """Size of a model, tied tensors counted once.

    Returns:
        ``parameters_trained`` and ``parameters_stored`` (trained or not, without buffers), and ``megabytes_stored``
        (10^6 bytes of parameters and saved buffers, such as the places of sparse entries).
    """
    parameters = list(model.parameters())
    saved = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return {
        "parameters_trained": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters_stored": sum(p.numel() for p in parameters),
        "megabytes_stored": sum(saved.values()) / 1e6,
    }


def effective_rank(weight: Tensor) -> tuple[int, float]:
    """Numerical rank of a matrix, and its effective rank.

    The second is the exponential of the entropy of the singular values over their sum (Roy and Vetterli 2007): n for n
    equal ones, near 1 if one dominates. The first counts those above max(shape) * machine epsilon * the largest.
    """
    sizes = torch.linalg.svdvals(weight.detach().double())
    limit = max(weight.shape) * torch.finfo(weight.dtype).eps * sizes.max()
    share = sizes[sizes > 0] / sizes.sum()
    return int((sizes > limit).sum()), float(torch.exp(-(share * share.log()).sum()))


@dataclass(frozen=True)
class Storage:
    """The numbers of ``storage``, of the finished model."""

    def __call__(self, run: Run) -> dict[str, float]:
        """The numbers by name."""
        return storage(run.ctx.bare)


@dataclass(frozen=True)
class Ranks:
    """Ranks of the weight matrices of a model's modules, as a share of the highest possible.

    Args:
        where: glob of the modules; those without a matrix called ``weight`` are passed over.
    """

    where: str = "*layer*"

    def __call__(self, run: Run) -> dict[str, float]:
        """``rank_share`` and ``effective_rank_share``, means over the matrices."""
        found = [(*effective_rank(w), min(w.shape)) for w in self.weights(run.ctx.bare)]
        return {
            "rank_share": sum(rank / full for rank, _, full in found) / len(found),
            "effective_rank_share": sum(effective / full for _, effective, full in found) / len(found),
        }

    def weights(self, model: Module) -> Iterator[Tensor]:
        """The matrices.

        Raises:
            PlanError: there is none.
        """
        named = {n: getattr(m, "weight", None) for n, m in model.named_modules() if fnmatch.fnmatchcase(n, self.where)}
        matrices = [w for w in named.values() if isinstance(w, Tensor) and w.dim() == 2]
        if not matrices:
            names = [name for name, _ in model.named_modules()]
            raise PlanError(f"glob {self.where!r} matches no module with a weight matrix: {nearest(self.where, names)}")
        yield from matrices
