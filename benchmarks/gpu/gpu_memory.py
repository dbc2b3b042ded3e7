"""The most memory that a process has taken of its device."""

from dataclasses import dataclass

import torch
from synthetic import peak_bytes


@dataclass(frozen=True)
class Peak:
    """Peaks since the last `start_peak`, in bytes.

    Attributes:
        allocated: by tensors; on a CPU the largest resident set of the process.
        reserved: by torch, which keeps what tensors have freed; None on a CPU.
        device: taken of the whole GPU now, by CUDA and other processes too: torch gives nothing back in between, so
            that it is the peak of the GPU if this process is alone; None on a CPU.
    """

    allocated: int
    reserved: int | None = None
    device: int | None = None


def start_peak(device: torch.device) -> None:
    """Forget the peaks so far, and give back what torch keeps for tensors to come."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_of(device: torch.device) -> Peak:
    """The peaks since `start_peak`."""
    if device.type != "cuda":
        return Peak(peak_bytes(device))
    free, total = torch.cuda.mem_get_info(device)
    return Peak(peak_bytes(device), torch.cuda.max_memory_reserved(device), total - free)
