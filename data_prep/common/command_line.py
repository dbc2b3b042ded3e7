"""Command lines from typed models, with tyro; what is wrong with one is said in a sentence."""

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from data_prep.common.errors import BadInput

Parsed = TypeVar("Parsed")
Place = Annotated[str, tyro.conf.arg(metavar="PATH|URL")]
"""The type of an option that takes a shard folder."""


def parse(
    model: type[Parsed] | Callable[..., Parsed],
    args: Sequence[str] | None = None,
    default: Any = None,
    config: Sequence[Any] = (),
) -> Parsed:
    """Parse a command line into `model`.

    Args:
        model: a pydantic model or a function; its docstrings are the help text.
        args: the words of the command line; by default those of this process.
        default: an instance that gives the defaults.
        config: further tyro settings.

    Raises:
        BadInput: an unknown option (with the nearest names), a missing one, or a value out of its bounds.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            settings = (tyro.conf.FlagCreatePairsOff, *config)
            return tyro.cli(model, args=args, default=default, config=settings)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise BadInput(_sentence(complaint.getvalue())) from None


def _sentence(box: str) -> str:
    """tyro's framed complaint as running text, without the frame and the links."""
    lines = [re.sub(r"[╭╮╰╯│─]", " ", line).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    text = re.sub(r"\[/?bold\]", "", text)
    text = re.sub(r"For further information visit \S+", "", text)
    text = re.sub(r"\[type=\w+, input_value=(.*?), input_type=\w+\]", r"(not \1)", text)
    text = re.sub(r"^(Value error|Invalid choice|Unrecognized options|Required options|Parsing error) +", "", text)
    text = re.sub(r"Error parsing .*?: \d+ validation errors? for \w+ ", "", text)
    text = re.sub(r"For full helptext, (see|run):? (.*?)--help", r"(\2--help lists the options)", text)
    return re.sub(r"\s+", " ", text).strip()
