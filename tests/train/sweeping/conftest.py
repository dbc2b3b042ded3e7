"""Commands that a worker starts, run in this process."""

import sys

import pytest
from helpers import run_here

from train.sweeping.trial import Launcher, outcome


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The commands that were started, which run in this process; that saves the seconds that new ones take to start."""
    commands = []

    def run(self, command, heartbeat, lock, log, check):
        python, *words = command
        assert python == sys.executable
        commands.append(words)
        done = run_here(*words)
        log.write_text(done.stdout + done.stderr)
        return outcome(done.returncode, log.read_text(), log)

    monkeypatch.setattr(Launcher, "run", run)
    return commands
