"""The engine of launch/local.sh: N processes of a command on this machine, by torchrun's own launcher.

It sets what accelerate and torchrun leave to the user (threads, CPU or GPU), and passes the command's exit code on.
"""

import argparse
import logging
import os
import subprocess
import sys


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


def launch(processes: int, command: list[str]) -> int:
    """Run `command` in `processes` processes; returns the exit code of the first that failed, else 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # it reports every failure a second time
    try:
        run(parse_args(["--standalone", "--nproc-per-node", str(processes), *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        codes = {failed.exitcode for failed in error.failures.values()}
        if 2 in codes:  # bad input: the process has said it in a sentence
            return 2
        print(f"error: process {rank} of {processes} ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        print("interrupted; train/finetune.py goes on with --resume", file=sys.stderr)
        return 128 + error.sigval
    return 0


def main() -> int:
    """Parse, set the environment, launch."""
    parser = argparse.ArgumentParser(prog="launch/local.sh", description="Start a command on this machine.")
    parser.add_argument("-n", type=int, metavar="N", help="number of processes; by default one per GPU, else one")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a command of train/ with its arguments")
    options = parser.parse_args()
    gpus = 0 if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" else gpu_count()
    processes = options.n if options.n is not None else max(gpus, 1)
    if not options.command:
        parser.error("name a command, e.g. train/finetune.py")
    if not os.path.isfile(options.command[0]):
        parser.error(f"{options.command[0]} is no file; name a command such as train/finetune.py")
    if processes < 1 or (gpus and processes > gpus):
        parser.error(f"-n {processes}: give at least 1{f' and at most {gpus}, one per GPU' if gpus else ''}")
    os.environ |= environment(processes, gpus)
    if processes == 1:
        os.execv(sys.executable, [sys.executable, *options.command])
    return launch(processes, options.command)


if __name__ == "__main__":
    sys.exit(main())
