"""What several test files need: where things are, and how to run a command as a user does."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SPIKETUNE_DATA", ROOT.parent / "shared" / "data"))  # the real recordings, if they are here
slow = pytest.mark.skipif("SPIKETUNE_SLOW" not in os.environ, reason="takes long; launch/test.sh --slow runs it too")


def run_command(args: Sequence, **kw) -> CompletedProcess:
    """Run `python ARGS` in the repository's root, as a user does, and return how it ended."""
    return finish(start_command(args, **kw))


def start_command(args: Sequence, **kw) -> subprocess.Popen:
    """Start `python ARGS` in the repository's root as the leader of a process group of its own."""
    return start_group([sys.executable, *args], **kw)


def start_group(words: Sequence, **kw) -> subprocess.Popen:
    """Start any command in the repository's root as the leader of a process group of its own."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, words)], cwd=ROOT, start_new_session=True, **piped, **kw)


def finish(process: subprocess.Popen, timeout: float = 120) -> CompletedProcess:
    """Wait for a started command."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return CompletedProcess(process.args, process.returncode, out, err)


def run_here(script: str, *args) -> CompletedProcess:
    """Run a script as `__main__` in this process: what `run_command` does without the seconds a new Python takes."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, [script, *map(str, args)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
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


def assert_refused(result: CompletedProcess, *words: str) -> None:
    """The command ended with exit code 2 and one sentence, which holds all `words`; nobody saw a traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert str(word) in errors[0]
