"""What most tests of the feed begin with."""

import pytest

from perturbed.feed.database import Database


@pytest.fixture
def database(tmp_path):
    """An empty database of the feed."""
    made = Database(tmp_path / "feed.sqlite")
    yield made
    made.close()
