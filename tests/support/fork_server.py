"""A warm process that runs scripts in forks of itself, until its standard input ends: `python fork_server.py LISTENER`.

`forked_python.py` says why, `fork_client.py` is the other end of the socket. LISTENER is a file descriptor.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from fork_client import REFUSED

# What takes seconds to import. Not pyarrow: it starts a thread, and only the thread that forks lives on in a fork.
LIBRARIES = (
    *("torch", "torch.distributed.run", "torch.utils.tensorboard", "timm", "timm.optim"),
    *("accelerate", "deepspeed", "transformers", "scipy.stats", "matplotlib.backends.backend_agg"),
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every ZeRO imports it, and it torch's compiler
)
ROOT = Path(__file__).resolve().parents[2]
# What the commands that tests start import of this repository. It keeps no state that depends on who imports it.
OWN = (
    *("train.finetune", "train.finetuning.setup.assembly", "train.finetuning.setup.resume"),
    *("train.probe", "train.probing.probe_run", "train.evaluate", "train.evaluation.steps"),
)
# Environment variables that no library reads while it is imported. A change of any other gives a fresh interpreter.
READ_LATER = {
    *("PYTHON", "PYTHON_EXEC", "PYTHONPATH", "PWD", "OLDPWD", "SHLVL", "_", "XDG_CACHE_HOME", "COLUMNS", "LINES"),
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TOKENIZERS_PARALLELISM"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "KMP_AFFINITY", "KMP_BLOCKTIME"),
    # Libraries set these in whatever process imports them, also in that of the tests.
    "HDF5_PLUGIN_PATH",
    *("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK"),
}
READ_LATER_PREFIXES = ("PYTEST_", "SPIKETUNE_", "TORCHELASTIC_", "ACCELERATE_")
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
CLONE_NEWNET = 0x40000000  # from linux/sched.h


@dataclass(frozen=True)
class Request:
    """A script or a module to run.

    Attributes:
        words: its path, or -m and its name; and its arguments.
        unbuffered: as `python -u` has it.
        environment: of the process.
        folder: the working directory.
        streams: file descriptors to become standard input, output and error.
        client: the process that asks.
        python: the interpreter that it stands for, with which the script starts others.
    """

    words: list[str]
    unbuffered: bool
    environment: dict[str, str]
    folder: str
    streams: list[int]
    client: int
    python: str


@dataclass(frozen=True)
class Fork:
    """A running script.

    Attributes:
        process: its id.
        end: a file descriptor that is readable when the process has ended.
        client: the connection to whoever waits for it.
    """

    process: int
    end: int
    client: socket.socket

    def signal(self, number: int) -> None:
        """Send a signal to the script and its own processes, as launchers do."""
        try:
            os.killpg(self.process, number)
        except ProcessLookupError:  # it has not made its group yet
            os.kill(self.process, number)


class ForkServer:
    """Forks once per request and reports how each fork ended.

    It stays single-threaded and runs no script itself, so each fork starts in the state in which imports leave a
    process.

    Args:
        listener: accepts clients.
        environment: variables as they were before the libraries were imported.
        set_by_imports: variables that the libraries have set, which a fork hands to the processes that it starts.
    """

    def __init__(self, listener: socket.socket, environment: dict[str, str], set_by_imports: dict[str, str]):
        self._listener = listener
        self._environment = environment
        self._set_by_imports = set_by_imports
        self._selector = selectors.DefaultSelector()
        self._forks: list[Fork] = []

    def serve(self) -> Request | None:
        """Serve until standard input ends. In a fork, returns the request to run; in the server itself, None."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == 0:
                    for fork in self._forks:
                        fork.signal(signal.SIGKILL)
                    return None
                if key.fileobj is self._listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif key.fileobj is key.data.client:
                    self._pass_on_signal(key.data)
                else:
                    self._report_end(key.data)

    def _accept(self) -> Request | None:
        """Fork for the next client; returns its request in the fork, None in the server."""
        client, _ = self._listener.accept()
        message, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
        if not message:  # killed before it could ask
            client.close()
            return None
        request = Request(**json.loads(message), streams=streams)
        if not self._can_serve(request):
            with contextlib.suppress(OSError):  # the client was killed
                client.send(REFUSED)
        else:
            process = os.fork()
            if process == 0:
                client.close()
                self._close()
                return request
            fork = Fork(process, os.pidfd_open(process), client)
            self._forks.append(fork)
            self._selector.register(client, selectors.EVENT_READ, fork)
            self._selector.register(fork.end, selectors.EVENT_READ, fork)
        for stream in streams:
            os.close(stream)
        return None

    def _can_serve(self, request: Request) -> bool:
        """Whether nothing that libraries read while they are imported differs from this process."""
        differences = self._environment.items() ^ request.environment.items()
        changed = {name for name, _ in differences - self._set_by_imports.items()}
        return all(name in READ_LATER or name.startswith(READ_LATER_PREFIXES) for name in changed)

    def _pass_on_signal(self, fork: Fork) -> None:
        """Signal a fork as its client asks, or kill it when the client has been killed."""
        if fork not in self._forks:  # both ended at once, and its end came first
            return
        try:
            message = fork.client.recv(100)
        except OSError:
            message = b""
        if not message:
            self._selector.unregister(fork.client)
        fork.signal(int(message or signal.SIGKILL))

    def _report_end(self, fork: Fork) -> None:
        """Tell the client of a fork how it ended."""
        _, status = os.waitpid(fork.process, 0)
        with contextlib.suppress(OSError):  # the client was killed
            fork.client.send(str(status).encode())
        with contextlib.suppress(KeyError):
            self._selector.unregister(fork.client)
        self._selector.unregister(fork.end)
        self._forks.remove(fork)
        fork.client.close()
        os.close(fork.end)

    def _close(self) -> None:
        """Close, in a fork, what belongs to the server."""
        self._selector.close()
        self._listener.close()
        for fork in self._forks:
            fork.client.close()
            os.close(fork.end)


def become(request: Request, environment: dict[str, str], set_by_imports: dict[str, str]) -> None:
    """Turn this fork into the process that was asked for, with its own session.

    It gets the streams, file size limit, network, folder, variables and search path of the request.

    Args:
        request: of the client.
        environment: of the server when it started.
        set_by_imports: variables that the libraries have set since.
    """
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # ends with the server
    for number, stream in enumerate(request.streams):
        os.dup2(stream, number)
        os.close(stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.prlimit(request.client, resource.RLIMIT_FSIZE))
    enter_network(request.client)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(set_by_imports | request.environment)
    before, now = (variables.get("PYTHONPATH", "") for variables in (environment, request.environment))
    inherited = [path for path in before.split(os.pathsep) if path]
    sys.path[: 1 + len(inherited)] = [
        request.folder if request.words[0] == "-m" else str(Path(request.words[0]).resolve().parent),
        *(os.path.abspath(path) for path in now.split(os.pathsep) if path),
    ]
    sys.argv = request.words
    sys.executable = request.python
    open_streams(request.unbuffered or bool(request.environment.get("PYTHONUNBUFFERED")))
    import numpy

    numpy.random.seed()  # otherwise every fork draws the same


def enter_network(process: int) -> None:
    """Enter the network namespace of a process: tests that simulate machines give each its own."""
    theirs = f"/proc/{process}/ns/net"
    if os.readlink(theirs) == os.readlink("/proc/self/ns/net"):
        return
    with open(theirs, "rb") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {theirs}")


def open_streams(unbuffered: bool) -> None:
    """Open Python's standard streams as a new interpreter does."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for number, name in enumerate(("stdout", "stderr"), start=1):
        raw = io.FileIO(number, "w", closefd=False)
        stream = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[type-var]
            encoding=getattr(sys, name).encoding,
            errors=getattr(sys, name).errors,
            line_buffering=number == 2 or raw.isatty(),
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run(words: list[str]) -> NoReturn:
    """Run a script or a module and end the process as the interpreter does, short of what takes it a second.

    That is the removal of the imported libraries from memory. What the script has made is removed.
    """
    code = 1
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            run_script(words[0])
        code = 0
    except SystemExit as end:
        code = exit_code(end)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    del sys.modules["__main__"]
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_script(path: str) -> None:
    """Run a Python file as `__main__`."""
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = path
    exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)


def exit_code(end: SystemExit) -> int:
    """The exit code that `sys.exit` has asked for."""
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def main() -> None:
    """Import the libraries, serve; in a fork, run the script."""
    environment = dict(os.environ)
    os.environ["DS_ACCELERATOR"] = "cpu"  # as train/distributed/accelerator.py sets it before it imports deepspeed
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):  # optional ones
            importlib.import_module(library)
    sys.path.insert(0, str(ROOT))
    for module in OWN:
        importlib.import_module(module)
    sys.path.remove(str(ROOT))
    del os.environ["DS_ACCELERATOR"]
    set_by_imports = dict(os.environ.items() - environment.items())
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread; take it out of LIBRARIES"
    gc.collect()
    gc.freeze()  # forks need not look through the libraries to find what they have made themselves
    request = ForkServer(socket.socket(fileno=int(sys.argv[1])), environment, set_by_imports).serve()
    if request is None:
        os._exit(0)
    become(request, environment, set_by_imports)
    run(request.words)


if __name__ == "__main__":
    main()
