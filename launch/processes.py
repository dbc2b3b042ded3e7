"""Start the processes of a command with torchrun's own launcher, for launch/local.sh and launch/machines.sh.

This sets what accelerate and torchrun leave to the user (threads, CPU or GPU, addresses, network devices), restarts all
processes when one has died, except after bad input or a request to stop, and passes on the command's exit code.
"""

import argparse
import contextlib
import gc
import glob
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

PROG = {"local": "launch/local.sh", "machines": "launch/machines.sh"}
DESCRIPTION = {
    "local": "Start a command on this machine: on all its GPUs, or on N CPU processes.",
    "machines": "Start a command on several machines: run the same line on each of them.",
}
BAD_INPUT, STOPPED = 2, 75  # exit codes of data_prep/common/errors.py, after which a restart would not help
# What tells a process that it is one of several, and where they meet; left over from another job, as in an interactive
# shell on a cluster, it does not hold for one that is alone.
RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    *("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
)
GPU_DEVICES = ("/dev/nvidia[0-9]*", "/dev/nvgpu*", "/dev/nvhost-gpu*", "/dev/dxg", "/dev/kfd")  # Jetson, WSL, ROCm too
TRUE = ("1", "true", "yes", "y", "on", "t")  # as accelerate reads it
RESUMABLE = ("finetune.py", "probe.py")
PORT = 29400
GRACE_SECONDS = 600  # to save after a signal; clusters kill earlier than that
GRACE_AFTER_DEATH_SECONDS = 5  # when another process has died; then there is nothing to save
HANG_SECONDS = 300  # without CPU time, after other processes have succeeded: no time-out would end it then


def gpu_count() -> int:
    """Number of GPUs that this run may use, without importing torch in the launcher."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return listed_gpus()
    devices = [device for device in visible.split(",") if device.strip() not in ("", "-1")]
    if devices and not has_gpu_driver() and not listed_gpus():
        return 0  # the variable is left over, or set on every node of a cluster
    return min(len(devices), 1) if visible.startswith("MIG-") else len(devices)  # CUDA shows a process one slice


def listed_gpus() -> int:
    """Number of GPUs of this machine, as nvidia-smi lists them."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def has_gpu_driver() -> bool:
    """Whether this machine has a GPU's device file; containers may lack nvidia-smi all the same."""
    return any(glob.glob(pattern) for pattern in GPU_DEVICES)


def environment(processes: int, gpus: int) -> dict[str, str]:
    """Environment variables for the processes; variables that are already set keep their values."""
    settings = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if not gpus:
        cores = len(os.sched_getaffinity(0))
        settings |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(max(cores // processes, 1))}
    return {name: os.environ.get(name, value) for name, value in settings.items()}


# ---------------------------------------------------------------------------------------------------- several machines


def network_options(host: str, machines: str, job: str, join_seconds: int) -> list[str]:
    """torchrun's options for machines that find each other at `host`, which is one of them.

    Args:
        host: its name or address, with or without a port.
        machines: "N", or "MIN:MAX" to continue when machines are lost.
        job: a name, the same on all machines.
        join_seconds: how long to wait for enough machines.
    """
    name, _, port = host.partition(":")
    address = local_address(name)
    set_network_device(address)
    is_host = socket.gethostbyname(name) in network_devices()
    configuration = f"is_host={int(is_host)},join_timeout={join_seconds},last_call_timeout=5"
    return [
        *("--nnodes", machines, "--rdzv-backend", "c10d", "--rdzv-id", job, "--local-addr", address),
        *("--rdzv-endpoint", f"{name}:{port or PORT}", "--rdzv-conf", configuration),
    ]


def local_address(host: str) -> str:
    """The address of this machine on the network that leads to `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, PORT))  # sends nothing
        return probe.getsockname()[0]


def network_devices() -> dict[str, str]:
    """The network device of each IPv4 address of this machine."""
    import psutil

    return {
        address.address: device
        for device, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    }


def set_network_device(address: str) -> None:
    """Tell gloo and NCCL which network device to use, unless the user has: they may guess a wrong one."""
    device = network_devices()[address]
    if device != "lo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", device)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={device}")


# ------------------------------------------------------------------------------------------------------------ launching


class HangDetector:
    """Finds processes that hang at the end of a run, when the others have succeeded and cannot notice."""

    def __init__(self):
        self._last_progress: dict[int, tuple[float, float]] = {}  # by process id: CPU time, and when that last changed

    def hanging(self, processes: list[subprocess.Popen]) -> list[subprocess.Popen]:
        """The processes that have used no CPU time for long, although another one has succeeded."""
        import psutil

        if not any(process.poll() == 0 for process in processes):
            self._last_progress.clear()
            return []
        hanging = []
        for process in processes:
            with contextlib.suppress(psutil.Error):
                cpu_seconds = sum(psutil.Process(process.pid).cpu_times()[:2])
                before, since = self._last_progress.get(process.pid, (-1.0, 0.0))
                if cpu_seconds != before:
                    self._last_progress[process.pid] = cpu_seconds, time.monotonic()
                elif process.poll() is None and time.monotonic() - since > HANG_SECONDS:
                    hanging.append(process)
        return hanging


def agent_class(exit_codes: list[int]) -> type:
    """torchrun's agent for the processes of this machine, which knows when a restart would not help.

    It relies on private parts of torchrun, see docs/private_apis.md.

    Args:
        exit_codes: the agent adds the exit codes of processes that it has shut down.
    """
    from torch.distributed.elastic.agent.server.api import WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    hang_detector = HangDetector()

    class Agent(LocalElasticAgent):
        grace_seconds = 0  # that processes have to end when they are told to; torchrun gives 30 always

        def _start_workers(self, worker_group):
            started = super()._start_workers(worker_group)
            # Where one has failed, torchrun closes the context itself, and a hanging process uses up its time.
            self.grace_seconds = GRACE_AFTER_DEATH_SECONDS
            close = self._pcontext.close
            self._pcontext.close = lambda death_sig=None, timeout=None: close(death_sig, self.grace_seconds)
            return started

        def _monitor_workers(self, worker_group):
            processes = [handler.proc for handler in self._pcontext.subprocess_handlers.values()]
            for process in hang_detector.hanging(processes):
                print(f"process {process.pid} hangs after others have ended; killing it", file=sys.stderr, flush=True)
                process.kill()
            result = super()._monitor_workers(worker_group)
            failed = {rank: failure.exitcode for rank, failure in result.failures.items()}
            if {BAD_INPUT, STOPPED} & set(failed.values()):
                self._remaining_restarts = 0
            elif result.is_failed() and self._remaining_restarts:
                rank, code = next(iter(failed.items()))
                max_restarts = self._worker_group.spec.max_restarts
                restart = max_restarts - self._remaining_restarts + 1
                print(
                    f"process {rank} ended with exit code {code}; restarting all ({restart} of {max_restarts})",
                    file=sys.stderr,
                    flush=True,
                )
            return result

        def _stop_workers(self, worker_group):
            # Healthy processes are stopped when a machine comes back; they save first.
            healthy = worker_group.state == WorkerState.HEALTHY
            self._end_processes(signal.SIGTERM, GRACE_SECONDS if healthy else GRACE_AFTER_DEATH_SECONDS)

        def _shutdown(self, death_sig=signal.SIGTERM, timeout=None):  # after a signal; torch 2.11 gives no time-out
            self._end_processes(death_sig, GRACE_SECONDS)

        def _end_processes(self, death_sig, grace_seconds):
            self.grace_seconds = grace_seconds
            super()._shutdown(death_sig)
            for process in getattr(self._pcontext, "subprocess_handlers", {}).values():
                exit_codes.append(process.proc.returncode)

    return Agent


def launch(torchrun_options: list[str], max_restarts: int, command: list[str]) -> int:
    """Run `command` with torchrun's options; returns the exit code of the first process that failed, else 0."""
    import torch.distributed.launcher.api as launcher_api
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    # Otherwise restarted processes share the store of those that died, and read their old addresses.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    logging.disable(logging.ERROR)  # torchrun's loggers, which have levels of their own, report each failure once more
    exit_codes: list[int] = []  # of processes that were shut down after a signal
    launcher_api.LocalElasticAgent = agent_class(exit_codes)

    def stop(signal_number, _frame):
        raise SignalException("", signal.Signals(signal_number))

    signal.signal(signal.SIGUSR1, stop)  # Slurm's warning; torchrun passes on the others that ask a job to end
    try:
        run(parse_args([*torchrun_options, "--max-restarts", str(max_restarts), *command]))
    except ChildFailedError as error:
        return _exit_code(error)
    except SignalException as error:
        if exit_codes and set(exit_codes) <= {STOPPED, 0}:
            return STOPPED
        resumes = os.path.basename(command[0]) in RESUMABLE
        print(f"interrupted; {command[0]} continues with --resume" if resumes else "interrupted", file=sys.stderr)
        return 128 + error.sigval
    except RendezvousError as error:
        print(f"error: the machines could not join ({error or type(error).__name__})", file=sys.stderr)
        return 1
    return 0


def _exit_code(error: "ChildFailedError") -> int:
    rank, failure = error.get_first_failure()
    exit_codes = {failure.exitcode for failure in error.failures.values()}
    for explained in (BAD_INPUT, STOPPED):  # the process has printed why
        if explained in exit_codes:
            return explained
    print(f"error: process {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


# -------------------------------------------------------------------------------------------------------- command lines


def command_parser(launcher: str) -> argparse.ArgumentParser:
    """The options of launch/local.sh or launch/machines.sh."""
    parser = argparse.ArgumentParser(prog=PROG[launcher], description=DESCRIPTION[launcher])
    parser.add_argument("-n", type=int, metavar="N", help="processes per machine; default: one per GPU, or one")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="R",
        help="maximum number of restarts after a process has died; default: 0",
    )
    if launcher == "machines":
        parser.add_argument(
            "--host", required=True, metavar="ADDRESS[:PORT]", help="name or address of the machine where all meet"
        )
        parser.add_argument(
            "--machines",
            required=True,
            metavar="N|MIN:MAX",
            help="number of machines; MIN:MAX continues when machines are lost, down to MIN",
        )
        parser.add_argument("--job", required=True, metavar="NAME", help="any name, the same on all machines")
        parser.add_argument(
            "--join-seconds",
            type=int,
            default=600,
            metavar="S",
            help="how long to wait for the other machines; default: 600",
        )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a command of train/ with its arguments")
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, processes: int, gpus: int) -> None:
    """Refuse options that cannot work, with exit code 2."""
    if not options.command:
        parser.error("name a command, e.g. train/finetune.py")
    if not os.path.isfile(options.command[0]):
        parser.error(f"{options.command[0]} does not exist; name a command such as train/finetune.py")
    shared = os.environ.get("SPIKETUNE_SHARE_GPUS", "").lower() in TRUE
    if processes < 1 or (gpus and processes > gpus and not shared):
        limit = f" and at most {gpus}, one per GPU" if gpus else ""
        parser.error(f"-n {processes}: give at least 1{limit}")
    if options.max_restarts < 0:
        parser.error(f"--max-restarts {options.max_restarts}: give 0 or more")
    if "host" in options:
        if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", options.machines):
            parser.error(f"--machines {options.machines}: give a number, or MIN:MAX such as 1:2")
        with contextlib.suppress(OSError):
            socket.gethostbyname(options.host.partition(":")[0])
            return
        parser.error(f"--host {options.host}: this name cannot be resolved")


def main() -> int:
    """Parse, set the environment, launch."""
    launcher = sys.argv[1]
    parser = command_parser(launcher)
    options = parser.parse_args(sys.argv[2:])
    gpus = 0 if os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE else gpu_count()
    processes = options.n if options.n is not None else max(gpus, 1)
    check(parser, options, processes, gpus)
    os.environ |= environment(processes, gpus)
    per_machine = ["--nproc-per-node", str(processes)]
    if launcher == "machines":
        os.environ.setdefault("SPIKETUNE_JOB", options.job)
        network = network_options(options.host, options.machines, options.job, options.join_seconds)
        return launch([*network, *per_machine], options.max_restarts, options.command)
    if options.max_restarts:
        os.environ.setdefault("SPIKETUNE_JOB", str(uuid.uuid4()))
    if processes == 1 and not options.max_restarts:
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        os.execv(sys.executable, [sys.executable, *options.command])
    return launch(["--standalone", *per_machine], options.max_restarts, options.command)


if __name__ == "__main__":
    code = main()
    gc.freeze()  # else Python looks through all of torch's objects before it ends, which takes more than half a second
    sys.exit(code)
