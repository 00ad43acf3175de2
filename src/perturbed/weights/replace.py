"""Other modules in the place of a model's own, found by their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

from torch import nn
from torch.nn import Module

from perturbed.errors import PlanError, nearest

Kind = type[Module] | tuple[type[Module], ...]


def replace_modules(model: Module, where: str, make: Callable[[str, Module], Module], kind: Kind = nn.Linear) -> Module:
    """Put ``make(name, module)`` in the place of every module of a kind whose dotted name matches a glob.

    A module that the model holds under several names is made once, from its first name, and put back under all of them.
    Each new module takes over train or eval mode. The order of modules, and so of parameters, stays.

    Args:
        model: rewritten in place.
        where: glob of dotted names, as in ``model.named_modules()``.
        make: gives the new module; it may give the old one back.
        kind: class or classes that count as a match.

    Returns:
        The model: what was made, where ``model`` itself matches.

    Raises:
        PlanError: nothing matches, or a parameter of a match also belongs to another module (tied weights), which
            would come apart.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    fitting = {name: module for name, module in named.items() if isinstance(module, kind)}
    matches = {name: module for name, module in fitting.items() if fnmatch.fnmatchcase(name, where)}
    if not matches:
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise PlanError(f"glob {where!r} matches no {kinds} of the model: {nearest(where, fitting)}")
    made: dict[Module, Module] = {}
    for name, module in matches.items():
        if module not in made:
            made[module] = make(name, module)
            made[module].train(module.training)
            if made[module] is not module:
                _refuse_tied(model, name, module)
    for name, module in matches.items():
        parent, _, leaf = name.rpartition(".")
        if not name:
            return made[module]
        setattr(named[parent], leaf, made[module])
    return model


def _refuse_tied(model: Module, name: str, module: Module) -> None:
    own = {id(p): leaf for leaf, p in module.named_parameters(recurse=False)}
    for other_name, other in model.named_modules():
        for leaf, parameter in other.named_parameters(recurse=False):
            if other is not module and id(parameter) in own:
                raise PlanError(
                    f"{name}.{own[id(parameter)]} is also {other_name}.{leaf}, and replacing {name} would part them: "
                    f"leave it out by the glob, or untie them first"
                )
