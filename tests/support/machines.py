"""Simulate machines by network namespaces joined by a bridge, each with its own address."""

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from helpers import start_group

PACKET = 68 * 1024  # bytes that the kernel hands to a device at once, at most, and their headers


@dataclass
class Machine:
    """A simulated machine.

    Attributes:
        name: of the namespace.
        address: of its only network device.
        hub: namespace of the bridge.
        port: of the bridge that it is connected to.
    """

    name: str
    address: str
    hub: str
    port: str

    def start(self, *command, **environment: str) -> subprocess.Popen:
        """Start a command on this machine, in its own process group."""
        # Not `ip netns exec`, which hides the control groups that Slurm looks for.
        words = ["nsenter", f"--net=/var/run/netns/{self.name}", *command]
        return start_group(words, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})

    def pids(self) -> list[int]:
        """The processes on this machine."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def limit(self, megabits: float) -> None:
        """Limit what this machine sends, in Mbit/s.

        The bucket holds what is sent in 2 ms, and at least a packet; 64 MB may queue, so that nothing is lost.
        """
        burst = max(int(megabits * 1e6 / 8 * 0.002), PACKET)
        shape = ["rate", f"{megabits}mbit", "burst", str(burst), "limit", str(64 * 2**20)]
        words = ["tc", "-n", self.name, "qdisc", "replace", "dev", "eth0", "root", "tbf", *shape]
        subprocess.run(words, capture_output=True, text=True, check=True)

    def bytes_sent(self) -> int:
        """Bytes that its network device has sent so far."""
        return int(json.loads(_ip("-n", self.name, "-s", "-j", "link", "show", "eth0"))[0]["stats64"]["tx"]["bytes"])

    def cut(self) -> None:
        """Disconnect it from the bridge."""
        _ip("-n", self.hub, "link", "set", self.port, "down")


def reason_against() -> str | None:
    """Why machines cannot be simulated here, or None."""
    if not shutil.which("ip"):
        return "there is no `ip` command (package iproute2)"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return "this kernel or user may not make network namespaces"
    return None


@contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """`count` machines in their own network; their processes are killed at the end."""
    tag = uuid.uuid4().hex[:6]
    hub, started = f"hub{tag}", []
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for number in range(count):
            started.append(_machine(hub, f"m{number}{tag}", f"10.77.0.{number + 1}", number))
        yield started
    finally:
        for name in [machine.name for machine in started] + [hub]:
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                subprocess.run(["kill", "-KILL", pid], capture_output=True)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _machine(hub: str, name: str, address: str, number: int) -> Machine:
    _ip("netns", "add", name)
    _ip("-n", hub, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("-n", hub, "link", "set", f"port{number}", "master", "bridge", "up")
    _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
    for device in ("eth0", "lo"):
        _ip("-n", name, "link", "set", device, "up")
    return Machine(name, address, hub, f"port{number}")


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
    return done.stdout
