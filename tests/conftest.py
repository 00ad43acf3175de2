"""What every test gets: a home of its own, so that no test touches the user's store, caches or ledger."""

import pytest
import torch

torch.set_num_threads(1)  # as every run has; two threads on a busy machine can take sixty times as long


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """Harvested text and trained tokenizers, made once a session: they cost seconds and hold no state."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch, shared_cache):
    home = tmp_path / "home"
    home.mkdir()
    (home / "cache").symlink_to(shared_cache, target_is_directory=True)
    monkeypatch.setenv("PERTURBED_HOME", str(home))
