"""The interpreter that tests start commands with does what Python does (tests/support/forked_python.py)."""

import os
import signal
import subprocess
import sys

import pytest
from forked_python import FRESH, forked_python
from helpers import wait_for

pytestmark = pytest.mark.skipif(FRESH, reason="this session has fresh interpreters")

# Prints what a process knows of itself, then ends as its first argument says.
SCRIPT = """
import os, signal, sys, time

def stop(number, frame):
    print("stopped by", number)
    sys.exit(75)

if __name__ == "__main__":
    print(sys.argv[1:], sys.stdin.read(), os.getcwd(), sys.path[0], os.environ["SPIKETUNE_TEST"], __file__)
    print("error", file=sys.stderr)
    way = sys.argv[1]
    if way == "raises":
        raise ValueError(way)
    if way == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "waits":
        signal.signal(signal.SIGTERM, stop)
        open("ready", "w").close()
        time.sleep(60)
    sys.exit({"3": 3, "none": None, "message": "a message"}[way])
"""


@pytest.fixture
def started(tmp_path):
    """A function that starts the script with an interpreter, in a folder of its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(python: str, *words: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [python, script, *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "SPIKETUNE_TEST": "set", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize("way", ["3", "none", "message", "raises", "is killed"])
def test_a_script_runs_and_ends_as_in_a_fresh_interpreter(started, way):
    ends = []
    for python in (forked_python(), sys.executable):
        process = started(python, way, "two words")
        out, err = process.communicate("input")
        ends.append((process.returncode, out, [line for line in err.splitlines() if not line.startswith(" ")]))
    assert ends[0] == ends[1]


def test_signals_reach_the_script_and_its_exit_code_comes_back(started, tmp_path):
    process = started(forked_python(), "waits")
    process.stdin.close()
    wait_for((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert f"stopped by {signal.SIGTERM}" in process.stdout.read()


def test_the_script_is_killed_with_its_client(started, tmp_path):
    process = started(forked_python(), "waits")
    process.stdin.close()
    wait_for((tmp_path / "ready").exists)
    process.kill()
    assert process.stderr.read() == "error\n"  # ends once no process holds the pipe
    assert process.wait(60) == -signal.SIGKILL


def test_only_known_variables_and_scripts_are_served_by_a_fork(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('torch' in sys.modules)")
    for command, environment, forked in (
        ([script], {}, True),
        ([script], {"OMP_NUM_THREADS": "2"}, False),
        ([script], {"HF_HUB_OFFLINE": "1"}, False),
        (["-c", script.read_text()], {}, False),
    ):
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        printed = subprocess.run([forked_python(), *command], env=variables, capture_output=True, text=True).stdout
        assert printed == f"{forked}\n"


def test_neighbouring_ranks_hash_strings_differently(tmp_path):
    """As processes of their own do, so that an order that depends on hashes does not pass unseen."""
    script = tmp_path / "script.py"
    script.write_text("print(hash('a string'))")
    hashes = []
    for rank in range(4):
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)}
        hashes.append(subprocess.run([forked_python(), script], env=variables, capture_output=True).stdout)
    assert hashes[0] == hashes[2] != hashes[1] == hashes[3]
