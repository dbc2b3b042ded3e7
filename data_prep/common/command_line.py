"""Command lines from pydantic models: tyro parses them; help pages and error messages are our own."""

import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import tyro
from pydantic import BaseModel

from data_prep.common.command_help import help_page, usage
from data_prep.common.errors import BadInput
from data_prep.common.option_fields import Option, declared_default, options_of, subcommands
from data_prep.common.validation_messages import in_plain_words

Parsed = TypeVar("Parsed", bound=BaseModel)
SUBCOMMAND_SETTINGS = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)

# What other tools call a setting, and what it is called here.
OTHER_NAMES = {
    "learning-rate": "lr",
    "batch-size": "global-size",
    "train-batch-size": "global-size",
    "num-workers": "workers",
    "num-epochs": "epochs",
    "max-epochs": "epochs",
    "model": "backbone.name",
    "model-name": "backbone.name",
    "wd": "weight-decay",
    "output": "out",
    "output-dir": "out",
}

# Patterns for tyro's error messages, as running text.
_OUT_OF_BOUNDS = re.compile(
    r"Error parsing (\S+): \d+ validation errors? for \w+ (\S+) (.*?) \[type=\w+, input_value=(.*?), input_type=\w+\]"
)
_NO_CHOICE = re.compile(r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)")
_REPHRASED = (
    (r"^(Value error|Invalid choice|Unrecognized options|Required options|Parsing error|Missing argument) ", ""),
    (r"^Error parsing (\S+): ", r"\1: "),
    (r"^Unrecognized options: ", "unexpected argument: "),
    (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number"),
    (r"could not convert string to float: (.*)", r"\1 is not a number"),
    (r"no type matching \S+ could be instantiated from \[(.*)\]\.", r"\1 is not a valid value"),
)


def parse(
    model: type[Parsed],
    words: Sequence[str] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    before: str = "",
    examples: Sequence[str] = (),
) -> Parsed:
    """Parse a command line into `model`; --help prints a page about it and exits.

    Args:
        model: of the options; the docstrings of its fields are their help texts.
        words: of the command line; by default those of this process.
        defaults: values of fields, in place of the model's own defaults.
        before: arguments that come before `words`, for the usage line.
        examples: command lines for the help page, without the name of the program.

    Raises:
        BadInput: an unknown option (with the nearest name), a missing one, or a value out of its bounds.
    """
    words = sys.argv[1:] if words is None else list(words)
    _check_encoding(words)
    program = _program()
    choices = _subcommands(model)
    defaults = defaults or {}
    options = options_of(model, defaults)
    chosen = next((word for word in words if word in choices), None)
    if chosen is not None:
        program += f" {chosen}"
        options = [*options_of(choices[chosen], {}), *options]
    elif choices:
        before = f"{{{','.join(choices)}}}"
    usage_line = usage(program, options, before)
    shown = [f"{_program()} {example}" for example in examples if chosen is None or example.split()[0] == chosen]
    if {"-h", "--help"} & set(words):
        print(help_page(usage_line, choices.get(chosen or "", model), options, shown, None if chosen else choices))
        raise SystemExit(0)
    if choices and chosen is None:
        raise BadInput(_unknown_subcommand(words, choices))
    _check_flags(words, options, usage_line)
    return _parse_with_tyro(model, words, defaults, _what_is_missing(options, usage_line, shown))


def _what_is_missing(options: Sequence[Option], usage_line: str, examples: Sequence[str]) -> str:
    """The sentence for a command line without its arguments."""
    required = [option for option in options if option.positional and option.required]
    if len(required) != 1:
        return f"an argument is missing; usage: {usage_line}"
    (argument,) = required
    name, description = argument.usage.removesuffix(" ..."), " ".join((argument.field.description or "").split())
    hint = f"for example: {examples[0]}" if examples else f"usage: {usage_line}"
    return f"{name} is missing: {description.rstrip('.')}; {hint}"


def _check_encoding(words: Sequence[str]) -> None:
    """Refuse paths that are not UTF-8: they could be neither printed nor written into a manifest or a run folder.

    Raises:
        BadInput: a word of the command line, or the working folder, is not.
    """
    for word in words:
        if not _is_utf8(word):
            raise BadInput(f"{word!r} is not UTF-8 text; rename the file or folder")
    if not _is_utf8(os.getcwd()):
        raise BadInput(f"the path of the working folder, {os.getcwd()!r}, is not UTF-8 text; rename it")


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)  # bytes that Python could not decode


def _program() -> str:
    """The command as shown to the user: relative to the working folder if it lies below it."""
    relative = os.path.relpath(sys.argv[0])
    return sys.argv[0] if relative.startswith("..") else relative


def _subcommands(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {name: kind for field in model.model_fields.values() for name, kind in subcommands(field).items()}


def _unknown_subcommand(words: Sequence[str], choices: Collection[str]) -> str:
    names = ", ".join(choices)
    if not words or words[0].startswith("-"):
        return f"give one of {names} first; {_program()} --help describes them"
    return f"{words[0]!r} is not one of {names}{_did_you_mean(difflib.get_close_matches(words[0], choices, n=1))}"


def _check_flags(words: Sequence[str], options: Sequence[Option], usage_line: str) -> None:
    """Refuse unknown flags, and a command line without the required ones.

    Raises:
        BadInput: with the nearest flags, or with the usage line.
    """
    known = {_normal(flag): flag for option in options for flag in option.flags}
    given = [_normal(word.partition("=")[0]) for word in words if re.match(r"--[a-zA-Z]", word)]
    for flag in given:
        if flag not in known:
            near = _nearest(flag, list(known))
            raise BadInput(f"{flag} is not an option{_did_you_mean(known[name] for name in near)} ({_help_hint()})")
    missing = [
        option.usage
        for option in options
        if option.required and not option.positional and not {*map(_normal, option.flags)} & set(given)
    ]
    if missing:
        if not words:
            missing = [*(option.usage for option in options if option.required and option.positional), *missing]
        raise BadInput(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; usage: {usage_line}")


def _normal(flag: str) -> str:
    return flag.replace("_", "-")


def _nearest(flag: str, known: Sequence[str]) -> list[str]:
    """The flags that were probably meant: with the same last part (--lr for --optimizer.lr), else the most similar."""
    meant = flag.lstrip("-")
    if meant not in {name.lstrip("-").rpartition(".")[2] for name in known}:
        meant = OTHER_NAMES.get(meant, meant)
    last = meant.rpartition(".")[2]
    same_ending = [name for name in known if name.lstrip("-").rpartition(".")[2] == last]
    exact = [name for name in same_ending if name.lstrip("-") == meant]
    return exact or same_ending or difflib.get_close_matches(flag, known, n=1)


def _did_you_mean(names: Iterable[str]) -> str:
    text = " or ".join(names)
    return f"; did you mean {text}?" if text else ""


def _help_hint() -> str:
    return f"{_program()} --help lists the options"


def _parse_with_tyro(model: type[Parsed], words: Sequence[str], defaults: Mapping[str, Any], missing: str) -> Parsed:
    model_defaults = {name: declared_default(field) for name, field in model.model_fields.items()}
    default = model.model_construct(None, **(model_defaults | dict(defaults)))
    tyro_output = io.StringIO()
    config = SUBCOMMAND_SETTINGS if _subcommands(model) else ()
    try:
        with contextlib.redirect_stderr(tyro_output):
            return tyro.cli(model, args=words, default=default, config=config)
    except SystemExit as exit_request:
        if exit_request.code in (0, None):
            raise
        raise BadInput(_sentence(tyro_output.getvalue(), missing)) from None


def _sentence(box: str, missing: str) -> str:
    """tyro's framed error message as one sentence, without the frame, links and repeated help.

    Args:
        box: the message.
        missing: the sentence for a missing argument.
    """
    lines = [re.sub(r"[╭╮╰╯│─]|-{4,}", " ", line).strip() for line in box.splitlines()]
    text = re.sub(r"\[/?bold\]", "", " ".join(line for line in lines if line))
    text = re.split(r"Argument helptext:|Perhaps you meant:|For full helptext,|Got errors:", text)[0]
    text = " ".join(text.split())
    if "Missing from" in text or "List should have at least 1 item" in text:
        return missing
    if match := _OUT_OF_BOUNDS.search(text):
        section, name, fault, value = match.groups()
        where = f"{section}.{name}" if section[0].islower() else name
        return f"{where}: {in_plain_words(fault)} (not {value})"
    if match := _NO_CHOICE.search(text):
        value, flag, choices = match.group(1), match.group(2), re.findall(r"'(.*?)'", match.group(3))
        near = difflib.get_close_matches(value.strip("'"), choices, n=1)
        return f"{flag}: {value} is not one of {', '.join(choices)}{_did_you_mean(near)}"
    for pattern, replacement in _REPHRASED:
        text = re.sub(pattern, replacement, text)
    return text
