"""Self-attention changed from outside: what comes out of chosen layers, for any model that calls torch's attention.

Diffusers, Transformers and timm all end in ``F.scaled_dot_product_attention``. A ``TorchFunctionMode``, torch's own
extension point, sees that call with queries, keys and values by head; it is in force only while a chosen module runs.
So no class is re-implemented and no attribute of the model is touched. ``nn.MultiheadAttention`` in its fast path and
``eager`` attention do not make the call: then nothing is hit, and that is an error.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn import Module, ModuleDict, ModuleList
from torch.overrides import TorchFunctionMode

from perturbed.errors import PlanError, nearest

Attend = Callable[..., Tensor]
Edit = Callable[[Tensor, Tensor, Tensor, Attend], Tensor]
"""(query, key, value [B, H, T, D], attend) -> [B, H, T, D]; ``attend(attn_mask=…)`` is the ordinary attention."""
Kind = Literal["identity", "mask", "noise", "blur"]


def matching(model: Module, where: str) -> list[Module]:
    """The outermost modules whose dotted names match the glob, mere lists of modules aside (they are never called).

    Raises:
        PlanError: none does.
    """
    names = dict(model.named_modules())
    called = [name for name, module in names.items() if not isinstance(module, ModuleList | ModuleDict)]
    hit = [name for name in called if name and fnmatch.fnmatchcase(name, where)]
    if not hit:
        raise PlanError(f"glob {where!r} matches no module: {nearest(where, called)}")
    held = set(hit)
    parents = {name: [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)] for name in hit}
    return [names[name] for name in hit if not held.intersection(parents[name])]


class _Watch(TorchFunctionMode):
    """Hands every self-attention that it sees to ``edit``."""

    def __init__(self, edit: Edit):
        super().__init__()
        self.edit, self.hits, self.crossing = edit, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.crossing:
            return func(*args, **kwargs)
        query, key, value, rest = _arguments(*args, **kwargs)
        if query.shape[-2] != key.shape[-2]:
            return func(*args, **kwargs)
        self.hits += 1
        if key.shape[-3] != query.shape[-3]:  # grouped: every query head gets its keys and values
            times = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(times, -3) for t in (key, value))
            rest["enable_gqa"] = False

        def attend(**others: Any) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, **{**rest, **others})

        return self.edit(query, key, value, attend)


def _arguments(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
    order = ("attn_mask", "dropout_p", "is_causal")
    return query, key, value, {**dict(zip(order, rest, strict=False)), **named}


@contextmanager
def edited_attention(model: Module, modules: Sequence[Module], edit: Edit) -> Iterator[None]:
    """Inside, each self-attention computed while one of ``modules`` runs gives what ``edit`` makes of it.

    Cross-attention is left alone: where keys are not as many as queries, or the module says ``is_cross_attention``.

    Args:
        model: holds the modules; it behaves as before once the block is left.
        modules: attention layers, or blocks of them.
        edit: from queries, keys and values by head and the ordinary attention to an output of the same shape.

    Raises:
        PlanError: on leaving, if no such attention was computed.
    """
    watch = _Watch(edit)
    within: list[ExitStack] = []

    def enter(module: Module, args: Any) -> None:
        within.append(ExitStack())
        if len(within) == 1:
            within[0].enter_context(watch)

    def leave(module: Module, args: Any, output: Any) -> None:
        within.pop().close()

    def cross(module: Module, args: Any) -> None:
        watch.crossing += 1

    def crossed(module: Module, args: Any, output: Any) -> None:
        watch.crossing -= 1

    crossings = [m for m in model.modules() if getattr(m, "is_cross_attention", False)]
    with ExitStack() as hooks:
        for group, before, after in ((modules, enter, leave), (crossings, cross, crossed)):
            for module in group:
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after, always_call=True).remove)
        yield
    if not watch.hits:
        raise PlanError(
            f"no self-attention was seen in {', '.join(sorted({type(m).__name__ for m in modules}))}: name layers that "
            "call F.scaled_dot_product_attention (Transformers: attn_implementation='sdpa')"
        )


def identity_map(query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
    """An ``Edit``: every token attends to itself alone, so that the values come out."""
    return value


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    """Attention maps softmax(q k^T / sqrt d) [B, H, T, T], rows summing to 1, of an attention without a mask."""
    return (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)


def blurred(maps: Tensor, size: int = 5, sigma: float = 1.0) -> Tensor:
    """Maps [B, H, T, T] convolved along queries and keys with a Gaussian of ``size`` taps, rows again summing to 1."""
    at = torch.arange(size, dtype=maps.dtype, device=maps.device) - size // 2
    taps = (-(at**2) / (2 * sigma**2)).exp()
    kernel = torch.outer(taps, taps)[None, None]
    found = F.conv2d(maps.flatten(0, 1).unsqueeze(1), kernel, padding=size // 2).view_as(maps)
    return found / found.sum(-1, keepdim=True)


def random_mask(tokens: int, rate: float, rng: Generator) -> Tensor:
    """Which keys a query sees [T, T], bool: each is hidden with probability ``rate``, its own never."""
    seen = torch.rand(tokens, tokens, generator=rng) >= rate
    return seen | torch.eye(tokens, dtype=torch.bool)


@dataclass(frozen=True)
class Disturb:
    """An ``Edit`` that spoils the attention map A of every head, by a ``strength`` u that leaves it alone at 0.

    ``identity``: (1 - u) A + u I, that is a blend of the output with the values; no map is computed for it.
    ``mask``: each key but the query's own hidden with probability u, so u = 1 is the identity again.
    ``noise``: A + u N with standard normal N. ``blur``: (1 - u) A + u times A under a Gaussian of 5 taps. ``mask`` and
    ``blur`` are for attention that has no mask of its own, as that of image models.

    Args:
        kind: of those four.
        strength: u.
        rng: CPU generator of ``mask`` and ``noise``.
    """

    kind: Kind
    strength: float
    rng: Generator

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """The spoiled output [B, H, T, D]."""
        tokens = query.shape[-2]
        if self.kind == "identity":
            return torch.lerp(attend(), value, self.strength)
        if self.kind == "mask":
            seen = random_mask(tokens, self.strength, self.rng).to(query.device)
            return attend(attn_mask=seen)
        if self.kind == "noise":
            noise = torch.randn(*query.shape[:-1], tokens, generator=self.rng).to(query)
            return attend() + self.strength * (noise @ value)
        return torch.lerp(attend(), blurred(probabilities(query, key)) @ value, self.strength)


KINDS: tuple[Kind, ...] = get_args(Kind)
