"""The checkpoint store: what goes in comes out, or is known to be damaged."""

import errno
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import toy

from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.errors import PlanError, StoreError

HERE = Path(__file__).parent
KEY = "ab" * 32
TIED = torch.arange(6.0)
TREE = {
    "model": {"bf16": torch.randn(3, 2).bfloat16(), "bool": torch.tensor([True, False]), "scalar": torch.tensor(3.5)},
    "empty": torch.empty(0, 4),
    "tied": [TIED, TIED, TIED[2:]],
    "strided": torch.arange(12.0).reshape(3, 4).T,
    "whole": {0: {"step": torch.tensor(1.0)}, 1: {}, None: None, "0": torch.tensor(7)},
    "slash": {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "a#1": torch.tensor(3)},
    "plain": [1, 2.5, "é\n", None, True, math.inf, [], {}, (), (1, (2,))],
    "grown": torch.ones(2, requires_grad=True) * 2,
}  # fmt: skip


def same(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


@pytest.fixture(params=["disk", "memory"])
def store(request, tmp_path):
    return Store(tmp_path / "store" if request.param == "disk" else None)


def test_a_tree_comes_back_as_it_was(store):
    assert store.get(KEY) is None
    store.put(KEY, TREE)
    assert same(store.get(KEY), TREE)
    store.put(KEY, {"other": 1})
    assert store.get(KEY) == {"other": 1}
    store.drop(KEY)
    store.drop(KEY)
    assert store.get(KEY) is None


def test_what_is_stored_is_a_copy(store):
    """Weights go on training after a snapshot, and a loaded optimiser state is written in place."""
    live = torch.zeros(2)
    store.put(KEY, {"w": live})
    live += 1
    out = store.get(KEY)["w"]
    assert torch.equal(out, torch.zeros(2))
    out += 5
    assert torch.equal(store.get(KEY)["w"], torch.zeros(2))


@pytest.mark.parametrize("bad", [{1, 2}, object(), b"x", 1j, {("a", 1): 2}, {"d": [lambda: 0]}])
def test_what_is_neither_tensor_nor_json_is_refused_with_its_place(store, bad):
    with pytest.raises(PlanError, match=r"state/thing.* only tensors and JSON values can be saved"):
        store.put(KEY, {"state": {"thing": bad}})
    assert store.get(KEY) is None


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip_a_weight(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def edit_the_skeleton(path):
    path.write_bytes(path.read_bytes().replace(b"lucky", b"unluc"))


def rubbish(path):
    path.write_bytes(b"not a checkpoint at all, but long enough to look like one" * 10)


def without_our_header(path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3)}, path)


DAMAGES = [truncate, empty, flip_a_weight, edit_the_skeleton, rubbish, without_our_header]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_reported_removed_and_counts_as_absent(tmp_path, capsys, damage):
    store = Store(tmp_path)
    store.put(KEY, {"w": torch.arange(8.0), "note": "lucky"})
    before = store.path(KEY).read_bytes()
    damage(store.path(KEY))
    assert store.path(KEY).read_bytes() != before
    assert store.get(KEY) is None
    told = capsys.readouterr().err
    assert told.startswith(f"perturbed: warning: checkpoint {store.path(KEY)} is damaged")
    assert told.endswith("computing it again\n")
    assert told.count("\n") == 1
    assert store.entries() == []
    store.put(KEY, {"w": torch.zeros(1)})
    assert store.get(KEY)["w"] == 0


def test_a_file_of_another_key_is_foreign(tmp_path, capsys):
    store, other = Store(tmp_path), "ab" + "cd" * 31
    store.put(other, {"w": torch.zeros(3)})
    store.path(other).rename(store.path(KEY))
    assert store.get(KEY) is None
    assert "belongs to another key" in capsys.readouterr().err


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_over_a_damaged_store_gives_the_same_result(tmp_path, capsys, damage):
    store = Store(tmp_path)
    clean = Engine(toy.plan(), 0, store).run()
    for entry in store.entries():
        damage(entry.path)
    again = Engine(toy.plan(), 0, store).run()
    damaged = 3 if damage is not edit_the_skeleton else 0
    assert capsys.readouterr().err.count("is damaged") == damaged
    assert (again.weights, again.scores, again.curves) == (clean.weights, clean.scores, clean.curves)


def test_one_damaged_stage_is_trained_again_from_the_one_before(tmp_path, monkeypatch):
    engine = Engine(toy.plan(), 0, Store(tmp_path))
    clean = engine.run()
    flip_a_weight(engine.store.path(engine.key("tune")))
    flip_a_weight(engine.store.path(engine.all_keys()["/result"]))
    trained = []
    monkeypatch.setattr(
        Engine, "_train", lambda self, stage, real=Engine._train: trained.append(stage.name) or real(self, stage)
    )
    assert Engine(toy.plan(), 0, Store(tmp_path)).run().weights == clean.weights
    assert trained == ["tune"]


# ---- the disk --------------------------------------------------------------------------------------------------------

FULL = """
import sys, torch
from pathlib import Path
from perturbed.core.store import Store
from perturbed.errors import StoreError
store = Store(Path(sys.argv[1]))
store.put("aa" * 32, {"w": torch.arange(1000.0)})
try:
    store.put("aa" + "bb" * 31, {"w": torch.zeros(1_000_000)})
except StoreError as e:
    print(e)
else:
    raise SystemExit("it fitted")
assert torch.equal(store.get("aa" * 32)["w"], torch.arange(1000.0))
assert store.get("aa" + "bb" * 31) is None
assert [e.key for e in store.entries()] == ["aa" * 32], store.entries()
assert [p.name for p in store.root.glob("??/*")] == ["aa" * 32 + ".safetensors"], list(store.root.glob("??/*"))
"""


def python(code, *args, prefix=(), **more):
    command = [*prefix, sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=HERE, **more)


def limit_files():
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_write_that_does_not_fit_leaves_the_store_as_it_was(tmp_path):
    done = python(FULL, tmp_path / "store", preexec_fn=limit_files)
    assert done.returncode == 0, done.stderr
    assert "the disk is full; free space (`perturbed cache prune`) or set PERTURBED_HOME" in done.stdout


def can_mount():
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="may not mount a small file system here")
def test_a_really_full_disk_too(tmp_path):
    prefix = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"', str(tmp_path))
    done = python(FULL, tmp_path / "store", prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout


def test_a_run_on_a_full_disk_ends_with_the_reason_and_goes_on_once_there_is_room(tmp_path, monkeypatch):
    plan, store = toy.plan(), Store(tmp_path)
    first = Engine(plan, 0, store)
    first.snapshot("pretrain")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("perturbed.core.store.save_file", full)
        with pytest.raises(StoreError, match="the disk is full"):
            Engine(plan, 0, store).run()
    assert [e.key for e in store.entries()] == [first.key("pretrain")]
    assert not list(tmp_path.glob("??/.writing-*"))
    assert Engine(plan, 0, store).run().weights == Engine(plan, 0, Store(None)).run().weights


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    path = tmp_path / "store"
    path.write_text("")
    with pytest.raises(StoreError, match=f"cannot make the store {path}: .*set PERTURBED_HOME"):
        Store(path)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE])
def test_a_file_that_may_not_be_read_is_an_error_and_stays(tmp_path, monkeypatch, code):
    """Only damage may cost a checkpoint: not a lack of permissions, nor too many open files."""
    store = Store(tmp_path)
    store.put(KEY, {"w": torch.zeros(1)})

    def refused(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        with pytest.raises(StoreError, match=f"cannot read {store.path(KEY)}: {os.strerror(code)}; .*PERTURBED_HOME"):
            store.get(KEY)
    assert store.get(KEY)["w"] == 0


def test_a_file_of_somebody_else_can_be_read_though_its_time_cannot_be_set(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put(KEY, {"w": torch.zeros(1)})

    def refused(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    assert store.get(KEY)["w"] == 0


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    store = Store(tmp_path / "store")
    (store.root / "ab").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match=r"cannot write .*PERTURBED_HOME, then run again"):
        store.put(KEY, {"w": torch.zeros(1)})
    (store.root / "locks").write_text("")
    with pytest.raises(StoreError, match="cannot write"), store.lock(KEY):
        pass


READ_ONLY = """
import sys
from pathlib import Path
from perturbed.core.store import Store
from perturbed.errors import StoreError
try:
    Store(Path(sys.argv[1]) / "store")
except StoreError as e:
    print(e)
"""


@pytest.mark.skipif(not can_mount(), reason="may not mount a read-only file system here")
def test_a_read_only_disk_is_named(tmp_path):
    prefix = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o ro none "$0" && exec "$@"', str(tmp_path))
    done = python(READ_ONLY, tmp_path, prefix=prefix)
    assert "Read-only file system; set PERTURBED_HOME to a folder of yours" in done.stdout, done.stderr


# ---- pruning ---------------------------------------------------------------------------------------------------------


def test_prune_removes_the_least_recently_used_and_what_killed_writers_left(tmp_path):
    store = Store(tmp_path)
    keys = [f"{i}{i}" * 32 for i in range(3)]
    for age, key in enumerate(keys):
        store.put(key, {"w": torch.zeros(1000)})
        os.utime(store.path(key), (age, age))
    store.get(keys[0])  # used just now
    stray = store.path(keys[1]).parent / ".writing-xyz"
    stray.write_bytes(b"0" * 100)
    os.utime(stray, (0, 0))
    size = store.entries()[0].size
    assert [e.key for e in store.entries()] == [keys[1], keys[2], keys[0]]
    assert [e.key for e in store.prune(2 * size)] == [keys[1]]
    assert not stray.exists()
    assert [e.key for e in store.prune(0)] == [keys[2], keys[0]]
    assert store.entries() == []


def test_prune_leaves_the_file_that_another_process_is_writing(tmp_path):
    store = Store(tmp_path)
    store.put(KEY, {"w": torch.zeros(10)})
    fresh = store.path(KEY).parent / ".writing-abc"
    fresh.write_bytes(b"half of it")
    store.prune(10**9)
    assert fresh.exists()


# ---- several processes -----------------------------------------------------------------------------------------------

BOTH = """
import json, sys
from pathlib import Path
import toy
from perturbed.core.run import Engine
from perturbed.core.store import Store
trained = []
train = Engine._train
Engine._train = lambda self, stage: trained.append(stage.name) or train(self, stage)
result = Engine(toy.rich(0.02, 15), 0, Store(Path(sys.argv[1]))).run()
print(json.dumps([trained, result.weights, result.scores]))
"""


def test_two_processes_on_one_store_train_each_stage_once_and_agree(tmp_path):
    import json

    command = [sys.executable, "-c", BOTH, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE) for _ in range(2)]
    outputs = [json.loads(p.communicate(timeout=120)[0]) for p in both]
    assert sorted(outputs[0][0] + outputs[1][0]) == ["first", "second"]
    alone = Engine(toy.rich(0, 15), 0, Store(None)).run()
    for _, weights, scores in outputs:
        assert (weights, scores) == (alone.weights, alone.scores)
    store = Store(tmp_path)
    assert len(store.entries()) == 5  # two stages, two snapshots, the result: no partial is left
    assert all(store.get(e.key) is not None for e in store.entries())


WRITER = """
import sys, torch
from pathlib import Path
from perturbed.core.store import Store
store = Store(Path(sys.argv[1]))
for i in range(60):
    store.put("cd" * 32, {"w": torch.full((20_000,), float(i))})
    tree = store.get("cd" * 32)
    assert tree is not None and len(set(tree["w"].tolist())) == 1
"""


def test_readers_see_all_or_nothing_while_others_write(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=HERE) for _ in range(2)]
    for writer in writers:
        assert writer.communicate(timeout=120)[1] == ""
        assert writer.returncode == 0


def test_a_lock_goes_with_its_process(tmp_path):
    code = """
    import sys, time
    from pathlib import Path
    from perturbed.core.store import Store
    with Store(Path(sys.argv[1])).lock("k"):
        print("held", flush=True)
        time.sleep(60)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    import fcntl

    with open(tmp_path / "locks" / "k", "w") as f:
        with pytest.raises(BlockingIOError):
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder.kill()
        holder.wait()
        holder.stdout.close()
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with Store(tmp_path).lock("k"):
        pass
