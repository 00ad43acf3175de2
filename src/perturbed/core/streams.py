"""Paired randomness: every draw is keyed by (seed, stage, name, step), so no change shifts another's draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Every = Literal["step", "stage", "run"]


def key(*parts: object) -> int:
    """32 bits (what a CPU generator keeps of a seed) from the hash of ``parts``."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


class Streams:
    """The named random streams of one run.

    One generator object is handed out per name and re-keyed by the clock at each step, so streams hold no state: a run
    resumes bit for bit from its checkpoint and step. A second call of a name within a step continues its stream.
    """

    def __init__(self, seed: int, rank: int = 0, device: torch.device | None = None):
        self.seed, self.rank, self.stage, self.step = seed, rank, "", 0
        self._scope, self._micro = "", 0
        self._handles: dict[tuple[str, str, Every], torch.Generator] = {}
        self._default = [torch.default_generator]
        if device is not None and device.type == "cuda":
            self._default.append(torch.cuda.default_generators[device.index or 0])

    def tick(self, stage: str, step: int) -> None:
        """Move the clock and re-key every generator that was handed out."""
        self.stage, self.step = stage, step
        for (_, name, every), generator in self._handles.items():
            generator.manual_seed(self._key(name, every))

    def rng(self, name: str, every: Every = "step") -> torch.Generator:
        """The CPU generator called ``name``; ``every`` says when it draws anew."""
        at = (self._scope, name, every)
        generator = self._handles.get(at)
        if generator is None:
            generator = self._handles[at] = torch.Generator()
            generator.manual_seed(self._key(name, every))
        return generator

    def once(self, name: str, every: Every = "stage") -> torch.Generator:
        """A fresh generator for ``name`` that the clock does not touch, for draws indexed by their own counter."""
        return torch.Generator().manual_seed(self._key(name, every))

    def _key(self, name: str, every: Every) -> int:
        if every == "run":
            return key(self.seed, name)
        if every == "stage":
            return key(self.seed, self.stage, name)
        return key(self.seed, self.stage, name, self.step, self.rank, self._micro)

    @contextmanager
    def scope(self, purpose: str, micro: int = 0, shared: bool = False) -> Iterator[None]:
        """Torch's default generators seeded for ``purpose`` inside, and as they were afterwards.

        Entering the same scope again in a step gives the same draws again, also from ``rng``: a loss that an attack
        evaluates many times sees the same dropout each time. In a ``shared`` scope every rank draws the same.
        """
        outer, saved = (self._scope, self._micro, self.rank), [g.get_state() for g in self._default]
        self._scope, self._micro, self.rank = purpose, micro, 0 if shared else self.rank
        seed = self._key(f"scope {purpose}", "step")
        for generator in self._default:
            generator.manual_seed(seed)
        for (scope, name, every), handle in self._handles.items():
            if scope == purpose:
                handle.manual_seed(self._key(name, every))
        try:
            yield
        finally:
            self._scope, self._micro, self.rank = outer
            for generator, state in zip(self._default, saved, strict=True):
                generator.set_state(state)
