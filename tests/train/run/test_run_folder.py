"""Who may begin in a folder, and what may lie in it."""

import pytest
from make_runs import guess, make_probe, make_run, responses

from data_prep.common.errors import BadInput
from train.run.folder import RunFolder, check_no_links
from train.run.recipe import ProbeRecipe, Recipe


@pytest.fixture
def folders(tmp_path):
    make_run(tmp_path / "run")
    make_probe(tmp_path / "probe", responses(), {"x": guess(responses(), 0.5)}, "x")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        ("run", Recipe(), "run already holds a run; choose another --out, or continue it with --resume$"),
        ("run", ProbeRecipe(), "run already holds a run; choose another --out$"),
        ("probe", ProbeRecipe(), "probe already holds a probe; choose another --out, or continue it with --resume$"),
        ("probe", Recipe(), "probe already holds a probe; choose another --out$"),
        ("probe", None, "probe already holds a probe; choose another --out$"),
    ],
)
def test_only_what_can_be_resumed_is_said_to_be(folders, name, recipe, message):
    with pytest.raises(BadInput, match=message):
        RunFolder(folders / name).check_free(recipe)


def test_links_are_allowed_where_weights_and_biases_makes_them(folders):
    run = folders / "run"
    logs = run / "wandb" / "offline-run-20260101_000000-abc" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to("/elsewhere")
    check_no_links(run)
    (run / "wandb" / "latest").symlink_to("/elsewhere")
    with pytest.raises(BadInput, match="latest is a link"):
        check_no_links(run)
    (run / "wandb" / "latest").unlink()
    (run / "eval" / "wandb" / "x").mkdir(parents=True)
    (run / "eval" / "wandb" / "x" / "link").symlink_to("/elsewhere")
    with pytest.raises(BadInput, match="link is a link"):
        check_no_links(run)
