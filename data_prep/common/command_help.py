"""The help page of a command: usage, examples, the settings people change most, then the rest by section."""

import inspect
import shutil
import textwrap
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from data_prep.common.option_fields import OFTEN_CHANGED, Option

WIDEST = 110
FLAG_COLUMN = 30


def usage(program: str, options: Sequence[Option], before: str = "") -> str:
    """The usage line: positional arguments and required options, then a placeholder for the others.

    Args:
        program: as it was started, with the chosen subcommand if any.
        options: of the command.
        before: arguments that come first, such as [RECIPE.yaml].
    """
    positional = [option.usage for option in options if option.positional]
    required = [option.usage for option in options if option.required and not option.positional]
    others = "[--section.setting VALUE ...]" if any("." in option.name for option in options) else "[--option ...]"
    words = [program, before, *positional, *required, others]
    return " ".join(word for word in words if word)


def help_page(
    usage_line: str,
    model: type[BaseModel],
    options: Sequence[Option],
    examples: Sequence[str] = (),
    subcommands: Mapping[str, type[BaseModel]] | None = None,
) -> str:
    """What --help prints.

    Args:
        usage_line: from `usage`.
        model: of the command; its docstring describes the command.
        options: of the command.
        examples: command lines.
        subcommands: by name; their docstrings describe them.
    """
    width = min(shutil.get_terminal_size().columns, WIDEST)
    blocks = [_wrapped(f"usage: {usage_line}", width, "      "), _wrapped(_text(model), width)]
    if examples:
        blocks.append("\n".join(["examples:", *(f"  {example}" for example in examples)]))
    if subcommands:
        entries = [_entry(name, _text(kind), width) for name, kind in subcommands.items()]
        blocks.append("\n".join(["subcommands (SUBCOMMAND --help lists the options of each):", *entries]))
    blocks += [_block(title, members, width) for title, members in _sections(options, model).items()]
    return "\n\n".join(blocks)


def _sections(options: Sequence[Option], model: type[BaseModel]) -> dict[str, list[Option]]:
    """The options by section title, in the order shown."""
    sections: dict[str, list[Option]] = {"required:": [], "settings people change most:": [], "other options:": []}
    required, often, others = sections
    for option in options:
        if option.required or option.positional:
            sections[required].append(option)
        elif OFTEN_CHANGED in option.field.metadata:
            sections[often].append(option)
        elif "." in option.name:
            title = f"{option.name.rpartition('.')[0]}: {_text(option.section)}"
            sections.setdefault(title, []).append(option)
        else:
            sections[others].append(option)
    return {title: members for title, members in sections.items() if members}


def _block(title: str, options: Sequence[Option], width: int) -> str:
    return "\n".join(
        [_wrapped(title, width), *(_entry(_flags(option), _description(option), width) for option in options)]
    )


def _flags(option: Option) -> str:
    return option.usage if option.positional else f"{', '.join(option.flags)} {option.value_name}".rstrip()


def _description(option: Option) -> str:
    text = " ".join((option.field.description or "").split())
    shown = option.default is not None and not option.required and not isinstance(option.default, bool)
    default = option.default
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default))
    return f"{text} [{default}]" if shown and default != "" else text


def _entry(flags: str, description: str, width: int) -> str:
    """An option or a subcommand, with its description beside it."""
    lines = textwrap.wrap(description, width - FLAG_COLUMN - 2) or [""]
    if len(flags) >= FLAG_COLUMN:
        return "\n".join([f"  {flags}", *(" " * (FLAG_COLUMN + 2) + line for line in lines)])
    first = f"  {flags:<{FLAG_COLUMN}}{lines[0]}"
    return "\n".join([first, *(" " * (FLAG_COLUMN + 2) + line for line in lines[1:])])


def _text(model: type[BaseModel]) -> str:
    """The first paragraph of a model's docstring."""
    return " ".join((inspect.getdoc(model) or "").partition("\n\n")[0].split())


def _wrapped(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
