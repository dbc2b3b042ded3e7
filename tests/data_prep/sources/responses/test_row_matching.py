"""Tables of responses: every response goes to its own stimulus and site, or the table is refused."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_sources import write_csv

from data_prep.common.errors import BadInput
from data_prep.sources.responses.row_matching import StimulusNames
from data_prep.sources.responses.site_columns import SiteNames, open_rates

N, SITES = 12, ["unit_a", "unit_b", "unit_c"]


def rates_of(n: int = N, seed: int = 0) -> np.ndarray:
    """Spike counts, float32 (n, sites); every response is different."""
    return np.random.default_rng(seed).permutation(n * len(SITES)).reshape(n, len(SITES)).astype(np.float32) + 0.5


def names_of(ids: list[str]) -> StimulusNames:
    return StimulusNames("stimuli.csv", ids, [f"images/{name}.png" for name in ids])


def frame_of(rates: np.ndarray, **columns) -> pd.DataFrame:
    return pd.DataFrame(columns | {site: rates[:, k] for k, site in enumerate(SITES)})


def save(frame: pd.DataFrame, folder: Path, kind: str, **how) -> Path:
    path = folder / f"rates.{kind}"
    frame.to_csv(path, **how) if kind == "csv" else frame.to_parquet(path, **how)
    return path


def read(path: Path, ids: list[str], **known):
    return open_rates(path, names_of(ids), SiteNames(**known))


IDS = {
    "words": [f"stim{k:04d}" for k in range(N)],
    "numbers": [str(k) for k in range(N)],
    "numbers from 1": [str(k + 1) for k in range(N)],
    "numbers with zeros": [f"{k:04d}" for k in range(N)],
    "mixed case": [f"Img_{k}" for k in range(N)],
}

# What other columns a table may have; each returns (name, values) for the stimuli of its rows.
DECOYS = {
    "repetitions": lambda rng, rows: ("repetitions", np.full(len(rows), 10)),
    "trial counts": lambda rng, rows: ("trial_count", rng.integers(8, 12, len(rows))),
    "onsets": lambda rng, rows: ("onset_s", np.sort(rng.uniform(0, 100, len(rows)))),
    "times of another name": lambda rng, rows: ("t0", np.sort(rng.uniform(0, 100, len(rows)))),
    "a constant": lambda rng, rows: ("gain", np.full(len(rows), 0.25)),
    "row numbers": lambda rng, rows: ("Unnamed: 0", np.arange(len(rows))),
    "shown in this order": lambda rng, rows: ("sequence", rng.permutation(len(rows))),
    "shown in this order, from 1": lambda rng, rows: ("sequence", rng.permutation(len(rows)) + 1),
    "words": lambda rng, rows: ("observer", np.array(["anna", "bert"] * len(rows))[: len(rows)]),
}
WAYS = ("stimulus_id", "image_id", "key", "path", "index", "named index", "none")


def table_of(
    rng: np.random.Generator, ids: list[str], way: str, decoys: Sequence[str] = (), position: int = 1
) -> pd.DataFrame:
    """A table whose rows are in any order, with the stimuli named in some way and decoys in between."""
    rows = rng.permutation(N) if way != "none" else np.arange(N)
    frame = frame_of(rates_of()[rows])
    for decoy in decoys:
        name, values = DECOYS[decoy](rng, rows)
        if name not in frame:
            frame.insert(min(position, frame.shape[1]), name, values)
    names = [ids[row] for row in rows]
    if way == "path":
        frame.insert(min(position, frame.shape[1]), "shown", [f"images\\{name}.PNG" for name in names])
    elif way in ("index", "named index"):
        frame.index = pd.Index(names, name="image" if way == "named index" else None)
    elif way != "none":
        frame.insert(min(position, frame.shape[1]), way, names)
    return frame


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ids=st.sampled_from(sorted(IDS)),
    shuffled=st.booleans(),
    way=st.sampled_from(WAYS),
    decoys=st.lists(st.sampled_from(sorted(DECOYS)), max_size=2, unique=True),
    position=st.integers(0, 5),
    kind=st.sampled_from(["csv", "parquet"]),
    keep_index=st.booleans(),
    said=st.booleans(),
)
def test_every_response_goes_to_its_stimulus_or_the_table_is_refused(
    tmp_path_factory, seed, ids, shuffled, way, decoys, position, kind, keep_index, said
):
    rng = np.random.default_rng(seed)
    order = rng.permutation(N) if shuffled else np.arange(N)
    if way == "none" and shuffled:
        order = np.arange(N)  # rows without names are in the order of the stimuli
    frame = table_of(rng, IDS[ids], way, decoys, position)
    how = {"index": keep_index or way in ("index", "named index")}
    path = save(frame, tmp_path_factory.mktemp("table"), kind, **how)
    stimuli = [IDS[ids][k] for k in order]
    try:
        responses = read(path, stimuli, wanted=("unit_*",) if said else ())
    except BadInput:
        return
    assert responses.site_ids == SITES
    assert np.array_equal(responses.load(), rates_of()[order])
    assert bool(responses.warnings) == (responses.rows == "in the order of the stimuli")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "none"])
@pytest.mark.parametrize("ids", ["words", "mixed case"])
def test_rows_are_matched_by_name_under_any_name(tmp_path, kind, way, ids):
    frame = table_of(np.random.default_rng(1), IDS[ids], way)
    path = save(frame, tmp_path, kind, index="index" in way)
    responses = read(path, IDS[ids])
    assert np.array_equal(responses.load(), rates_of())
    assert responses.site_ids == SITES
    assert responses.rows.startswith("by the column")
    assert not responses.warnings


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("index", [False, True])
def test_rows_without_names_are_in_order_and_that_is_said(tmp_path, kind, index):
    path = save(frame_of(rates_of()), tmp_path, kind, index=index)
    for ids in IDS.values():
        responses = read(path, ids)
        assert np.array_equal(responses.load(), rates_of())
        assert responses.site_ids == SITES
    (warning,) = read(path, IDS["words"]).warnings
    assert "does not name its stimuli" in warning
    assert "stimulus_id" in warning


@pytest.mark.parametrize("decoy", sorted(DECOYS))
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_may_be_no_site_is_asked_about(tmp_path, kind, decoy):
    frame = table_of(np.random.default_rng(0), IDS["words"], "image_id", [decoy])
    path, name = save(frame, tmp_path, kind, index=False), frame.columns[2]
    if decoy == "row numbers":  # an index is never a site
        assert read(path, IDS["words"]).site_ids == SITES
        return
    with pytest.raises(BadInput, match=rf"'{name}' \(.*\) may be no site; .*--site-columns") as caught:
        read(path, IDS["words"])
    assert "\n" not in str(caught.value)
    for said in ({"wanted": ("unit_*",)}, {"wanted": tuple(SITES)}, {"listed": SITES}):
        responses = read(path, IDS["words"], **said)
        assert responses.site_ids == SITES
        assert np.array_equal(responses.load(), rates_of())
    (warning,) = responses.warnings
    assert name in warning
    assert "left out" in warning


OTHER_NAMES = {
    "other words": ("image_id", [f"other{k}" for k in range(N)]),
    "other words in CamelCase": ("ImageName", [f"other{k}" for k in range(N)]),
    "other numbers": ("stimulus", np.random.default_rng(0).permutation(N) + 1000),
    "an id in two rows": ("image_id", [*range(N - 1), 0]),
}


@pytest.mark.parametrize("names", sorted(OTHER_NAMES))
@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("said", [{}, {"wanted": ("unit_*",)}, {"listed": SITES}])
def test_a_column_that_names_other_stimuli_is_refused_and_not_skipped(tmp_path, kind, names, said):
    name, values = OTHER_NAMES[names]
    path = save(frame_of(rates_of(), **{name: values}), tmp_path, kind, index=False)
    with pytest.raises(BadInput, match=rf"'{name}' seems to name the stimuli, but holds neither .* column stimulus_id"):
        read(path, IDS["numbers"], **said)


def test_ids_in_a_type_that_is_not_read_are_not_skipped(tmp_path):
    path = save(frame_of(rates_of(), image_id=[name.encode() for name in IDS["words"]]), tmp_path, "parquet")
    with pytest.raises(BadInput, match="'image_id' seems to name the stimuli"):
        read(path, IDS["words"], wanted=("unit_*",))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_ids_are_told_apart_by_all_their_digits(tmp_path, kind):
    ids = [str(2**60 + k) for k in range(N)]
    path = save(frame_of(rates_of()[::-1], image_id=[int(name) for name in ids[::-1]]), tmp_path, kind, index=False)
    assert np.array_equal(read(path, ids).load(), rates_of())


def test_a_site_that_never_fired_is_a_site(tmp_path):
    rates = rates_of()
    rates[:, 1] = 0
    path = save(frame_of(rates, image_id=IDS["words"]), tmp_path, "csv", index=False)
    assert read(path, IDS["words"]).site_ids == SITES


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ([str(k) for k in range(N)], [f"{k:04d}" for k in range(N)]),  # leading zeros lost
        ([float(k) for k in range(N)], [f"{k:04d}" for k in range(N)]),
        ([float(k) for k in range(N)], [str(k) for k in range(N)]),
        ([f"img_{k}" for k in range(N)], [f"Img_{k}" for k in range(N)]),
        ([f"stim-{k}" for k in range(N)], [f"stim_{k}" for k in range(N)]),
    ],
)
@pytest.mark.parametrize("column", ["stimulus_id", "image_id"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_spellings_of_an_id_are_shown_and_not_guessed(tmp_path, kind, column, given, spelled):
    path = save(frame_of(rates_of(), **{column: given}), tmp_path, kind, index=False)
    with pytest.raises(BadInput) as caught:
        read(path, spelled)
    (wrong, right) = next((a, b) for a, b in zip(map(str, given), spelled, strict=True) if a != b)
    assert f"{wrong!r} where they are spelled {right!r}" in str(caught.value)


BAD_CSV = {
    "a number as Python writes it": ("image_id,unit_a\na,1_5\nb,2.0\n", "line 2, site 'unit_a': '1_5' is not a number"),
    "digits of another script": ("image_id,unit_a\na,1.5\nb,٢\n", "line 3, site 'unit_a': '٢' is not a number"),
    "a decimal comma": ('image_id,unit_a\na,"1,5"\nb,2.5\n', "'1,5' is not a number; write decimals with a point"),
    "semicolons": ("image_id;unit_a\na;1.5\nb;2.5\n", "separated by a semicolon"),
    "bars": ("image_id|unit_a\na|1.5\nb|2.5\n", "separated by a bar"),
    "tabs": ("image_id\tunit_a\na\t1.5\nb\t2.5\n", "separated by a tab"),
    "a comma too many in the header": ("image_id,unit_a,\na,1.5,\nb,2.5,\n", "the header ends with a comma"),
    "a comma too many in a row": ("image_id,unit_a\na,1.5\nb,2.5,\n", "line 3: 3 cells .*a separator too many"),
    "half of the ids": ("image_id,unit_a\na,1.5\nc,2.5\n", "'c'"),
    "an id twice": ("image_id,unit_a\na,1.5\na,2.5\n", "'a' is in two rows"),
    "two columns of ids": ("image_id,key,unit_a\na,b,1.5\nb,a,2.5\n", "'image_id' and the column 'key' both name"),
    "three rows": ("image_id,unit_a\na,1.5\nb,2.5\nc,2.5\n", "3 rows for 2 stimuli"),
    "nothing but ids": ("image_id\na\nb\n", "no column is left that could be a site"),
    "an infinity": ("image_id,unit_a\na,1.5\nb,inf\n", "'inf' is not a number"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_tables_are_refused_in_one_sentence(tmp_path, case):
    content, message = BAD_CSV[case]
    path = tmp_path / "rates.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadInput, match=message) as caught:
        read(path, ["a", "b"])
    assert "\n" not in str(caught.value)


def test_the_columns_that_are_wanted_must_exist(tmp_path):
    path = save(frame_of(rates_of(), image_id=IDS["words"]), tmp_path, "csv", index=False)
    assert read(path, IDS["words"], wanted=("unit_c", "unit_a")).site_ids == ["unit_a", "unit_c"]
    with pytest.raises(BadInput, match=r"--site-columns unit_z .*unit_a, unit_b, unit_c"):
        read(path, IDS["words"], wanted=("unit_z",))
    with pytest.raises(BadInput, match=r"sites\.csv .* different sites: 'unit_d' is not in the table.*'unit_a'"):
        read(path, IDS["words"], listed=["unit_b", "unit_c", "unit_d"])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_index_that_was_reordered_is_refused(tmp_path, kind):
    frame = frame_of(rates_of()).sample(frac=1, random_state=0)
    path = save(frame, tmp_path, kind, index=True)
    with pytest.raises(BadInput, match="an index that neither increases nor holds the ids"):
        read(path, IDS["words"])
    with pytest.raises(BadInput, match="may as well number the rows"):  # its numbers are the ids, by chance or not
        read(path, IDS["numbers"])


def test_an_index_that_parquet_only_describes_is_known(tmp_path):
    path = save(frame_of(rates_of())[::-1], tmp_path, "parquet")  # RangeIndex(start=11, stop=-1, step=-1)
    with pytest.raises(BadInput, match="the index of the rows is an index that neither increases"):
        read(path, IDS["words"])


def bomb(path: Path, column: pa.Array, rows: int) -> Path:
    pq.write_table(pa.table({"unit_a": pa.array(np.arange(rows) + 0.5), "other": column}), path, compression="zstd")
    assert path.stat().st_size < 2**20
    return path


def test_parquet_that_unpacks_to_gigabytes_is_refused_before_it_is_read(tmp_path):
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000_000, np.int8)), pa.array([1.0]))
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"unit_a": many}), path)
    with pytest.raises(BadInput, match="2,000,000 rows for 2 stimuli"):
        read(path, ["a", "b"])
    path = bomb(tmp_path / "text.parquet", pa.array(["x" * 2**24, "y"]), 2)
    with pytest.raises(BadInput, match="'other' claims 16,777"):
        read(path, ["a", "b"])
    path = bomb(tmp_path / "list.parquet", pa.array([np.zeros(2**20), np.zeros(1)]), 2)
    with pytest.raises(BadInput, match=r"'other' \(list<.*> *.*may be no site"):
        read(path, ["a", "b"])


def test_a_text_that_is_repeated_takes_memory_once(tmp_path):
    import tracemalloc

    rows = 2_000
    one_text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * 500_000]))
    path = bomb(tmp_path / "rates.parquet", one_text, rows)
    tracemalloc.start()
    with pytest.raises(BadInput, match="'other'"):
        read(path, [f"s{k}" for k in range(rows)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * 2**20


def test_write_csv_is_read_as_pandas_writes_it(tmp_path):
    rates = rates_of()
    write_csv(tmp_path / "rates.csv", {"": list(range(N))} | {site: rates[:, k] for k, site in enumerate(SITES)})
    assert np.array_equal(read(tmp_path / "rates.csv", IDS["words"]).load(), rates)


@pytest.mark.parametrize("counter", ["Unnamed: 0", "row"])
def test_a_counter_of_the_rows_does_not_outweigh_a_column_that_may_name_them(tmp_path, counter):
    """Ids that are numbers, in another order, under a name that says nothing, beside a data frame's index."""
    rows = np.random.default_rng(0).permutation(N)
    frame = frame_of(rates_of()[rows])
    frame.insert(0, counter, np.arange(N))
    frame.insert(1, "key", rows)
    path = save(frame, tmp_path, "csv", index=False)
    with pytest.raises(
        BadInput, match=r"'key' holds the ids of stimuli\.csv in another order.*add a column stimulus_id"
    ):
        read(path, IDS["numbers"])
    frame = frame.drop(columns=counter).rename(columns={"key": "stimulus_id"})
    assert np.array_equal(read(save(frame, tmp_path, "csv", index=False), IDS["numbers"]).load(), rates_of())


# ---- columns that may be no sites ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "named like a fact") for name in ("mean", "avg", "SEM", "reaction_time", "ReactionTime", "rt_ms")),
        *((name, "named like a fact") for name in ("population_mean", "accuracy", "total")),
        ("Unnamed: 4", "a column without a name"),
    ],
)
def test_columns_that_summarise_or_describe_are_asked_about(tmp_path, name, reason):
    frame = frame_of(rates_of())
    frame.insert(2, name, np.random.default_rng(1).uniform(0.2, 5, N))
    frame.insert(0, "stimulus_id", IDS["words"])
    path = save(frame, tmp_path, "csv", index=False)
    with pytest.raises(BadInput, match=rf"'{name}' \({reason}.*--site-columns"):
        read(path, IDS["words"])
    assert read(path, IDS["words"], wanted=("unit_*",)).site_ids == SITES


@pytest.mark.parametrize("what", ["mean", "sum"])
@pytest.mark.parametrize("digits", [None, 2])
def test_a_summary_of_the_sites_is_asked_about_under_any_name(tmp_path, what, digits):
    rates = rates_of()
    frame = frame_of(rates)
    summary = getattr(rates.astype(np.float64), what)(axis=1)
    frame["all"] = summary if digits is None else summary.round(digits)
    frame["repetitions"] = np.arange(N) % 3 + 8
    frame.insert(0, "stimulus_id", IDS["words"])
    with pytest.raises(BadInput, match=f"'all' \\(the {what} of the other columns\\)"):
        read(save(frame, tmp_path, "csv", index=False), IDS["words"])


def test_sites_that_are_alike_are_no_summaries(tmp_path):
    shared = np.random.default_rng(2).uniform(0, 20, (N, 1))
    frame = frame_of(shared + np.random.default_rng(3).normal(0, 1, (N, 3)))
    frame.insert(0, "stimulus_id", IDS["words"])
    assert read(save(frame, tmp_path, "csv", index=False), IDS["words"]).site_ids == SITES


def test_a_column_of_increasing_rates_is_not_taken_for_an_index(tmp_path):
    """A table whose fourth column has no name, as pandas reads and writes it again."""
    frame = frame_of(rates_of())
    frame["Unnamed: 3"] = np.sort(rates_of()[:, 0])
    for kind in ("csv", "parquet"):
        with pytest.raises(BadInput, match="'Unnamed: 3' \\(a column without a name"):
            read(save(frame, tmp_path, kind, index=False), IDS["words"])


def test_whole_numbers_in_columns_named_by_pandas_are_still_indexes(tmp_path):
    """Saved with its index and read without saying so, twice; some rows were dropped before."""
    frame = frame_of(rates_of())
    frame.insert(0, "Unnamed: 0", np.arange(N) * 2)
    frame.insert(0, "Unnamed: 0.1", np.arange(N))
    assert read(save(frame, tmp_path, "csv", index=False), IDS["words"]).site_ids == SITES
