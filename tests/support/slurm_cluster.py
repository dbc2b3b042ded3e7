"""Run a Slurm cluster of two nodes on this machine, each a network namespace with its own slurmd."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT
from machines import Machine, machines, reason_against

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}({controller})
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=120
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def reason_against_slurm() -> str | None:
    """Why a cluster cannot run here, or None."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
    if missing:
        return f"there is no {missing[0]} (launch/test.sh --slurm installs it)"
    return reason_against()


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        folder: its configuration and logs.
        nodes: its machines; commands run on the first.
    """

    folder: Path
    nodes: list[Machine]

    def run(self, *command, **environment: str) -> str:
        """Run a command on the first node that must succeed; returns its standard output."""
        settings = {"SLURM_CONF": str(self.folder / "slurm.conf"), **environment}
        process = self.nodes[0].start(*command, **settings)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
        return out

    def submit(self, *words, **environment: str) -> str:
        """Submit a job with sbatch; returns its number."""
        return self.run("sbatch", "--parsable", f"--chdir={ROOT}", *words, **environment).strip().split(";")[0]

    def state(self, job: str) -> str:
        """State of a job: RUNNING, COMPLETED ..."""
        description = self.run("scontrol", "show", "job", job, "--oneliner")
        return next(word.partition("=")[2] for word in description.split() if word.startswith("JobState="))

    def wait_for(self, job: str, *states: str, seconds: float = 240) -> str:
        """Wait until the job is in one of the states; returns it."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is still {state}, not {states}"
            time.sleep(0.5)
        return state


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Run a cluster, which is shut down at the end."""
    with machines(2) as nodes:
        _configure(folder, nodes)
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        started = [_munge(folder)]
        try:
            started.append(nodes[0].start("slurmctld", "-D", "-c", SLURM_CONF=environment["SLURM_CONF"]))
            for number, node in enumerate(nodes):
                started.append(node.start("slurmd", "-D", "-N", f"n{number}", SLURM_CONF=environment["SLURM_CONF"]))
            running = Cluster(folder, nodes)
            _wait_until_idle(running)
            yield running
        finally:
            for process in started:
                process.kill()


def _configure(folder: Path, nodes: list[Machine]) -> None:
    host = os.uname().nodename
    (folder / "state").mkdir()
    lines = [
        f"NodeName=n{number} NodeHostname={host} NodeAddr={node.address} Port={17001 + number} CPUs={os.cpu_count()}"
        for number, node in enumerate(nodes)
    ]
    content = CONFIGURATION.format(host=host, controller=nodes[0].address, folder=folder, nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(content)


def _munge(folder: Path) -> subprocess.Popen:
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    files = {name: folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
    options = ["--foreground", "--force", f"--key-file={folder / 'munge.key'}"]
    options += [f"--{'socket' if name == 'socket' else f'{name}-file'}={path}" for name, path in files.items()]
    process = subprocess.Popen(["munged", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not files["socket"].exists():
        assert process.poll() is None, "munged ended at once"
        assert time.monotonic() < deadline, "munged did not start"
        time.sleep(0.1)
    return process


def _wait_until_idle(running: Cluster) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if running.run("sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"]:
                return
        except AssertionError:  # the controller is not there yet
            pass
        time.sleep(0.5)
    raise AssertionError(f"the cluster did not come up; see {running.folder}")
