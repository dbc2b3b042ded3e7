"""The command line that trains as a plan recommends."""

import shlex

from data_prep.remote.url import parse_location
from train.planning.options import Plan
from train.planning.recommendation import StrategyEstimate

PLAN_OPTIONS = ("--data", "--stimuli", "--sites", "--classes", "--gpus", "--memory", "--machines", "--rates")
REPLACED_SETTINGS = ("--batch.per-device", "--strategy")


def launch_command(estimate: StrategyEstimate, options: Plan, words: list[str], *, on_cpu: bool = False) -> str:
    """The command line that trains as recommended, with the recipe and the settings that the plan was given.

    Args:
        estimate: that is recommended.
        options: of the plan.
        words: of the plan's command line.
        on_cpu: whether processes compute on the CPU.
    """
    names_recipe = words[0].endswith((".yaml", ".yml"))
    recipe, flags = (words[:1], words[1:]) if names_recipe else ([], words)
    data = [str(parse_location(location)) for location in options.data] if options.data else ["DIR"]
    words_of_command = [
        _cpu_launcher(options) if on_cpu else _launcher(estimate.strategy, options),
        shlex.join(["train/finetune.py", *recipe, "--data", *data, "--out", "RUN", *settings_of(flags)]),
    ]
    if options.strategy is not None or (on_cpu and estimate.strategy != "ddp"):
        words_of_command.append(f"--strategy {_strategy_setting(estimate.strategy)}")
    words_of_command.append(f"--batch.per_device {estimate.per_device}")
    return " ".join(words_of_command)


def _launcher(strategy: str, options: Plan) -> str:
    if options.gpus == 1 and strategy == "ddp":
        return "python"
    words = f"accelerate launch --config_file launch/accelerate/{strategy}.yaml --num_processes {options.gpus}"
    if options.machines == 1:
        return words
    machines = f"--num_machines {options.machines} --machine_rank RANK --main_process_ip HOST"
    return f"{words} {machines} --main_process_port 29500"


def _cpu_launcher(options: Plan) -> str:
    count = options.gpus // options.machines
    if options.machines == 1:
        return f"launch/local.sh -n {count}"
    return f"launch/machines.sh --host HOST --machines {options.machines} --job NAME -n {count}"


def _strategy_setting(name: str) -> str:
    return name if name == "ddp" else f"ds_configs/{name}.json"


def settings_of(words: list[str]) -> list[str]:
    """The words of a command line without the plan's own options and the settings that it decides."""
    remaining, is_dropped = [], False
    for word in words:
        if word.startswith("--"):
            is_dropped = word.partition("=")[0].replace("_", "-") in (*PLAN_OPTIONS, *REPLACED_SETTINGS)
        if not is_dropped:
            remaining.append(word)
    return remaining
