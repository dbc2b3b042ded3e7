"""What pydantic finds wrong with a value, in words that a user of this project understands."""

import re

from pydantic import ValidationError

_MANY = "(?:List|Tuple|Dictionary|Set)"

# pydantic's messages, and the same as the end of "the field: ...". The first that fits counts.
_REPHRASED = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"Value error, (.*)", r"\1"),
        (r"Field required", "is missing"),
        (r"Extra inputs are not permitted", "is not known here"),
        (r"Invalid JSON: (.*)", r"is not JSON (\1)"),
        (rf"{_MANY} should have at least (\d+) items? after validation, not (.*)", r"needs at least \1, not \2"),
        (rf"{_MANY} should have at most (\d+) items? after validation, not (.*)", r"may have at most \1, not \2"),
        (r"String should have at least (\d+) characters?", r"needs at least \1 characters"),
        (r"String should have at most (\d+) characters?", r"may have at most \1 characters"),
        (r"String should match pattern '(.*)'", r"must match the pattern \1"),
        (r"Input should be greater than or equal to (.*)", r"must be at least \1"),
        (r"Input should be less than or equal to (.*)", r"must be at most \1"),
        (r"Input should be a valid integer.*", "must be a whole number"),
        (r"Unable to parse input string as an integer, exceeded maximum size", "has too many digits"),
        (r"Input should be a valid number.*", "must be a number"),
        (r"Input should be a valid boolean.*", "must be true or false"),
        (r"Input should be a valid string.*", "must be text"),
        (r"Input (?:should be|is not) a valid path.*", "must be a path"),
        (r"Input should be a valid (?:list|tuple|array|set).*", "must be a list"),
        (r"Input should be (?:a valid dictionary|an object|a valid mapping).*", "must hold named values"),
        (r"Input should be None", "must be left out"),
        (r"Input should be (.*)", r"must be \1"),
    )
)


def in_plain_words(message: str) -> str:
    """A message of pydantic as the end of a sentence that begins with the name of the field."""
    for pattern, words in _REPHRASED:
        if match := pattern.fullmatch(message):
            return match.expand(words)
    return message


def first_fault(error: ValidationError, whole: str = "the file") -> str:
    """The first fault that pydantic reports: "FIELD: what is wrong"; `whole` is the field if it has no name."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"])) or whole
    return f"{field}: {in_plain_words(first['msg'])}"
