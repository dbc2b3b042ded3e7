"""The strategy of a run, from its recipe and the launcher's environment: DDP, or a DeepSpeed configuration.

Nothing here imports DeepSpeed; `train/distributed/accelerator.py` does, with the configuration made here.
"""

import os
from pathlib import Path
from typing import Any

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular_file

DeepSpeedConfig = dict[str, Any]
LEAST_STAGE = {"offload_optimizer": 1, "offload_param": 3}  # of ZeRO, for each kind of offloading
UNSUPPORTED = ("parameter_alignment", "zero_quantized_weights", "zero_hpz_partition_size")
RECIPE_SECTIONS = ("optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "data_types")


def resolve_strategy(setting: str | None) -> DeepSpeedConfig | None:
    """The DeepSpeed configuration to use, or None for DDP (and for one process).

    Args:
        setting: `ddp`, the path of a DeepSpeed JSON, or None for what the launcher asks for.

    Raises:
        BadInput: recipe and launcher contradict each other, or the file is not a DeepSpeed configuration for ZeRO.
    """
    launched_with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    launcher_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if launched_with_deepspeed and setting == "ddp":
        raise BadInput("strategy is ddp, but the launcher asks for DeepSpeed; drop one of the two")
    if setting is None and launched_with_deepspeed:
        if launcher_file == "none":
            raise BadInput("the launcher asks for DeepSpeed without a file; add --deepspeed_config_file ds_configs/...")
        setting = launcher_file
    if setting in (None, "ddp"):
        return None
    if launched_with_deepspeed and launcher_file != "none" and Path(launcher_file).resolve() != Path(setting).resolve():
        raise BadInput(f"strategy is {setting}, but the launcher has {launcher_file}; they must agree")
    return _read_config(Path(setting))


def _read_config(path: Path) -> DeepSpeedConfig:
    try:
        config = parse_json(read_regular_file(path))
    except FileNotFoundError:
        raise BadInput(
            f"strategy: {path} does not exist; give `ddp` or a DeepSpeed JSON such as ds_configs/zero2.json"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"strategy: {path} is not readable as JSON ({error})") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        stage = zero.get("stage") if isinstance(zero, dict) else None
        raise BadInput(f"strategy: {path}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage}")
    _check_zero(zero, path)
    return config


def _check_zero(zero: dict[str, Any], path: Path) -> None:
    for name, least_stage in LEAST_STAGE.items():
        device = _offload_device(zero, name)
        if device not in ("cpu", "none"):
            raise BadInput(f"strategy: {path}: zero_optimization.{name}.device must be cpu or none, not {device}")
        if device == "cpu" and zero["stage"] < least_stage:
            raise BadInput(f"strategy: {path}: zero_optimization.{name} needs stage {least_stage} or higher")
    for name in UNSUPPORTED:
        if zero.get(name):
            raise BadInput(f"strategy: {path}: zero_optimization.{name} is not supported; remove it")


def _offload_device(zero: dict[str, Any], name: str) -> Any:
    return (zero.get(name) or {"device": "none"}).get("device")


def zero_stage(config: DeepSpeedConfig | None) -> int | None:
    """The ZeRO stage of a configuration, None for DDP."""
    return None if config is None else config["zero_optimization"]["stage"]


def strategy_name(config: DeepSpeedConfig | None, ranks: int) -> str:
    """The name of a strategy for the log."""
    if config is None:
        return "DDP" if ranks > 1 else "one process"
    zero = config["zero_optimization"]
    offloads = {"offload_optimizer": "optimizer", "offload_param": "weights"}
    on_cpu = [word for name, word in offloads.items() if _offload_device(zero, name) == "cpu"]
    return f"DeepSpeed ZeRO-{zero['stage']}" + (f" with {' and '.join(on_cpu)} on the CPU" if on_cpu else "")


def complete_deepspeed_config(
    config: DeepSpeedConfig, *, micro_batch: int, accumulation_steps: int, ranks: int, clip_norm: float | None
) -> DeepSpeedConfig:
    """A DeepSpeed configuration with every number that follows from the recipe.

    Args:
        config: from the file.
        micro_batch: the most stimuli in one micro-batch.
        accumulation_steps: micro-batches per optimizer step.
        ranks: number of processes.
        clip_norm: largest norm of the gradient, None for no clipping.

    Raises:
        BadInput: the file sets one of these to another value.
    """
    from_recipe = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch * accumulation_steps * ranks,
        "gradient_clipping": clip_norm or 0.0,
        # DeepSpeed calls NAdam and SGD "untested"; this project's tests compare them with DDP.
        "zero_allow_untested_optimizer": True,
        # With offloading DeepSpeed would use its own Adam, whatever the recipe's optimizer is.
        "zero_force_ds_cpu_optimizer": False,
    }
    for name, value in from_recipe.items():
        if config.get(name, value) != value:
            raise BadInput(
                f"strategy: {name} is {config[name]} in the file, but {value} in the recipe; remove it from the file"
            )
    for name in RECIPE_SECTIONS:
        if name in config:
            raise BadInput(f"strategy: the file has a section {name!r}, which belongs to the recipe; remove it")
    return config | from_recipe
