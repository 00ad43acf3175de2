"""Where perturbed keeps what belongs to the user: checkpoints, caches, the feed's database, their own ledger."""

import os
from pathlib import Path


def home() -> Path:
    """Return the folder of the user's own things, which need not exist yet.

    It is the environment variable ``PERTURBED_HOME`` where that is set and not empty (a leading ``~`` is expanded,
    a relative path is taken from the working directory), else the platform's data folder for ``perturbed``.
    """
    if chosen := os.environ.get("PERTURBED_HOME"):
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_data_dir  # imported late: it is only needed where nothing was chosen

    return Path(user_data_dir("perturbed"))
