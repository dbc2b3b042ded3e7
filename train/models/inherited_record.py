"""What the weights that a network begins with have seen; see train/data/seen.py."""

import base64
import io
from pathlib import Path

from safetensors import SafetensorError, safe_open

from train.data.seen import SEEN_FILE, SeenRecord, inherited_record, read_record
from train.run.settings import Source

METADATA = "spiketune_seen"  # of a .safetensors file: its record in base64


def record_of_weights(source: Source) -> SeenRecord:
    """What the weights of a network have seen.

    A run folder and a file that train/export.py wrote have a record; so has a file in a run's checkpoints. Published
    weights and other files have none.

    Raises:
        BadInput: a record is damaged.
    """
    if source.weights == "random":
        return SeenRecord()
    if source.weights == "pretrained":
        return SeenRecord(pretrained=(source.name,))
    path = Path(source.weights)
    origin, own = f"weights {source.weights}", _own_record(path)
    return SeenRecord(unknown=(origin,)) if own is None else SeenRecord().inheriting(own, origin)


def _own_record(weights: Path) -> SeenRecord | None:
    if weights.is_dir():
        return inherited_record(weights)
    run = weights.absolute().parent.parent.parent
    if weights.absolute().parent.parent.name == "checkpoints" and (run / "recipe.yaml").is_file():
        return inherited_record(run)
    return _record_in_metadata(weights) if weights.suffix == ".safetensors" else None


def _record_in_metadata(weights: Path) -> SeenRecord | None:
    try:
        with safe_open(weights, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
        content = None if text is None else base64.b64decode(text, validate=True)
    except (OSError, SafetensorError, ValueError):
        return None  # reading the weights themselves reports what is wrong
    return None if content is None else read_record(io.BytesIO(content), f"{weights}: its {SEEN_FILE}")


def metadata_of(record: SeenRecord) -> dict[str, str]:
    """A record as the metadata of a .safetensors file."""
    return {METADATA: base64.b64encode(record.content()).decode()}
