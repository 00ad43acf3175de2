"""The example for a Transformers folder and a text of one's own is short and does what it says."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_text.py"
TEXT = Path(__file__).parents[2] / "docs" / "evidence.md"


def save_folder(folder):
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(TEXT)], vocab_size=300)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    return folder


def test_the_example_is_at_most_fifteen_lines():
    tree = ast.parse(EXAMPLE.read_text())
    docs = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    assert len({n.lineno for n in ast.walk(tree) if isinstance(n, ast.stmt) and n not in docs}) <= 15


@pytest.mark.slow
def test_the_example_asks_its_two_questions(tmp_path):
    folder = save_folder(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(folder), str(TEXT)],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / done.stdout.split()[-1]).read_text()
    assert "flat+sparse" in page
    assert "Do the effects add up?" in page
