import os
from pathlib import Path

import pytest

from perturbed import cli


@pytest.fixture
def home():
    """The test's own PERTURBED_HOME."""
    return Path(os.environ["PERTURBED_HOME"])


@pytest.fixture
def perturbed(capsys, monkeypatch, tmp_path):
    """Run a command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call
