"""Recipes: what a YAML file may contain, and the messages for what is wrong with it."""

import re

import pytest
import yaml
from helpers import ROOT

from data_prep.common.errors import BadInput
from train.models.timm_networks import check_network_name
from train.run.recipe import ProbeRecipe, Recipe, load_recipe, save_recipe


def written(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path) -> str:
    """The one-sentence message with which a recipe is refused."""
    with pytest.raises(BadInput) as caught:
        load_recipe(path, Recipe)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_recipe_changes_what_it_names_and_nothing_else(tmp_path):
    text = """
task: {kind: hybrid, classification_weight: 0.5}
backbone:
  name: resnet18
  trainable: head
optimizer:
  clip_norm: 1.5
batch: {global_size: 64, per_device: 16}
epochs: 7
"""
    recipe = load_recipe(written(tmp_path, text), Recipe)
    assert (recipe.task.kind, recipe.task.classification_weight, recipe.task.regression_weight) == ("hybrid", 0.5, 1)
    assert (recipe.backbone.name, recipe.backbone.trainable) == ("resnet18", "head")
    assert recipe.optimizer.clip_norm == 1.5
    assert (recipe.batch.global_size, recipe.batch.per_device) == (64, 16)
    assert recipe.epochs == 7
    untouched = Recipe()
    assert recipe.schedule == untouched.schedule
    assert recipe.early_stopping == untouched.early_stopping
    assert (recipe.optimizer.name, recipe.seed) == (untouched.optimizer.name, untouched.seed)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}"])
def test_an_empty_recipe_is_the_default(tmp_path, text):
    assert load_recipe(written(tmp_path, text), Recipe) == Recipe()


@pytest.mark.parametrize("number", ["2e-4", "2.0e-4", "0.0002", '"2e-4"'])
def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path, number):
    """YAML 1.1 reads 2e-4 as a string."""
    assert load_recipe(written(tmp_path, f"optimizer: {{lr: {number}}}"), Recipe).optimizer.lr == 2e-4


@pytest.mark.parametrize(
    ("text", "where", "nearest"),
    [
        ("optimizer: {learning_rate: 1}", "optimizer.learning_rate", None),
        ("optimizer: {weight_deca: 1}", "optimizer.weight_deca", "weight_decay"),
        ("optimiser: {lr: 1}", "optimiser", "optimizer"),
        ("epoch: 3", "epoch", "epochs"),
        ("batch: {per_devise: 3}", "batch.per_devise", "per_device"),
        ("early_stopping: {inner-fraction: 0.2}", "early_stopping.inner-fraction", "inner_fraction"),
        ("task: {knd: hybrid}", "task.knd", "kind"),
    ],
)
def test_an_unknown_name_suggests_the_nearest_one(tmp_path, text, where, nearest):
    message = refusal(written(tmp_path, text))
    assert f"{where} is not a setting" in message
    if nearest:
        assert f"did you mean {nearest}?" in message


def test_a_name_unlike_any_other_lists_all_names(tmp_path):
    message = refusal(written(tmp_path, "schedule: {xyzzy: 1}"))
    assert "kind" in message
    assert "warmup" in message


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("optimizer: {lr: -1}", "optimizer.lr"),
        ("optimizer: {lr: 0}", "optimizer.lr"),
        ("optimizer: {lr: fast}", "optimizer.lr"),
        ("optimizer: {lr: .nan}", "optimizer.lr"),
        ("optimizer: {lr: .inf}", "optimizer.lr"),
        ("optimizer: {name: adagrad}", "optimizer.name"),
        ("optimizer: 3", "optimizer"),
        ("optimizer: [lr, 3]", "optimizer"),
        ("epochs: 0", "epochs"),
        ("epochs: 2.5", "epochs"),
        ("epochs: many", "epochs"),
        ("epochs:", "epochs"),
        ("seed: -1", "seed"),
        ("batch: {global_size: 0}", "batch.global_size"),
        ("early_stopping: {split: test}", "early_stopping.split"),
        ("early_stopping: {inner_fraction: 1}", "early_stopping.inner_fraction"),
        ("task: {kind: clasification}", "task.kind"),
        ("precision: fp8", "precision"),
        ("images: {size: 4}", "images.size"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path, text, where):
    assert f": {where}: " in refusal(written(tmp_path, text))


@pytest.mark.parametrize("text", ["- epochs\n- 3\n", "epochs", "3", "false", "0"])
def test_a_recipe_must_be_a_mapping(tmp_path, text):
    assert "must contain sections" in refusal(written(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["optimizer: {lr: 1", "a: b: c", "\tepochs: 3", "x: !!python/object/apply:os.getcwd []"]
)
def test_a_recipe_must_be_yaml(tmp_path, text):
    """YAML that would run code is refused too."""
    assert "cannot be read as YAML" in refusal(written(tmp_path, text))


def test_unreadable_recipe_files_are_refused(tmp_path):
    assert "no such recipe" in refusal(tmp_path / "nowhere.yaml")
    assert "cannot be read" in refusal(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00epochs")
    assert "cannot be read" in refusal(binary)


CONTRADICTIONS = {
    "top1 of a regression": ({"early_stopping": {"metric": "top1"}}, ("early_stopping.metric", "task.kind")),
    "r2 of a classification": (
        {"task": {"kind": "classification"}, "early_stopping": {"metric": "r2"}},
        ("early_stopping.metric", "task.kind"),
    ),
    "more per device than in all": (
        {"batch": {"global_size": 8, "per_device": 16}},
        ("batch.per_device", "16", "batch.global_size", "8"),
    ),
}


# A setting that would have no effect, and what it would need.
IGNORED = {
    "task.regression_weight of one task": ({"task": {"regression_weight": 2.0}}, "task.kind hybrid"),
    "task.classification_weight of one task": (
        {"task": {"kind": "classification", "classification_weight": 0.5}},
        "task.kind hybrid",
    ),
    "task.regression_weight that is learned": (
        {"task": {"kind": "hybrid", "weighting": "uncertainty", "regression_weight": 2.0}},
        "task.weighting fixed",
    ),
    "task.classification_weight that is learned": (
        {"task": {"kind": "hybrid", "weighting": "uncertainty", "classification_weight": 2.0}},
        "task.weighting fixed",
    ),
    "task.weighting of one task": ({"task": {"weighting": "uncertainty"}}, "task.kind hybrid"),
    "task.shuffle_responses without responses": (
        {"task": {"kind": "classification", "shuffle_responses": True}},
        "task.kind regression or hybrid",
    ),
    "loss.responses without responses": (
        {"task": {"kind": "classification"}, "loss": {"responses": "poisson"}},
        "task.kind regression or hybrid",
    ),
    "loss.label_smoothing without classes": (
        {"loss": {"label_smoothing": 0.1}},
        "task.kind classification or hybrid",
    ),
    "readout.kind without responses": (
        {"task": {"kind": "classification"}, "readout": {"kind": "factorised"}},
        "task.kind regression or hybrid",
    ),
    "readout.rank of another readout": ({"readout": {"rank": 8}}, "readout.kind low_rank"),
    "backbone.gradient_checkpointing of a frozen backbone": (
        {"backbone": {"trainable": "head", "gradient_checkpointing": True}},
        "backbone.trainable all",
    ),
    "optimizer.backbone_lr_factor of a frozen backbone": (
        {"backbone": {"trainable": "head"}, "optimizer": {"backbone_lr_factor": 0.1}},
        "backbone.trainable all",
    ),
    "schedule.cycle_momentum of another schedule": (
        {"schedule": {"kind": "cosine", "cycle_momentum": True}},
        "schedule.kind onecycle",
    ),
    "schedule.plateau_factor of another schedule": (
        {"schedule": {"plateau_factor": 0.5}},
        "schedule.kind plateau",
    ),
    "early_stopping.inner_fraction of no inner split": (
        {"early_stopping": {"split": "val", "inner_fraction": 0.2}},
        "early_stopping.split inner",
    ),
    "optimizer.momentum that is cycled": (
        {"optimizer": {"momentum": 0.8}, "schedule": {"cycle_momentum": True}},
        "schedule.cycle_momentum false",
    ),
    "schedule.plateau_patience of another schedule": (
        {"schedule": {"kind": "constant", "plateau_patience": 9}},
        "schedule.kind plateau",
    ),
}


@pytest.mark.parametrize("case", IGNORED)
def test_a_setting_that_would_be_ignored_is_refused(case):
    settings, needs = IGNORED[case]
    setting = case.partition(" ")[0]
    section, name = setting.split(".")
    with pytest.raises(BadInput) as caught:
        Recipe.model_validate(settings).check()
    message = str(caught.value)
    assert f"{setting} ({settings[section][name]})" in message
    assert needs in message
    default = getattr(getattr(Recipe(), section), name)
    assert f"leave it at {default}" in message
    Recipe.model_validate({**settings, section: {**settings[section], name: default}}).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"task": {"kind": "hybrid", "regression_weight": 2, "classification_weight": 0.5, "shuffle_responses": True}},
        {"task": {"kind": "hybrid", "weighting": "uncertainty"}, "loss": {"responses": "poisson"}},
        {"task": {"kind": "classification"}, "loss": {"label_smoothing": 0.1}, "readout": {"start": "ridge"}},
        {"readout": {"kind": "low_rank", "rank": 8}, "backbone": {"gradient_checkpointing": True}},
        {"schedule": {"kind": "plateau", "plateau_factor": 0.5, "plateau_patience": 9}},
        {"schedule": {"cycle_momentum": True}, "optimizer": {"backbone_lr_factor": 0.1}},
        {"backbone": {"trainable": "head", "batch_norm": "frozen"}},
    ],
)
def test_settings_that_have_an_effect_pass(settings):
    Recipe.model_validate(settings).check()


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(case):
    settings, words = CONTRADICTIONS[case]
    with pytest.raises(BadInput) as caught:
        Recipe.model_validate(settings).check()
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("settings", "metric"),
    [
        ({}, "r2"),
        ({"task": {"kind": "hybrid"}}, "r2"),
        ({"task": {"kind": "classification"}}, "top1"),
        ({"task": {"kind": "hybrid"}, "early_stopping": {"metric": "top1"}}, "top1"),
        ({"loss": {"responses": "correlation"}}, "pearson_r"),
        ({"early_stopping": {"metric": "pearson_r"}, "batch": {"global_size": 8, "per_device": 8}}, "pearson_r"),
    ],
)
def test_settings_that_agree_pass_and_say_what_selects(settings, metric):
    recipe = Recipe.model_validate(settings)
    recipe.check()
    assert recipe.selection_metric == metric


def test_saved_recipes_load_as_they_were(tmp_path):
    for settings in (
        {},
        {
            "optimizer": {"lr": 2e-7, "clip_norm": None, "name": "sgd"},
            "seed": 2**40,
            "strategy": "ds_configs/zero2.json",
        },
        {"backbone": {"weights": "C:\\päth: with #signs.pth", "name": "null"}, "images": {"size": 224}},
    ):
        recipe = Recipe.model_validate(settings)
        save_recipe(recipe, tmp_path / "saved.yaml")
        assert load_recipe(tmp_path / "saved.yaml", Recipe) == recipe


def test_a_saved_recipe_names_every_setting(tmp_path):
    """A run must not change if a later version has other defaults."""
    save_recipe(Recipe(), tmp_path / "saved.yaml")
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert saved.keys() == Recipe.model_fields.keys()
    assert saved["optimizer"].keys() == type(Recipe().optimizer).model_fields.keys()


@pytest.mark.parametrize("path", sorted(ROOT.glob("train/recipes/*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid(path):
    load_recipe(path, Recipe).check()


@pytest.mark.parametrize("path", sorted(ROOT.glob("train/recipes/probes/*.yaml")), ids=lambda path: path.stem)
def test_presets_of_probes_are_valid(path):
    recipe = load_recipe(path, ProbeRecipe)
    recipe.check()
    check_network_name(recipe.backbone.name)


def test_a_probes_recipe_is_read_and_refused_likewise(tmp_path):
    recipe = load_recipe(written(tmp_path, "layers: [layer3, layer4]\nbackbone: {name: resnet18}"), ProbeRecipe)
    assert (list(recipe.layers), recipe.backbone.name) == (["layer3", "layer4"], "resnet18")
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml", ProbeRecipe) == recipe
    for text, message in (
        ("layer: [layer3]", "layer is not a setting; did you mean layers?"),
        ("backbone: {nam: resnet18}", "backbone.nam is not a setting; did you mean name?"),
        ("layers: 3", "layers"),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            load_recipe(written(tmp_path, text), ProbeRecipe)
    with pytest.raises(BadInput, match="pixels"):
        ProbeRecipe(layers=["pixels", "layer3"]).check()


# ---- the loader's order --------------------------------------------------------------------------------------------


def test_settings_that_the_order_ignores_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"loader\.block_shards \(4\) has an effect only with loader\.order blocks"):
        load_recipe(written(tmp_path, "loader: {block_shards: 4}"), Recipe).check()
    load_recipe(written(tmp_path, "loader: {order: blocks, block_shards: 4}"), Recipe).check()
    for setting in ("order: blocks", "block_shards: 4"):
        with pytest.raises(BadInput, match=r"loader\.\w+ is for training only"):
            load_recipe(written(tmp_path, f"loader: {{{setting}}}"), ProbeRecipe).check()
