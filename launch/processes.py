"""The engine of launch/local.sh and launch/machines.sh: processes of a command, by torchrun's own launcher.

It sets what accelerate and torchrun leave to the user (threads, CPU or GPU, addresses, network devices), starts all
processes anew when one has died, but not for bad input or a wish to stop, and passes the command's exit code on.
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid

PROG = {"local": "launch/local.sh", "machines": "launch/machines.sh"}
BAD_INPUT, STOPPED = 2, 75  # exit codes of a command, see data_prep/common/errors.py, after which no restart would help
PORT = 29400
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # passed on to the processes
GRACE_SECONDS = 600  # after a signal, to save: the cluster's own patience ends earlier
GRACE_AFTER_DEATH_SECONDS = 5  # for those that are left behind by one that died, and have nothing to save
STANDSTILL_SECONDS = 300  # without any work of the CPU, when others are done: then nobody waits for it, or notices


def gpu_count() -> int:
    """GPUs that this run may use, without importing torch in the launcher."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def environment(processes: int, gpus: int) -> dict[str, str]:
    """What each process finds in its environment; settings that are there already are kept."""
    settings = {"TOKENIZERS_PARALLELISM": "false"}
    if not gpus:
        cores = len(os.sched_getaffinity(0))
        settings |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(max(cores // processes, 1))}
    else:
        settings |= {"OMP_NUM_THREADS": "1"}
    return {name: os.environ.get(name, value) for name, value in settings.items()}


# ---------------------------------------------------------------------------------------------------- several machines


def network_options(host: str, machines: str, job: str, join_seconds: int) -> list[str]:
    """torchrun's options for machines that find each other at `host`, which is one of them.

    Args:
        host: its name or address, with or without a port.
        machines: "N", or "MIN:MAX" to go on with fewer.
        job: a name, the same on all.
        join_seconds: how long to wait for enough machines.
    """
    name, _, port = host.partition(":")
    own = own_address(name)
    set_network_device(own)
    is_host = socket.gethostbyname(name) in addresses()
    configuration = f"is_host={int(is_host)},join_timeout={join_seconds},last_call_timeout=5"
    return [
        *("--nnodes", machines, "--rdzv-backend", "c10d", "--rdzv-id", job, "--local-addr", own),
        *("--rdzv-endpoint", f"{name}:{port or PORT}", "--rdzv-conf", configuration),
    ]


def own_address(host: str) -> str:
    """The address of this machine on the network that leads to `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, PORT))  # sends nothing
        return probe.getsockname()[0]


def addresses() -> dict[str, str]:
    """The network device of each IPv4 address of this machine."""
    import psutil

    devices = psutil.net_if_addrs().items()
    return {one.address: device for device, found in devices for one in found if one.family == socket.AF_INET}


def set_network_device(address: str) -> None:
    """Tell gloo and NCCL which network device to use, unless the user has: they may guess one that leads nowhere."""
    device = addresses()[address]
    if device != "lo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", device)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={device}")


# ------------------------------------------------------------------------------------------------------------ launching


class Standstill:
    """Finds processes that hang at their end, when others have ended and none is left to wait for them in vain."""

    def __init__(self):
        self._worked: dict[int, tuple[float, float]] = {}

    def found(self, processes: list[subprocess.Popen]) -> list[subprocess.Popen]:
        """Those that have not worked for long, though another of them has ended well."""
        import psutil

        if not any(process.poll() == 0 for process in processes):
            self._worked.clear()
            return []
        standing = []
        for process in processes:
            with contextlib.suppress(psutil.Error):
                work = sum(psutil.Process(process.pid).cpu_times()[:2])
                before, since = self._worked.get(process.pid, (-1.0, 0.0))
                if work != before:
                    self._worked[process.pid] = work, time.monotonic()
                elif process.poll() is None and time.monotonic() - since > STANDSTILL_SECONDS:
                    standing.append(process)
        return standing


def careful_agent(exit_codes: list[int]) -> type:
    """torchrun's agent, which starts the processes of this machine again, with a better idea of when to.

    Args:
        exit_codes: those of the processes that ended after a signal are added here.
    """
    from torch.distributed.elastic.agent.server.api import WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    standstill = Standstill()

    class CarefulAgent(LocalElasticAgent):
        def _start_workers(self, worker_group):
            started = super()._start_workers(worker_group)
            # When one has failed, torchrun gives the others 30 seconds, which one that hangs would use up.
            close = self._pcontext.close
            self._pcontext.close = lambda death_sig=None, timeout=GRACE_AFTER_DEATH_SECONDS: close(death_sig, timeout)
            return started

        def _monitor_workers(self, worker_group):
            for process in standstill.found([handler.proc for handler in self._pcontext.subprocess_handlers.values()]):
                print(f"process {process.pid} hangs while others are done; ending it", file=sys.stderr, flush=True)
                process.kill()
            result = super()._monitor_workers(worker_group)
            failed = {rank: failure.exitcode for rank, failure in result.failures.items()}
            if {BAD_INPUT, STOPPED} & set(failed.values()):
                self._remaining_restarts = 0
            elif result.is_failed() and self._remaining_restarts:
                rank, code = next(iter(failed.items()))
                left = self._worker_group.spec.max_restarts - self._remaining_restarts + 1
                print(
                    f"process {rank} ended with exit code {code}; starting again "
                    f"({left} of {self._worker_group.spec.max_restarts})",
                    file=sys.stderr,
                    flush=True,
                )
            return result

        def _stop_workers(self, worker_group):
            # Healthy ones are stopped when a machine comes back, and save.
            healthy = worker_group.state == WorkerState.HEALTHY
            self._shutdown(timeout=GRACE_SECONDS if healthy else GRACE_AFTER_DEATH_SECONDS)

        def _shutdown(self, death_sig=signal.SIGTERM, timeout=30):
            super()._shutdown(death_sig, timeout)
            for process in getattr(self._pcontext, "subprocess_handlers", {}).values():
                exit_codes.append(process.proc.returncode)

    return CarefulAgent


def launch(torchrun_options: list[str], restarts: int, command: list[str]) -> int:
    """Run `command` with torchrun's options; returns the exit code of the first process that failed, else 0."""
    import torch.distributed.launcher.api as launcher
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    # Otherwise those that are started again meet in the store of those that died, and find addresses of the dead there.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # it reports every failure a second time
    after_signal: list[int] = []
    launcher.LocalElasticAgent = careful_agent(after_signal)
    options = [*torchrun_options, "--max-restarts", str(restarts), "--signals-to-handle", SIGNALS]
    try:
        run(parse_args([*options, "--shutdown-timeout", str(GRACE_SECONDS), *command]))
    except ChildFailedError as error:
        return _failed(error)
    except SignalException as error:
        if after_signal and set(after_signal) <= {STOPPED, 0}:
            return STOPPED
        print("interrupted; train/finetune.py goes on with --resume", file=sys.stderr)
        return 128 + error.sigval
    except RendezvousError as error:
        print(f"error: the machines did not come together ({error or type(error).__name__})", file=sys.stderr)
        return 1
    return 0


def _failed(error) -> int:
    rank, failure = error.get_first_failure()
    codes = {failed.exitcode for failed in error.failures.values()}
    for known in (BAD_INPUT, STOPPED):  # the process has said it in a sentence
        if known in codes:
            return known
    print(f"error: process {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


# -------------------------------------------------------------------------------------------------------- command lines


def parser_of(where: str) -> argparse.ArgumentParser:
    """The options of launch/local.sh or launch/machines.sh."""
    parser = argparse.ArgumentParser(prog=PROG[where], description="Start a command on one machine or on several.")
    parser.add_argument("-n", type=int, metavar="N", help="processes per machine; by default one per GPU, else one")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="R", help="how often to start anew when a process has died"
    )
    if where == "machines":
        parser.add_argument("--host", required=True, metavar="ADDRESS[:PORT]", help="the machine where all meet")
        parser.add_argument(
            "--machines", required=True, metavar="N|MIN:MAX", help="how many; MIN:MAX to go on with fewer"
        )
        parser.add_argument(
            "--job", required=True, metavar="NAME", help="a name of your choice, the same on all machines"
        )
        parser.add_argument(
            "--join-seconds", type=int, default=600, metavar="S", help="how long to wait for enough machines"
        )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a command of train/ with its arguments")
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, processes: int, gpus: int) -> None:
    """Refuse what cannot be started; exit code 2."""
    if not options.command:
        parser.error("name a command, e.g. train/finetune.py")
    if not os.path.isfile(options.command[0]):
        parser.error(f"{options.command[0]} is no file; name a command such as train/finetune.py")
    if processes < 1 or (gpus and processes > gpus):
        parser.error(f"-n {processes}: give at least 1{f' and at most {gpus}, one per GPU' if gpus else ''}")
    if options.max_restarts < 0:
        parser.error(f"--max-restarts {options.max_restarts}: give 0 or more")
    if "host" in options:
        if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", options.machines):
            parser.error(f"--machines {options.machines}: give a number, or MIN:MAX such as 1:2")
        with contextlib.suppress(OSError):
            socket.gethostbyname(options.host.partition(":")[0])
            return
        parser.error(f"--host {options.host}: there is no machine of that name")


def main() -> int:
    """Parse, set the environment, launch."""
    where = sys.argv[1]
    parser = parser_of(where)
    options = parser.parse_args(sys.argv[2:])
    gpus = 0 if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" else gpu_count()
    processes = options.n if options.n is not None else max(gpus, 1)
    check(parser, options, processes, gpus)
    os.environ |= environment(processes, gpus)
    per_node = ["--nproc-per-node", str(processes)]
    if where == "machines":
        os.environ.setdefault("SPIKETUNE_JOB", options.job)
        network = network_options(options.host, options.machines, options.job, options.join_seconds)
        return launch([*network, *per_node], options.max_restarts, options.command)
    if options.max_restarts:
        os.environ.setdefault("SPIKETUNE_JOB", str(uuid.uuid4()))
    if processes == 1 and not options.max_restarts:
        os.execv(sys.executable, [sys.executable, *options.command])
    return launch(["--standalone", *per_node], options.max_restarts, options.command)


if __name__ == "__main__":
    sys.exit(main())
