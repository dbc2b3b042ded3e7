"""metrics.json: the scores of a run, a probe or an ensemble on a split."""

from pathlib import Path
from typing import Any

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file

METRICS_FILE = "metrics.json"


def metrics_content(path: Path, advice: str) -> dict[str, Any]:
    """The content of a metrics.json.

    Args:
        path: of the file.
        advice: what to do if it cannot be read, for the message.

    Raises:
        BadInput: it is missing or damaged.
    """
    try:
        content = parse_json(read_regular_file(path))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; {advice}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is damaged (it has no entries); {advice}")
    return content
