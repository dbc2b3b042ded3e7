"""Before they work together, the joined processes tell each other who they are and what they are about to do.

They meet at the store where they joined: a collective operation of processes that disagree may hang.
"""

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from data_prep.common.errors import BadInput

KEY = "roll call at the start"


@dataclass(frozen=True)
class Member:
    """A joined process.

    Attributes:
        rank: as it joined.
        ranks: how many it believes there are.
        host: its machine.
        device: the type of its device.
        gpu: the identifier of its GPU, empty without one.
        torch_version: that it runs.
    """

    rank: int
    ranks: int
    host: str
    device: str
    gpu: str
    torch_version: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def own_entry(rank: int, ranks: int, device: torch.device) -> Member:
    """This process."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    return Member(rank, ranks, socket.gethostname(), device.type, gpu, torch.__version__)


def call_roll(own: Member, store: dist.Store) -> list[Member]:
    """The entries of all ranks, in their order; every rank must take part.

    Raises:
        RuntimeError: a rank does not answer within the store's time-out.
    """
    store.set(f"{KEY}/{own.rank}", json.dumps(asdict(own)))
    return [Member(**json.loads(store.get(f"{KEY}/{rank}"))) for rank in range(own.ranks)]


def check_members(members: Sequence[Member], *, share_gpus: bool) -> None:
    """Refuse processes that cannot work together.

    Args:
        members: in the order of the ranks.
        share_gpus: whether several may compute on one GPU.

    Raises:
        BadInput: they are of different kinds, or two of them have the same GPU.
    """
    first = members[0]
    for rank, member in enumerate(members):
        if (member.rank, member.ranks) != (rank, len(members)):
            raise BadInput(
                f"{member} of {member.ranks} answered for rank {rank} of {len(members)}: RANK and WORLD_SIZE are not "
                "right on every machine; start with launch/local.sh, launch/machines.sh or torchrun"
            )
        if member.device != first.device:
            raise BadInput(
                f"{first} computes on {first.device}, but {member} on {member.device}; show each process a GPU, or set "
                "ACCELERATE_USE_CPU=true for all"
            )
        if member.torch_version != first.torch_version:
            raise BadInput(
                f"{first} runs torch {first.torch_version}, but {member} torch {member.torch_version}; use one "
                "environment on all machines"
            )
        sharing = [other for other in members[:rank] if other.gpu and other.gpu == member.gpu]
        if sharing and not share_gpus:
            raise BadInput(
                f"{sharing[0]} and {member} have the same GPU ({member.gpu}); start one process per GPU, or give each "
                "its own (srun --gpus-per-task=1, or CUDA_VISIBLE_DEVICES=$LOCAL_RANK)"
            )


def check_agreement(plans: Sequence[Mapping[str, str]], names: Sequence[str]) -> None:
    """Refuse processes that are about to do different things.

    Args:
        plans: of each rank, what it is about to do: the same keys in all.
        names: of the ranks, for the message.

    Raises:
        BadInput: naming the first difference.
    """
    for plan, name in zip(plans, names, strict=True):
        for key in {**plans[0], **plan}:
            ours, theirs = plans[0].get(key, "nothing"), plan.get(key, "nothing")
            if ours != theirs:
                raise BadInput(
                    f"the processes disagree on {key}: {ours} for {names[0]}, but {theirs} for {name}; start all with "
                    "the same command, on the same files"
                )
