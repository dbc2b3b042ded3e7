"""The interpreter with which tests start the commands of train/: one that has imported its libraries already.

A process needs 5 seconds of CPU time to import torch, timm, accelerate and deepspeed, half a second to import this
repository's commands, and the tests start hundreds of processes. So pytest keeps two fork servers (`fork_server.py`),
which have imported all this; where it runs tests in several processes, they share these servers. Tests start
`fork_client.py` where users start Python: the command, its environment, its streams, signals and exit code are the
same, and each runs in a process of its own, but that process is a fork of the server. What it starts in turn with its
`sys.executable` is a fork as well. A test gets fresh interpreters all the same where that could make a difference: for
other environment variables than those known to be read late, for `python -c` and, but for launchers, for `python -m`.
`launch/test.sh --slow` has fresh interpreters everywhere, which shows that nothing depends on the shortcut; so do
machines with GPUs, whose driver forbids forks.
"""

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from fork_client import SERVERS, server_path

HERE = Path(__file__).parent
SHARED = "SPIKETUNE_FORKED_PYTHON"  # environment variable: the interpreter that all processes of pytest share
FRESH = "SPIKETUNE_SLOW" in os.environ or sys.platform != "linux" or shutil.which("nvidia-smi") is not None


def share_forked_python() -> None:
    """Start the servers for all processes of pytest: to be called in their parent before it starts them."""
    if not FRESH:
        os.environ[SHARED] = forked_python()


@cache
def forked_python() -> str:
    """Path of the interpreter; the first call starts the servers unless pytest's processes share some."""
    if FRESH:
        return sys.executable
    if SHARED in os.environ:
        return os.environ[SHARED]
    folder = Path(tempfile.mkdtemp(prefix="spiketune-forks-"))
    client = folder / "python"
    client.write_text(f"#!{sys.executable} -IS\n{(HERE / 'fork_client.py').read_text()}")
    client.chmod(0o755)
    # DeepSpeed builds with the one beside Python.
    (folder / "ninja").symlink_to(Path(sys.executable).with_name("ninja"))
    servers = [start_server(server_path(folder, number)) for number in range(SERVERS)]
    atexit.register(stop, folder, servers)
    return str(client)


def start_server(path: str) -> subprocess.Popen:
    """Start a fork server behind a socket. It ends when its standard input does, also when this process is killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        return subprocess.Popen(
            [sys.executable, HERE / "fork_server.py", str(listener.fileno())],
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            pass_fds=(listener.fileno(),),
            start_new_session=True,  # Ctrl-C is for pytest
        )


def stop(folder: Path, servers: list[subprocess.Popen]) -> None:
    """End the servers and whatever they still run."""
    for server in servers:
        server.stdin.close()
        server.wait(timeout=60)
    shutil.rmtree(folder)
