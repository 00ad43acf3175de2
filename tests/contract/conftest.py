"""Exemptions from the contract are counted and printed."""

from collections.abc import Callable

import pytest

TOLD: list[str] = []


@pytest.fixture
def tell() -> Callable[[str, str, str], None]:
    def note(label: str, rule: str, reason: str) -> None:
        TOLD.append(f"{label}: {rule}: {reason}")

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TOLD:
        terminalreporter.section(f"{len(TOLD)} exemptions from the contract")
        for line in TOLD:
            terminalreporter.write_line(line)
