"""Would a Transformers model, tuned on a text of one's own, gain from flatter steps, and what would sparsity cost it?

``python examples/own_text.py MODEL_FOLDER TEXT_FILE`` asks both, alone and together, and writes a page.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import perturbed as pt

tokens = AutoTokenizer.from_pretrained(sys.argv[1])(Path(sys.argv[2]).read_text(), return_tensors="pt").input_ids[0]
windows = [{"input_ids": window} for window in tokens.unfold(0, 64, 64)]
cut = len(windows) // 10
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
plan = pt.Plan.from_model(model, data=windows[cut:], held_out=windows[:cut], steps=30, batch=8)
sparse = pt.weights.SparseLowRank(rank=0, density=0.5, start="layer")
arms = {"flat": [pt.optim.SharpnessAware(rho=0.05)], "sparse": [sparse]}
print(pt.write_report(pt.compare(plan, arms, seeds=6, factorial=True), Path("reports")))
