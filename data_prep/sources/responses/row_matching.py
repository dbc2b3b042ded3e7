"""Which row of a table of responses belongs to which stimulus.

Rows are matched by name whenever a column, whatever it is called, or a data frame's index holds the ids or the images
of the stimuli; by position only if nothing looks like a name. What looks like one without being one is never guessed.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.common.errors import BadInput
from data_prep.sources.files.image_files import spelling
from data_prep.sources.responses.response_tables import RANGE_INDEX, Column, ResponseTable

ID_COLUMN = "stimulus_id"
ALIKE = 0.5  # a column resembles the names of the stimuli if this share of either is the same but for the spelling

_STIMULUS_WORDS = re.compile(r"stim|image|img|pic|photo|file|(?<!un)name|(?<![a-z])id(?![a-z])", re.IGNORECASE)
_NAME_OF_NAMES = re.compile(  # whole names of columns that name stimuli and nothing else
    r"(stim|stimulus|image|img|picture|pic|photo|file)?[\s_.-]*(id|name|nr|no|number|key|path|file)?", re.IGNORECASE
)
_IMAGE_ENDING = re.compile(r"\.(jpe?g|png|tiff?|bmp|gif|webp|ppm)$")
_WHOLE_FLOAT = re.compile(r"(\d+)\.0+", re.ASCII)
_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)", re.ASCII)
_SEPARATORS = re.compile(r"[\s_./-]+")


@dataclass(frozen=True)
class StimulusNames:
    """What a table may call the stimuli.

    Attributes:
        path: of the table of stimuli, for messages.
        ids: of the stimuli.
        images: their image files, below the source.
    """

    path: str
    ids: list[str]
    images: list[str]

    def of(self, kind: str) -> list[str]:
        """The names of a kind, "ids" or "images"."""
        return self.ids if kind == "ids" else self.images


@dataclass(frozen=True)
class RowOrder:
    """The row of every stimulus.

    Attributes:
        rows: int, in the order of the stimuli.
        column: that names the stimuli; None if the rows were taken by position.
        names: all columns that name stimuli or rows, which are no sites.
        warnings: that the rows were taken by position.
    """

    rows: list[int]
    column: str | None
    names: frozenset[str]
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """How the rows were matched, for the manifest."""
        return "in the order of the stimuli" if self.column is None else f"by the column {self.column}"


def match_rows(table: ResponseTable, stimuli: StimulusNames) -> RowOrder:
    """Find the row of every stimulus.

    Raises:
        BadInput: a column resembles the names of the stimuli but is not the same, two columns disagree, an index says
            that the rows were reordered, or a column such as `image_id` holds other names.
    """
    texts_of = {name: column.texts for name, column in table.columns.items() if column.texts is not None}
    if ID_COLUMN in table.columns:
        texts_of[ID_COLUMN] = _id_texts(table)
    orders = {name: _rows_of_names(texts, stimuli) for name, texts in texts_of.items()}
    known = {name: rows for name, rows in orders.items() if rows is not None}
    if ID_COLUMN in table.columns and ID_COLUMN not in known:
        _refuse_other_spelling(table, stimuli, ID_COLUMN, texts_of[ID_COLUMN])
        raise _unknown_names(table, stimuli, ID_COLUMN, "ids", texts_of[ID_COLUMN])
    if known:
        return _agreed_order(table, stimuli, known)
    for name, texts in texts_of.items():
        if not _is_default_index(table.columns[name], stimuli):
            _refuse_other_spelling(table, stimuli, name, texts)
    return _by_position(table, stimuli)


def _id_texts(table: ResponseTable) -> list[str]:
    """The cells of the column `stimulus_id`, none twice."""
    column = table.columns[ID_COLUMN]
    texts = column.texts
    if texts is None:
        numbers = [] if column.numbers is None else column.numbers.tolist()
        texts = [str(int(number)) if float(number).is_integer() else str(number) for number in numbers]
    if len(set(texts)) < len(texts):
        raise BadInput(f"{table.path}: {ID_COLUMN} {Counter(texts).most_common(1)[0][0]!r} is in two rows")
    return texts


def _rows_of_names(texts: Sequence[str], stimuli: StimulusNames) -> list[int] | None:
    """The row of every stimulus if the texts are the ids, or else the images, of the stimuli."""
    for names, other_names in ((stimuli.ids, texts), (_spellings(stimuli.images), _spellings(texts))):
        row_of = {name: row for row, name in enumerate(other_names)}
        if len(row_of) == len(other_names) == len(names) and row_of.keys() == set(names):
            return [row_of[name] for name in names]
    return None


def _spellings(paths: Sequence[str]) -> list[str]:
    return [spelling(path) for path in paths]


def _agreed_order(table: ResponseTable, stimuli: StimulusNames, orders: dict[str, list[int]]) -> RowOrder:
    """The order of the columns that name the stimuli; numbers of the rows that happen to be ids count for nothing."""
    naming = {
        name: rows
        for name, rows in orders.items()
        if rows == list(range(table.rows)) or not _may_number_rows(table.columns[name], name)
    }
    # A column that counts the rows does not tell whether one with other numbers names them.
    doubtful = [name for name in orders if name not in naming]
    if doubtful and all(_may_number_rows(table.columns[name], name) for name in naming):
        raise BadInput(
            f"{table.path}: {_call(doubtful[0])} holds the ids of {stimuli.path} in another order, but may as well "
            f"number the rows; add a column {ID_COLUMN} with the stimulus of each row"
        )
    column = ID_COLUMN if ID_COLUMN in naming else next(iter(naming))
    rows = naming[column]
    for other, other_rows in naming.items():
        if other_rows != rows and not (column == ID_COLUMN and table.columns[other].is_index):
            raise BadInput(
                f"{table.path}: {_call(column)} and {_call(other)} both name the stimuli, in different orders; call "
                f"the right one {ID_COLUMN} and remove the wrong one"
            )
    return RowOrder(rows, column, frozenset(orders) | _indexes(table))


def _indexes(table: ResponseTable) -> frozenset[str]:
    return frozenset(name for name, column in table.columns.items() if column.is_index)


def _may_number_rows(column: Column, name: str) -> bool:
    """Whether a column counts its rows, or holds their numbers under a name that does not speak of stimuli."""
    if column.numbers is None:
        return False
    if _counts(column.numbers):
        return name != ID_COLUMN
    return _counts(np.sort(column.numbers)) and not _STIMULUS_WORDS.search(name)


def _counts(numbers: np.ndarray) -> bool:
    """Whether the numbers are 0, 1, 2 ... or 1, 2, 3 ..."""
    return bool(len(numbers)) and numbers[0] in (0, 1) and bool((np.diff(numbers) == 1).all())


def _is_default_index(column: Column, stimuli: StimulusNames) -> bool:
    """Whether a column is an index that counts the rows, and the ids would not put them into another order."""
    if not column.is_index or column.numbers is None or not _counts(column.numbers):
        return False
    keys = [_key(name) for name in stimuli.ids]
    numbers = [_key(text) for text in column.texts or ()]
    return keys == numbers or set(keys) != set(numbers)


def _by_position(table: ResponseTable, stimuli: StimulusNames) -> RowOrder:
    for name, column in table.columns.items():
        if column.is_index:
            _check_index(table, stimuli, name)
        elif _NAME_OF_NAMES.fullmatch(name) and _may_name_rows(column, stimuli):
            example = f" ({column.texts[0][:60]!r} where those are like {stimuli.ids[0]!r})" if column.texts else ""
            raise BadInput(
                f"{table.path}: {_call(name)} seems to name the stimuli, but holds neither the ids nor the images of "
                f"{stimuli.path}{example}; write these, or add a column {ID_COLUMN} with the stimulus of each row"
            )
    warning = (
        f"{table.path.name} does not name its stimuli, so its rows were taken in the order of {stimuli.path}; if that "
        f"may be wrong, add a column {ID_COLUMN} and pack again"
    )
    return RowOrder(list(range(table.rows)), None, _indexes(table), (warning,))


def _may_name_rows(column: Column, stimuli: StimulusNames) -> bool:
    """Whether a column holds a name for each row, or ids of which some are in two rows, or what cannot be read."""
    if column.numbers is None:
        return column.texts is None or len(set(column.texts)) == len(column.texts)
    if column.texts is not None:
        return not _counts(np.sort(column.numbers))
    texts = {f"{number:.0f}" for number in column.numbers[np.isfinite(column.numbers)]}
    return len(texts & set(stimuli.ids)) >= ALIKE * len(stimuli.ids)


def _check_index(table: ResponseTable, stimuli: StimulusNames, name: str) -> None:
    """Refuse an index that names something else than the stimuli, or whose numbers do not increase."""
    column = table.columns[name]
    if column.numbers is not None and bool((np.diff(column.numbers) > 0).all()):
        return
    example = f": {column.texts[0][:60]!r} where those are like {stimuli.ids[0]!r}" if column.texts else ""
    raise BadInput(
        f"{table.path}: {_call(name)} is an index that neither increases nor holds the ids of {stimuli.path}{example}; "
        f"add a column {ID_COLUMN} with the stimulus of each row"
    )


def _call(column: str) -> str:
    return column if column == RANGE_INDEX else f"the column {column!r}"


# ---- names that are spelled in another way -------------------------------------------------------------------------


def _refuse_other_spelling(table: ResponseTable, stimuli: StimulusNames, column: str, texts: Sequence[str]) -> None:
    """Refuse a column whose texts are names of the stimuli but for zeros, case, separators or a few of them.

    Raises:
        BadInput: with both sides.
    """
    keys = [_key(text) for text in texts]
    for kind in ("ids", "images"):
        names = stimuli.of(kind)
        name_of = {_key(name): name for name in names}
        shared = set(keys) & name_of.keys()
        if not shared or len(shared) < ALIKE * min(len(set(keys)), len(name_of)):
            continue
        places = (row for row, key in enumerate(keys) if key in shared and texts[row] != name_of[key])
        example = next(places, None)
        if example is None:
            raise _unknown_names(table, stimuli, column, kind, texts)
        raise BadInput(
            f"{table.path}: {_call(column)} looks like the {kind} of {stimuli.path} but is not the same: "
            f"{texts[example]!r} where they are spelled {name_of[keys[example]]!r}; write the same names in both"
        )


def _unknown_names(
    table: ResponseTable, stimuli: StimulusNames, column: str, kind: str, texts: Sequence[str]
) -> BadInput:
    """The error for a column that names some of the stimuli, or some of them twice."""
    repeated, count = Counter(texts).most_common(1)[0]
    if count > 1:
        return BadInput(f"{table.path}: {column} {repeated!r} is in two rows; it needs one row for each stimulus")
    names = stimuli.of(kind)
    in_texts, in_names = set(texts), set(names)
    missing = [name for name in names if name not in in_texts]
    unknown = [text for text in texts if text not in in_names]
    return BadInput(
        f"{table.path}: by {_call(column)}, {len(missing)} of {len(names)} stimuli have no row, e.g. "
        f"{missing[0]!r}, and {len(unknown)} rows are for stimuli that {stimuli.path} lacks, e.g. {unknown[0]!r}"
    )


def _key(name: str) -> str:
    """What stays of a name without folders, ending, case, separators, leading zeros and the zeros of a float."""
    name = unicodedata.normalize("NFC", name).casefold().replace("\\", "/").rsplit("/", 1)[-1]
    name = _IMAGE_ENDING.sub("", name.strip())
    if match := _WHOLE_FLOAT.fullmatch(name):
        name = match[1]
    return _LEADING_ZEROS.sub("", _SEPARATORS.sub("", name))
