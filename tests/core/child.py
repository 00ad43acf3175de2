"""Runs a toy plan in a process of its own: ``python child.py STORE SECONDS CHECKPOINT_S`` prints the result."""

import json
import sys
from pathlib import Path

import toy

from perturbed.core.run import Engine, Progress
from perturbed.core.store import Store
from perturbed.errors import PerturbedError


def tell(progress: Progress) -> None:
    print(f"{progress.done}/{progress.of_steps}", file=sys.stderr, flush=True)


def main(root: str, seconds: str, checkpoint_s: str) -> int:
    print("ready", file=sys.stderr, flush=True)
    try:
        engine = Engine(toy.rich(float(seconds)), 0, Store(Path(root)), float(checkpoint_s), tell)
        result = engine.run()
    except PerturbedError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.code
    print(json.dumps(result.to_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
