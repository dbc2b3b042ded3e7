"""The file of rates that a check writes: what is wrong with a bad one is said in a sentence."""

import json

import pytest
from made_rates import made_rates, made_training

from data_prep.common.errors import BadInput
from train.planning.rates import load_rates
from train.run.recipe import Recipe


@pytest.fixture
def content() -> dict:
    return json.loads(made_rates([made_training(Recipe())]).model_dump_json())


def test_rates_are_read_as_they_were_written(tmp_path, content):
    (tmp_path / "rates.json").write_text(json.dumps(content))
    assert json.loads(load_rates(tmp_path / "rates.json").model_dump_json()) == content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(format="other"), "is not a file of rates"),
        (lambda content: content.update(version=2), "has version 2 .* reads version 1; run launch/check.sh"),
        (lambda content: content["machine"].pop("passes"), "machine.passes: is missing"),
        (lambda content: content["machine"].update(passes=0), "machine.passes: must be greater than 0"),
        (lambda content: content["training"][0].update(share="many"), "training.0.share: must be a whole number"),
        (lambda content: content["place"].update(cores=-1), "place.cores: must be at least 1"),
        (
            lambda content: content.update(machine=None, verdicts=[{"subject": "rates", "outcome": "failed"}]),
            "has no rates of the machine, because the check failed: rates",
        ),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(tmp_path, content, change, said):
    change(content)
    (tmp_path / "rates.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=said):
        load_rates(tmp_path / "rates.json")


def test_what_is_no_file_or_no_json_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"does not exist; write it with launch/check\.sh --json"):
        load_rates(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("rates")
    with pytest.raises(BadInput, match="is not readable as JSON"):
        load_rates(tmp_path / "text.json")
    (tmp_path / "old.json").write_text("[]")  # what older checks wrote
    with pytest.raises(BadInput, match="is not a file of rates"):
        load_rates(tmp_path / "old.json")
