"""ensemble.json: the members of an ensemble, and how they are combined; and what a member is."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file
from train.run.folder import RunFolder, is_probe

ENSEMBLE_FILE = "ensemble.json"


def is_fine_tuned(run: Path) -> bool:
    """Whether a folder is a run of train/finetune.py, which has to be scored, rather than a probe or an ensemble.

    Raises:
        BadInput: it is none of these.
    """
    if (run / ENSEMBLE_FILE).is_file():
        return False
    if not RunFolder(run).recipe.is_file():
        raise BadInput(f"{run} is not the folder of a run, a probe or an ensemble")
    return not is_probe(RunFolder(run))


def shard_folders_of(run: Path) -> list[str]:
    """The shard folders, or their URLs, of a run, a probe or an ensemble.

    Raises:
        BadInput: they are not on record.
    """
    return read_record(run).data if (run / ENSEMBLE_FILE).is_file() else RunFolder(run).data_folders()


@dataclass(frozen=True)
class EnsembleRecord:
    """The content of ensemble.json, without the weights of the members.

    Attributes:
        combine: how the members are combined.
        members: the run folders of each member.
        data: the shard folder of each recording.
    """

    combine: str
    members: list[list[str]]
    data: list[str]

    def is_same_ensemble(self, other: "EnsembleRecord") -> bool:
        """Whether the same runs are combined in the same way on as many recordings, wherever their shards are."""
        return (self.combine, self.members, len(self.data)) == (other.combine, other.members, len(other.data))


def read_record(ensemble: Path) -> EnsembleRecord:
    """Read the ensemble.json of a folder.

    Raises:
        BadInput: it is missing or damaged.
    """
    path = ensemble / ENSEMBLE_FILE
    try:
        content = parse_json(read_regular_file(path))
        data = content["data"] if isinstance(content["data"], list) else [content["data"]]
        members = [member["runs"] for member in content["members"]]
        return EnsembleRecord(content["combine"], members, list(map(str, data)))
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{path} is damaged; make the ensemble again in another folder") from None
