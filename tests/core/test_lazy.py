"""Sites give what their files define, by name, and import nothing before."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import perturbed as pt

SITES = ("data", "inputs", "features", "weights", "objectives", "optim", "inference", "measures")
ROOT = Path(pt.__file__).parent


def public(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    named = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    return [n.name for n in named if not n.name.startswith("_") and not (path.parent / f"{n.name}.py").exists()]


@pytest.mark.parametrize("site", SITES)
def test_each_name_is_that_of_its_file(site: str) -> None:
    names = []
    for path in sorted((ROOT / site).glob("[!_]*.py")):
        module = __import__(f"perturbed.{site}.{path.stem}", fromlist=["x"])
        for name in public(path):
            assert getattr(getattr(pt, site), name) is getattr(module, name)
            names.append(name)
    assert names
    assert len(set(names)) == len(names), "a name that two files of a site define could mean either"
    assert set(dir(getattr(pt, site))) == set(names)


def test_files_and_names_are_found_and_others_are_not() -> None:
    assert pt.weights.SparseLowRank.__module__ == "perturbed.weights.sparse_low_rank"
    assert pt.measures.bounds.Ball(0.1).eps == 0.1
    assert pt.data.content.__file__  # a function of this name in it does not stand in its way
    assert pt.plans.Digits.NAME == "digits"
    assert not hasattr(pt.weights, "__wrapped__")
    with pytest.raises(AttributeError, match=r"perturbed\.weights has no 'SparseLowRang'.*SparseLowRank"):
        _ = pt.weights.SparseLowRang
    with pytest.raises(ImportError, match="nothing_of_the_kind"):
        exec("from perturbed.weights import nothing_of_the_kind")


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    ask = "import sys, perturbed as pt; dir(pt.weights); assert 'torch' not in sys.modules; pt.weights.SparseLowRank; "
    ask += "assert 'torch' in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", ask], check=True, timeout=120)
