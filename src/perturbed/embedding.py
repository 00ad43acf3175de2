"""The process that turns texts into vectors for the feed: ``python -m perturbed.embedding``, spoken to over its pipes.

The sentence encoder is MiniLM (all-MiniLM-L6-v2), read as it was trained: the mean of the last layer over the tokens,
brought to length 1, of at most 256 tokens. One thread.

Numbers are unsigned 32-bit, little-endian. First it says ``length, JSON {"model", "size"}``. A request is ``count``,
then for each text ``length, UTF-8``; the answer is ``count · size`` float32. It ends when its standard input does, so
with its parent at the latest, also while the model is still being loaded.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 256  # tokens; what all-MiniLM-L6-v2 was tuned for
_NUMBER = struct.Struct("<I")

Requests = SimpleQueue[list[str]]


def embed(texts: list[str]) -> Tensor:
    """The unit vectors [N, 384] of texts."""
    import torch
    from torch.nn.functional import normalize

    from perturbed.weights import minilm

    batch = minilm.tokenizer()(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    with torch.inference_mode():
        hidden = minilm.lower(minilm.LAYERS)(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def listen(source: BinaryIO, requests: Requests) -> None:
    """Take requests down until ``source`` ends, then end the process: nobody waits for an answer any more."""
    try:
        while head := source.read(_NUMBER.size):
            texts = []
            for _ in range(_NUMBER.unpack(head)[0]):
                length = _NUMBER.unpack(source.read(_NUMBER.size))[0]
                texts.append(source.read(length).decode())
            requests.put(texts)
    finally:  # also where the parent went in the middle of a sentence
        os._exit(0)


def serve(requests: Requests, target: BinaryIO) -> None:
    """Answer requests, for ever."""
    from perturbed.weights import minilm

    size = embed(["ready"]).shape[1]
    hello = json.dumps({"model": minilm.fingerprint(), "size": size}).encode()
    target.write(_NUMBER.pack(len(hello)) + hello)
    target.flush()
    while True:
        target.write(embed(requests.get()).numpy().astype("<f4").tobytes())
        target.flush()


def main() -> None:
    """Serve standard input and output, which nothing else in the process may write to."""
    target = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    requests: Requests = SimpleQueue()
    threading.Thread(target=listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    import torch  # only now: this takes seconds, in which the parent may go

    torch.set_num_threads(1)
    try:
        serve(requests, target)
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)


if __name__ == "__main__":
    main()
