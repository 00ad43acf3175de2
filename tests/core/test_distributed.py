"""Two data-parallel processes, or micro-batches, take the steps of one process on the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def launch(folder, processes, kind="plain", **environment):
    folder.mkdir()
    script = [str(HERE / "launched.py"), str(folder), kind]
    # `accelerate launch --cpu` starts several processes through MPI only; torchrun sets what accelerate reads
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(several if processes > 1 else []), *script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=env, cwd=HERE)
    assert done.returncode == 0, done.stderr
    weights = folder / "weights.pt"
    return json.loads((folder / "told.json").read_text()), torch.load(weights) if weights.exists() else None


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("alone") / "run", 1)


def close(one, two):
    return all(torch.allclose(one[k], two[k], rtol=0, atol=1e-6) for k in one)


def test_two_processes_equal_one_on_the_whole_batch(tmp_path, alone):
    told, weights = launch(tmp_path / "run", 2)
    assert told["world"] == 2
    assert close(weights, alone[1])
    assert told["scores"] == pytest.approx(alone[0]["scores"])


def test_micro_batches_equal_the_whole_batch(tmp_path, alone):
    told, weights = launch(tmp_path / "run", 1, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert told["world"] == 1
    assert close(weights, alone[1])


def test_both_together(tmp_path, alone):
    told, weights = launch(tmp_path / "run", 2, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert told["world"] == 2
    assert close(weights, alone[1])


def test_a_loss_that_is_nan_in_one_process_ends_the_run_in_all(tmp_path):
    told, weights = launch(tmp_path / "run", 2, "diverging")
    assert told["scores"] == {}
    assert "at step 3" in told["diverged"]
    assert weights is None
