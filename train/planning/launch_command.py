"""The command line that trains as a plan recommends."""

import shlex

from data_prep.remote.url import parse_location
from train.planning.memory import Choice
from train.planning.options import Plan

OWN_OPTIONS = ("--data", "--sites", "--classes", "--gpus", "--memory", "--machines")
REPLACED = ("--batch.per-device", "--strategy")


def command(choice: Choice, options: Plan, words: list[str]) -> str:
    """The command line that trains as recommended, with the recipe and the settings that the plan was given."""
    data = shlex.join(str(parse_location(place)) for place in options.data) if options.data else "DIR"
    strategy = "" if options.strategy is None else f" --strategy {_strategy_setting(choice.strategy)}"
    recipe, flags = ([words[0]], words[1:]) if words[0].endswith((".yaml", ".yml")) else ([], words)
    return (
        f"{_launcher(choice.strategy, options)} {shlex.join(['train/finetune.py', *recipe])} --data {data} --out RUN"
        f"{' ' * bool(kept := settings_of(flags))}{shlex.join(kept)}{strategy} --batch.per_device {choice.per_device}"
    )


def _launcher(strategy: str, options: Plan) -> str:
    if options.gpus == 1 and strategy == "ddp":
        return "python"
    words = f"accelerate launch --config_file launch/accelerate/{strategy}.yaml --num_processes {options.gpus}"
    if options.machines == 1:
        return words
    machines = f"--num_machines {options.machines} --machine_rank RANK --main_process_ip HOST"
    return f"{words} {machines} --main_process_port 29500"


def _strategy_setting(name: str) -> str:
    return name if name == "ddp" else f"ds_configs/{name}.json"


def settings_of(words: list[str]) -> list[str]:
    """The words of a command line that are settings of the recipe and not what the plan decides or alone reads."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0].replace("_", "-") in (*OWN_OPTIONS, *REPLACED)
        if not dropping:
            kept.append(word)
    return kept
