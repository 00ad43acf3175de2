"""Errors that end a command with one line: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED = 20  # of a long list of names, such as a model's modules


class PerturbedError(Exception):
    """Base of every error that the command line shows as one line; ``code`` is its exit code."""

    code = 2


class PlanError(PerturbedError):
    """A plan, or an intervention on it, does not fit: a missing stage, fact or module, an undeclared change."""


class StoreError(PerturbedError):
    """The checkpoint store cannot be read or written."""


class StaleError(PerturbedError):
    """Committed evidence does not come out any more."""

    code = 3


class Interrupted(PerturbedError):
    """The run was stopped from outside; the same command goes on where it was."""

    code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names what was probably meant, or lists what there is."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(options) - _LISTED} more" if len(options) > _LISTED else ""
    return f"there is {', '.join(options[:_LISTED])}{more}" if options else "there is none"
