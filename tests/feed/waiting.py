"""Waiting for what a machine does in its own time: for the thing itself, with a limit that only a defect reaches."""

import time

SECONDS = 120.0


def until(happened, seconds=SECONDS):
    """What ``happened()`` answers, as soon as that is something."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain"
        time.sleep(0.02)
    return found
