"""Paths, and ways to run a command as a user does."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from data_prep.common.process_identity import own_identity

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SPIKETUNE_DATA", ROOT.parent / "shared" / "data"))  # real recordings, where available
slow = pytest.mark.skipif("SPIKETUNE_SLOW" not in os.environ, reason="slow; run launch/test.sh --slow")


def run_command(args: Sequence, **kw) -> CompletedProcess:
    """Run `python ARGS` in the root of the repository, as a user does, and wait for it to end."""
    return finish(start_command(args, **kw))


def start_command(args: Sequence, **kw) -> subprocess.Popen:
    """Start `python ARGS` in the root of the repository, in its own process group."""
    return start_group([sys.executable, *args], **kw)


def start_group(words: Sequence, **kw) -> subprocess.Popen:
    """Start any command in the root of the repository, in its own process group."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*map(str, words)], cwd=ROOT, start_new_session=True, stdout=pipe, stderr=pipe, text=True, **kw
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> CompletedProcess:
    """Wait for a started command and collect its output; it is killed after `timeout` seconds."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def unchanged_environment() -> Iterator[None]:
    """Undo changes of environment variables: what one run sets would change what later tests start."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def decoding_here(script: str) -> Iterator[None]:
    """Let a command of train/ start no decoding processes unless it is told to; a plan is of what others start."""
    path = Path(script)
    if path.parent.name != "train" or path.name == "plan.py":
        yield
        return
    from train.data import loader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "MAX_WORKERS", 0)
        yield


def run_here(script: str, *args) -> CompletedProcess:
    """Run a script as `__main__` in this process, which saves the seconds that a new Python takes to start."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0  # of SystemExit, which may be a message
    own_identity.cache_clear()  # a new process reads its own environment
    before, sys.argv = sys.argv, [script, *map(str, args)]
    with (
        unchanged_environment(),
        decoding_here(script),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            sys.argv = before
    return CompletedProcess([script, *args], code, out.getvalue(), err.getvalue())


def succeed_here(script: str, *args) -> CompletedProcess:
    """`run_here` a script that must succeed."""
    done = run_here(script, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def started_as(rank: int, ranks: int) -> dict[str, str]:
    """The environment variables that torchrun gives to one of several processes on a machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def wait_for(condition: Callable[[], object], seconds: float = 60, process: subprocess.Popen | None = None) -> None:
    """Wait until a condition holds, for at most `seconds`, while `process`, if there is one, is running."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def assert_refused(result: CompletedProcess, *words: str) -> None:
    """The command ended with exit code 2 and one error message that contains all `words`, without a traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert str(word) in errors[0]
