"""Which process of a run this one is, by the variables that its launcher has set; nothing else reads these."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
RESTART = "start with launch/local.sh or torchrun, which set them all"


class Contradiction(ValueError):
    """The variables contradict each other. The message names them and says what to do."""


@dataclass(frozen=True)
class ProcessIdentity:
    """A process among those that were started together, before they are joined.

    Attributes:
        rank: its number among all of them.
        world_size: how many they are.
        local_rank: its number among those on its machine.
        ranks_on_machine: how many these are.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    ranks_on_machine: int = 1


def identify(environment: Mapping[str, str]) -> ProcessIdentity:
    """The process that these environment variables describe: complete and consistent, or none of several.

    Raises:
        Contradiction: they are incomplete, or contradict each other.
    """
    numbers = {name: _number(name, environment) for name in RANK_VARIABLES if name in environment}
    if not numbers:
        return ProcessIdentity()
    _check_complete(numbers, environment)
    identity = ProcessIdentity(
        rank=numbers.get("RANK", 0),
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers.get("LOCAL_RANK", 0),
        ranks_on_machine=numbers.get("LOCAL_WORLD_SIZE", 1),
    )
    _check_consistent(identity, numbers)
    return identity


@cache
def own_identity() -> ProcessIdentity:
    """`identify` this process, once: accelerate and DeepSpeed change the variables when they start.

    Raises:
        Contradiction: see `identify`.
    """
    return identify(os.environ)


def speaks() -> bool:
    """Whether this process reports what all processes of its machine notice.

    Where nobody knows which process it is, it does: a message that comes twice is better than none.
    """
    try:
        return own_identity().local_rank == 0
    except Contradiction:
        return True


def _number(name: str, environment: Mapping[str, str]) -> int:
    value, least = environment[name], 1 if name.endswith("WORLD_SIZE") else 0
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) < least:
        shown = f"{name}={value[:40]}" if value else f"{name} is empty"
        raise Contradiction(f"{shown}, but must be a whole number from {least}; {_unset(environment)}, or {RESTART}")
    return int(value)


def _check_complete(numbers: Mapping[str, int], environment: Mapping[str, str]) -> None:
    """A process alone needs no more than WORLD_SIZE; one of several needs everything, and an address to meet at."""
    needed = (*RANK_VARIABLES, *ADDRESS_VARIABLES) if numbers.get("WORLD_SIZE", 1) > 1 else ("WORLD_SIZE",)
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        given = _listed([f"{name}={number}" for name, number in numbers.items()])
        lacks = f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} not"
        raise Contradiction(
            f"{given} {'is' if len(numbers) == 1 else 'are'} set but {lacks}; {_unset(environment)}, or {RESTART}"
        )
    port = environment.get("MASTER_PORT", "1")
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise Contradiction(f"MASTER_PORT={port[:40]}, but must be a number from 0 to 65535; {RESTART}")


def _check_consistent(identity: ProcessIdentity, numbers: Mapping[str, int]) -> None:
    limits = [("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE")]
    for name, limit in limits:
        if numbers.get(name, 0) >= numbers.get(limit, identity.world_size):
            raise Contradiction(_contradiction(numbers, f"{name} must be below {limit}", name, limit))
    if identity.ranks_on_machine > identity.world_size:
        names = "LOCAL_WORLD_SIZE", "WORLD_SIZE"
        raise Contradiction(_contradiction(numbers, "LOCAL_WORLD_SIZE must not exceed WORLD_SIZE", *names))
    if identity.ranks_on_machine == identity.world_size and identity.rank != identity.local_rank:
        reason = "on a single machine (LOCAL_WORLD_SIZE is WORLD_SIZE) RANK and LOCAL_RANK must be the same"
        raise Contradiction(_contradiction(numbers, reason, "RANK", "LOCAL_RANK"))


def _contradiction(numbers: Mapping[str, int], reason: str, *names: str) -> str:
    values = _listed([f"{name}={numbers[name]}" for name in names if name in numbers])
    return f"{values} cannot be right: {reason}; {_unset(numbers)}, or {RESTART}"


def _unset(environment: Mapping[str, object]) -> str:
    return f"unset {' '.join(name for name in RANK_VARIABLES if name in environment)}"


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
