"""Stands in for the Python interpreter in tests: `CLIENT SCRIPT.py ...` runs the script in a fork of a warm process.

`CLIENT -m MODULE ...` does so for launchers.

`forked_python.py` says why. A client asks a fork server to run the script with its own words, environment, folder and
standard streams, passes on signals and ends as the script ends. It becomes a real interpreter when the server refuses
or is gone, and for anything that is not a script. It imports little, since it must start within milliseconds.
"""

import json
import os
import signal
import socket
import sys
from pathlib import PurePath

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
SERVERS = 2
REFUSED = b"refused"
FORKED_MODULES = {"accelerate.commands.launch"}
SERVER_ENDED = 70  # exit code: EX_SOFTWARE of sysexits.h


def server_path(folder: PurePath, number: int) -> str:
    """The socket of a fork server."""
    return str(folder / f"server_{number}")


def main() -> None:
    """Run the script in a fork, or become a real interpreter."""
    words = sys.argv[1:]
    unbuffered = words[:1] == ["-u"]
    command = words[unbuffered:]
    if is_forked(command):
        run_forked(command, unbuffered)
    os.execv(sys.executable, [sys.executable, *words])


def is_forked(command: list[str]) -> bool:
    """Whether a command can run in a fork: a script, though no library's own, which may inherit file descriptors.

    What a forked launcher starts is no descendant of the client's, which matters to some tests.
    """
    if command[:1] == ["-m"]:
        return command[1] in FORKED_MODULES and "SPIKETUNE_FRESH_LAUNCHERS" not in os.environ
    return bool(command) and command[0].endswith(".py") and "site-packages" not in PurePath(command[0]).parts


def run_forked(words: list[str], unbuffered: bool) -> None:
    """Run a command in a fork and end as it does; returns if there is no server or it refuses."""
    # Neighbouring ranks are forks of different processes, since each process has its own hashes of strings.
    server = int(os.environ.get("LOCAL_RANK", "0")) % SERVERS
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = {"words": words, "unbuffered": unbuffered, "environment": dict(os.environ), "folder": os.getcwd()}
    request |= {"client": os.getpid(), "python": sys.argv[0]}
    try:
        connection.connect(server_path(PurePath(sys.argv[0]).parent, server))
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    except OSError:
        return
    for number in FORWARDED:
        signal.signal(number, lambda received, _: connection.send(str(received).encode()))
    answer = connection.recv(100)
    if not answer:
        print(f"the fork server ended while it ran {' '.join(words)}", file=sys.stderr)
        sys.exit(SERVER_ENDED)
    if answer != REFUSED:
        end_as(int(answer))
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)


def end_as(status: int) -> None:
    """End with the exit code, or by the signal, of a wait status."""
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in FORWARDED:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
