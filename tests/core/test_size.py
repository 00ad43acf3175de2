"""The core stays small: what everything rests on must be readable in a sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import perturbed.core


def code_lines(source: str) -> int:
    """Lines that are not blank, comment or docstring."""
    told: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            told |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in told)


def test_core_is_at_most_1500_lines_of_code():
    files = Path(perturbed.core.__file__).parent.glob("*.py")
    assert sum(code_lines(f.read_text()) for f in files) <= 1500


def test_lines_are_counted():
    assert code_lines('"""Doc."""\n\n# comment\ndef f():\n    """Doc\n    more."""\n    return 1\n') == 2
