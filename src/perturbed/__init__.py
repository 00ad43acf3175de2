"""perturbed: change one thing about how a model is trained, adapted or used, and see what happens.

``pt.run("hubble")`` runs a method's study, ``pt.compare(plan, {"a": [A()], "b": [B()]})`` several changes on one plan,
``pt.judge(control, treatment)`` gives the verdict for scores made elsewhere; all three return a record, of which
``pt.write_report(record, folder)`` makes a page. The sites ``pt.data``, ``pt.inputs``, ``pt.features``, ``pt.weights``,
``pt.objectives``, ``pt.optim``, ``pt.inference`` and ``pt.measures`` hold what their files define, such as
``pt.weights.SparseLowRank``. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

_FROM = {
    "perturbed.api": ("run", "compare", "load"),
    "perturbed.core.plan": ("Plan", "Stage", "Facts", "Feature", "Measure", "Intervention", "apply"),
    "perturbed.core.optimiser": ("Optim",),
    "perturbed.core.context": ("Ctx",),
    "perturbed.core.run": ("Engine", "Run"),
    "perturbed.core.store": ("Store",),
    "perturbed.evidence.statistics": ("power",),
    "perturbed.evidence.study": ("Study", "AtLeast", "AtMost", "PaperScale"),
    "perturbed.errors": ("PerturbedError",),
}
_WHERE = {name: (module, name) for module, names in _FROM.items() for name in names}
_WHERE["judge"] = ("perturbed.evidence.scores", "judge_pair")
_WHERE["write_report"] = ("perturbed.evidence.report", "write_study")
_MODULES = ("data", "inputs", "features", "weights", "objectives", "optim", "inference", "measures", "plans", "methods")

__all__ = [*_WHERE, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        module, own = _WHERE[name]
        return getattr(importlib.import_module(module), own)
    if name in _MODULES:
        return importlib.import_module(f"perturbed.{name}")
    raise AttributeError(f"module 'perturbed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
