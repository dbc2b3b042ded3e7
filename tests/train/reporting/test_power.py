"""Reports and plans say what a recording can decide: with trials, without, of several recordings, and as asked."""

import json
import re

import numpy as np
import pytest
from helpers import assert_refused, run_here, succeed_here
from make_runs import guess, make_run

from data_prep.common.atomic_writes import write_json, write_npz
from data_prep.shards.folder import ShardFolder
from train.evaluation.power.components import Components, Design
from train.evaluation.power.influence import PLANNED
from train.evaluation.power.learning import fit_learning_curve
from train.evaluation.power.planning import Question, need
from train.evaluation.power.study import Study
from train.evaluation.power.trials import Trials
from train.reporting.groups import groups_of
from train.reporting.power.recorded_trials import trials_of
from train.reporting.power.wording import Subject, finding
from train.reporting.run_reading import read_run
from train.run.recipe import Recipe

PLAN = "train/plan.py"


@pytest.fixture(scope="module")
def shards(recording):
    """The recording's training stimuli, which the runs here are said to be scored on."""
    return ShardFolder(recording).split("train")


def scored(path, shards, noise, seed=1, target=None, data=None, **more):
    """A run that is off by `noise` standard deviations of each site's responses."""
    target = shards.rates() if target is None else target
    prediction = target + noise * target.std(axis=0) * guess(np.zeros_like(target), 1, seed)
    make_run(path, target, prediction, **more)
    arrays = {"stimulus_id": np.array(shards.stimulus_ids), "site_id": np.array(shards.manifest.site_ids)}
    write_npz(path / "eval/val/predictions.npz", arrays | {"prediction": prediction, "target": target})
    env = json.loads((path / "env.json").read_text())
    write_json(path / "env.json", env | {"data": str(shards.folder if data is None else data)})
    return path


def plan(*words):
    return succeed_here(PLAN, "--runs", *words).stdout


def one_line(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Three runs: two close to each other, one clearly behind."""
    folder = tmp_path_factory.mktemp("power")
    noises = {"first": 0.80, "second": 0.82, "third": 1.3}
    return [
        scored(folder / name, shards, noise, seed, training_stimuli=585)
        for seed, (name, noise) in enumerate(noises.items())
    ]


@pytest.fixture(scope="module")
def study(runs, shards):
    """The lead of the first run over the second, by the parts that the report is made of."""
    predictions = []
    for run in runs[:2]:
        with np.load(run / "eval/val/predictions.npz") as arrays:
            predictions.append(arrays["prediction"])
    trials = shards.trials()
    return Study(shards.rates(), predictions, PLANNED["r2"], Trials.of(trials))


@pytest.fixture(scope="module")
def reported(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    done = succeed_here("train/report.py", *runs, "--out", out)
    return out, done.stdout, json.loads((out / "power.json").read_text())


def test_a_report_says_what_it_would_take_to_tell_the_best_two_apart(reported, runs, study):
    out, output, content = reported
    (recording,) = content["recordings"]
    question = Question(comparisons=3)
    needed = need(study, Design(195, 12), question)
    assert needed.stimuli > 195
    sentence = recording["sentence"]
    assert sentence.startswith("To tell first from second with 80 % power for other stimuli at these sites")
    assert "corrected for 3 comparisons" in sentence
    assert f"{needed.stimuli - 195:,} more scored stimuli ({needed.stimuli:,} in all)" in sentence
    assert sentence in output
    page = (out / "report.html").read_text()
    assert sentence.replace("R2", "R²") in page
    assert "figures/power.pdf, .svg, .png" in page
    lead = recording["differences"][0]
    assert (lead["better"], lead["worse"]) == ("first", "second")
    assert lead["needed"]["stimuli"]["stimuli"] == needed.stimuli
    assert lead["power"]["stimuli"] == pytest.approx(question.power_of(study, study.design))
    for population, (low, high) in lead["intervals"].items():
        assert (low, high) == pytest.approx(study.components().interval(study.design, population))
    assert recording["repetitions"] == pytest.approx(6)
    assert recording["comparisons"] == 3


def test_the_grid_of_designs_is_that_of_the_study(reported, study):
    designs = reported[2]["recordings"][0]["designs"]
    assert designs["of"] == ["first", "second"]
    assert designs["repetitions"] == [1, 3, 6, 12]
    for row, repetitions in enumerate(designs["repetitions"]):
        components = study.components(repetitions)
        for column, stimuli in enumerate(designs["stimuli"]):
            half = components.half_width(Design(stimuli, 12), "both")
            assert designs["half_width"]["both"][row][column] == pytest.approx(half)
    assert np.all(np.diff(designs["half_width"]["stimuli"], axis=1) < 0)
    assert np.all(np.diff(designs["power"], axis=1) >= 0)


def test_ranks_and_adjusted_intervals_are_in_the_table_and_the_file(reported):
    out, _, content = reported
    text = (out / "table.md").read_text()
    table = text[text.index("#### Ranks by R2") :].splitlines()
    models = content["recordings"][0]["models"]
    assert [model["model"] for model in models] == ["first", "second", "third"]
    for model, line in zip(models, table[4:7], strict=True):
        low, high = model["adjusted"]
        assert line.startswith(f"| {model['model']} | {model['value']:.3f} [{low:.3f}, {high:.3f}] |")
        assert sum(model["ranks"]["probability"]) == pytest.approx(1)
    assert models[2]["ranks"]["best"] == models[2]["ranks"]["worst"] == 3
    assert models[2]["ranks"]["probability"][2] == 1
    assert "| 3 | 0% | 0% | 100% |" in table[6]


# ------------------------------------------------------------------------------------------------------------ trials


def group_of(*paths):
    (group,) = groups_of([reported for path in paths for reported in read_run(path, "val", path.name)])
    return group


def test_trials_are_read_only_where_they_are_those_that_were_scored(shards, runs, recording, tmp_path):
    assert trials_of(group_of(runs[0])).trials.repetitions == pytest.approx(6)
    shifted = scored(tmp_path / "shifted", shards, 0.8, target=shards.rates() + 1)
    reason = trials_of(group_of(shifted)).source
    assert reason == f"what was scored is not the average of the trials in {recording}"
    gone = scored(tmp_path / "gone", shards, 0.8, data=tmp_path / "nowhere")
    assert trials_of(group_of(gone)).source == f"{tmp_path / 'nowhere'} is not there"
    assert trials_of(group_of(gone), [str(recording)]).trials is not None
    assert trials_of(group_of(gone), [str(tmp_path)]).trials is None


def test_trials_that_tell_nothing_are_said_to(shards, runs, recording, monkeypatch):
    trials = shards.trials()
    trials[3] = np.nan
    monkeypatch.setattr("train.reporting.power.recorded_trials._read", lambda *_: trials)
    found = trials_of(group_of(runs[0]))
    assert found.trials is None
    assert found.source == f"{recording} has one trial of most stimuli, or none of some"


def test_addresses_in_a_run_folder_are_not_followed(shards, tmp_path, monkeypatch):
    run = scored(tmp_path / "run", shards, 0.8, data="https://example.org/shards")
    monkeypatch.setattr("train.reporting.power.recorded_trials.ShardFolder", lambda *_: pytest.fail("it was opened"))
    assert "do not say which shards" in trials_of(group_of(run)).source


def test_without_trials_only_stimuli_and_sites_are_planned_and_it_says_so(shards, tmp_path):
    pair = [scored(tmp_path / name, shards, 0.8, seed, data="gone") for seed, name in enumerate("ab")]
    text = plan(*pair)
    assert "none, so stimuli and sites only (gone is not there)" in text
    assert "what more repetitions would do is not known (gone is not there)" in one_line(text)
    for option in ("repetitions", "presentations"):
        refused = run_here(PLAN, "--runs", *pair, f"--{option}", "40")
        assert_refused(refused, f"{option}: without single trials", "gone is not there", "--data")


# ------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_answers_for_a_design(runs, study):
    text = plan(*runs[:2], "--scored", "800", "--repetitions", "12", "--sites", "40")
    design, question = Design(800, 40, 12), Question()
    components = study.components(12)
    assert "design: 800 scored stimuli, 40 sites, 12 repetitions\n" in text
    assert "13 repetitions (EXTRAPOLATED: more than twice" in plan(*runs[:2], "--repetitions", "13")
    assert re.search(rf"expected +{components.value:.4f}\n", text)
    for population, words in (("stimuli", "for other stimuli at these sites"), ("both", "for other stimuli and other")):
        half = components.half_width(design, population)
        assert re.search(rf"{words}.* ± {half:.4f}\n", text), population
    power = question.power_of(study, design)
    assert re.search(
        rf"power +{power:.2f} for other stimuli at these sites, if it truly is {components.value:.4f}", text
    )
    smallest = question.smallest_difference(study, design)
    assert f"{smallest:.4f} is found with 80 % power" in text


def test_a_given_difference_shows_less_with_fewer_repetitions(runs, study):
    text = plan(*runs[:2], "--difference", "0.05", "--repetitions", "2")
    shown = 0.05 * study.shrinkage(2)
    assert shown < 0.05
    assert f"if it truly is {shown:.4f}" in text


def test_how_few_would_do_is_said_only_as_far_as_plans_hold(runs):
    """A lead that a handful of stimuli and a site or two would show."""
    printed = one_line(plan(runs[0], runs[2], "--scored", "200"))
    assert "fewer than 80 of the 200 scored stimuli" in printed
    assert "2 of the 6 repetitions" in printed  # where one would do
    assert not re.search(r"\b[1-9] of the \d+ sites", printed)


class Noisy:
    """A difference whose noise falls with the repetitions, of which 6.6 were recorded on average."""

    design, repetitions = Design(100, 20), 6.6

    def components(self, repetitions=None):
        return Components(0.05, stimulus=0.1 / (repetitions or 6.6), site=0.01, rest=0.3)

    def shrinkage(self, repetitions):
        return 1.0


def test_a_part_of_a_repetition_is_one_more():
    planned, subject = Noisy(), Subject(["a", "b"], "R2", Noisy(), "")
    difference = Question().smallest_difference(planned, Design(100, 20, 6.8))
    assert "1 more repetition of these (7 in all)" in finding(subject, planned.design, Question(difference=difference))


def test_presentations_are_divided_as_well_as_they_can_be(runs, study):
    text = plan(*runs[:2], "--presentations", "6000", "--difference", "0.05")
    assert "6,000 presentations, 25% of the stimuli scored" in text  # 195 of 780
    rows = [line.split() for line in text.splitlines() if re.match(r"\*? +\d+ +[\d,]+ +[\d,]+ +", line)]
    powers = {int(row[-6]): float(row[-1]) for row in rows}
    (best,) = (row for row in rows if row[0] == "*")
    assert float(best[-1]) == max(powers.values())
    shown = 6000 // int(best[-6])
    assert ("EXTRAPOLATED: it has more than twice" in text) == (int(best[-6]) > 12)
    assert (best[-5], best[-4]) == (f"{shown:,}", f"{shown // 4:,}")
    power = Question(difference=0.05).power_of(study, Design(shown // 4, 12, int(best[-6])))
    assert float(best[-1]) == pytest.approx(power, abs=0.006)


def test_one_run_alone_is_planned_for_its_score(runs):
    text = plan(runs[0], "--population", "both")
    assert re.search(r"R2 of first is 0\.\d+, known to within 0\.\d+ for other stimuli at these sites", text)
    assert "power" not in text
    for option, value in (("difference", 0.1), ("comparisons", 3), ("power", 0.9)):
        refused = run_here(PLAN, "--runs", runs[0], f"--{option}", value)
        assert_refused(refused, f"{option}: one run alone has none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stimuli", "1000"], "stimuli: how scores grow with training stimuli is not known"),
        (["--held_out", "0.5"], "held_out: it divides --presentations"),
        (["--split", "test"], "runs: none of these has predicted responses to test"),
        (["--repetitions", "0"], "repetitions: "),
        (["--scored", "9"], "scored: "),
        (["--scord", "9"], "did you mean --scored?"),
    ],
)
def test_what_cannot_be_planned_is_refused(runs, words, message):
    assert_refused(run_here(PLAN, "--runs", *runs[:2], *words), message)


def scored_on_two(path, shards, noises, seed=1, on_second=None, **more):
    """A run on two recordings, here with the same stimuli and other responses, with `noises` on each."""
    scored(path, shards, noises[0], seed, **more)
    other, target = path.with_name(f"{path.name}_other"), shards.rates()[:, ::-1].copy()
    scored(other, shards, noises[1], seed + 5, target=target, recording="other", **more, **(on_second or {}))
    (path / "eval/val").rename(path / "first")
    (path / "eval/val").mkdir()
    (path / "first").rename(path / "eval/val/made_up")
    (other / "eval/val").rename(path / "eval/val/other")
    return path


def test_several_recordings_are_planned_each_and_joined(shards, tmp_path):
    """Three runs on two recordings; one is a control on one of them."""
    runs = []
    for seed, name in enumerate(("one", "two", "three")):
        noises, control = (0.8 + 0.05 * seed, 0.9 + 0.05 * seed), {"control": "shuffled"} if name == "one" else {}
        runs.append(scored_on_two(tmp_path / name, shards, noises, seed, on_second=control))
    text = plan(*runs)
    titles = [line for line in text.splitlines() if line.startswith(("made_up", "other"))]
    assert titles[0].startswith("made_up: 12 sites")
    assert titles[1].startswith("other: 12 sites")
    assert titles[2].startswith("made_up + other: mean over these")
    values = [float(value) for value in re.findall(r"expected +(-?\d\.\d+)", text)]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2, abs=2e-4)
    out = tmp_path / "report"
    succeed_here("train/report.py", *runs, "--out", out)
    joined = json.loads((out / "power.json").read_text())["joined"]
    assert joined["recordings"] == ["made_up", "other"]
    assert joined["runs"] == [str(run) for run in runs[:2]]
    assert joined["comparisons"] == 3
    assert "Mean over made_up + other, numbers in each: " in joined["sentence"]
    assert all(part in joined["sentence"] for part in ("one (CONTROL: shuffled)", "corrected for 3 comparisons"))


# --------------------------------------------------------------------------------------------------- learning curves


def test_a_power_law_is_found_again():
    sizes = [50, 100, 200, 400, 800]
    curve = fit_learning_curve(sizes, [0.5 - 2 * size**-0.5 for size in sizes])
    assert (curve.most, curve.loss, curve.rate) == pytest.approx((0.5, 2, 0.5), rel=1e-6)
    assert curve.at(3200) == pytest.approx(0.5 - 2 * 3200**-0.5)
    assert curve.is_measured(800)
    assert not curve.is_measured(801)
    assert fit_learning_curve([100, 200], [0.1, 0.2]) is None
    flat = fit_learning_curve([100, 200, 400], [0.4, 0.3, 0.2])
    assert flat.at(10**6) == pytest.approx(0.3)


def test_training_stimuli_are_planned_by_the_learning_curves(shards, tmp_path):
    """Of two systems, of which the better gains more; only their runs on most stimuli are compared."""
    runs = []
    for seed, (system, gap) in enumerate((("deep", 0.6), ("flat", 0.2))):
        for size in (100, 200, 400):
            recipe = Recipe.model_validate({"subset": size, "epochs": 3 + seed})
            noise = 0.75 + gap * (100 / size) ** 0.5 + 0.5 * seed
            path = tmp_path / f"{system}_{size}"
            runs.append(scored(path, shards, noise, seed, recipe=recipe, training_stimuli=size))
    now, then = plan(*runs), plan(*runs, "--stimuli", "3200")
    assert "R2 of deep_400 less that of flat_400" in now
    gain = float(re.search(r"3,200 stimuli change it by \+(\d\.\d+), EXTRAPOLATED", then)[1])
    values = [float(re.search(r"expected +(\d\.\d+)", text)[1]) for text in (now, then)]
    assert gain > 0
    assert values[1] - values[0] == pytest.approx(gain, abs=2e-4)
    divided = plan(*runs, "--presentations", "6000")
    assert "chosen by the learning curves" in divided


def test_learning_curves_of_several_recordings_are_those_of_the_same_two_systems(shards, tmp_path):
    """Of which the better on the first recording is the worse on the second."""
    runs, noise = [], {"deep": ((0.6, 0.6), (0.9, 0.3)), "flat": ((1.0, 0.2), (0.8, 0.2))}
    for seed, (system, on_each) in enumerate(noise.items()):
        for size in (100, 200, 400):
            recipe = Recipe.model_validate({"subset": size, "epochs": 3 + seed})
            noises = [least + gap * (100 / size) ** 0.5 for least, gap in on_each]
            path = tmp_path / f"{system}_{size}"
            runs.append(scored_on_two(path, shards, noises, seed, recipe=recipe, training_stimuli=size))
    text = plan(*runs, "--stimuli", "800")
    planned = re.findall(r"planned +R2 of (\w+)_400.* less that of (\w+)_400", text)
    assert planned == [("deep", "flat"), ("flat", "deep"), ("deep", "flat")]
    on_first, on_second, mean = (float(gain) for gain in re.findall(r"800 stimuli change it by ([+-]\d\.\d+)", text))
    assert mean == pytest.approx((on_first - on_second) / 2, abs=2e-4)
    assert abs(on_second) > 0.001
