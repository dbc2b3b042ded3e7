"""Which strategy a run trains under, from the recipe and the launcher's environment: DDP, or a DeepSpeed configuration.

Nothing here imports DeepSpeed; `train/distributed/runtime.py` does, with what is decided here.
"""

import os
from pathlib import Path
from typing import Any

from data_prep.common.errors import BadInput
from data_prep.common.safe_reading import parse_json, read_regular


def resolve_strategy(setting: str | None) -> dict[str, Any] | None:
    """The DeepSpeed configuration to use, or None for DDP (and for one process).

    Args:
        setting: `ddp`, the path of a DeepSpeed JSON, or None for what the launcher asked for.

    Raises:
        BadInput: recipe and launcher contradict each other, or the file is not readable as JSON.
    """
    launched_with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    launcher_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if launched_with_deepspeed and setting == "ddp":
        raise BadInput("strategy is ddp, but the launcher was told to use DeepSpeed; drop one of the two")
    if setting is None and launched_with_deepspeed:
        if launcher_file == "none":
            raise BadInput("the launcher asks for DeepSpeed without a file; add --deepspeed_config_file ds_configs/...")
        setting = launcher_file
    if setting in (None, "ddp"):
        return None
    if launched_with_deepspeed and launcher_file != "none" and Path(launcher_file).resolve() != Path(setting).resolve():
        raise BadInput(f"strategy is {setting}, but the launcher was given {launcher_file}; they must agree")
    return _read_deepspeed_json(Path(setting))


def _read_deepspeed_json(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(read_regular(path))
    except FileNotFoundError:
        raise BadInput(
            f"strategy: {path} is no file; give `ddp` or a DeepSpeed JSON such as ds_configs/zero2.json"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"strategy: {path} is not readable as JSON ({error})") from None
    _check_zero(config.get("zero_optimization") if isinstance(config, dict) else None, path)
    return config


def _check_zero(zero: Any, path: Path) -> None:
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        stage = zero.get("stage") if isinstance(zero, dict) else None
        raise BadInput(f"strategy: {path}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage}")
    for name, least_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(name) or {"device": "none"}).get("device")
        if device not in ("cpu", "none"):
            raise BadInput(f"strategy: {path}: zero_optimization.{name}.device must be cpu or none, not {device}")
        if device == "cpu" and zero["stage"] < least_stage:
            raise BadInput(f"strategy: {path}: zero_optimization.{name} needs stage {least_stage} or higher")
    for name in ("parameter_alignment", "zero_quantized_weights", "zero_hpz_partition_size"):
        if zero.get(name):
            raise BadInput(f"strategy: {path}: zero_optimization.{name} is not supported; remove it")


def zero_stage(config: dict[str, Any] | None) -> int | None:
    """The ZeRO stage of a configuration, None for DDP."""
    return None if config is None else config["zero_optimization"]["stage"]


def strategy_name(config: dict[str, Any] | None, ranks: int) -> str:
    """What a strategy is called, for the log."""
    if config is None:
        return "DDP" if ranks > 1 else "one process"
    zero = config["zero_optimization"]
    moved = {"offload_optimizer": "optimizer", "offload_param": "weights"}
    away = [word for name, word in moved.items() if (zero.get(name) or {}).get("device") == "cpu"]
    return f"DeepSpeed ZeRO-{zero['stage']}" + (f" with {' and '.join(away)} on the CPU" if away else "")


def complete_deepspeed_config(
    config: dict[str, Any], *, share: int, accumulation_steps: int, ranks: int, clip_norm: float | None
) -> dict:
    """A DeepSpeed configuration with every number that follows from the recipe.

    Args:
        config: of the file.
        share: the most stimuli of one micro-batch.
        accumulation_steps: micro-batches per optimizer step.
        ranks: processes.
        clip_norm: of the recipe, None for no clipping.

    Raises:
        BadInput: the file sets one of these to another value.
    """
    filled = {
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": share * accumulation_steps * ranks,
        "gradient_clipping": clip_norm or 0.0,
        # NAdam and SGD are "untested" in DeepSpeed's words; the project's tests compare them with DDP.
        "zero_allow_untested_optimizer": True,
        # With offload DeepSpeed would take its own Adam, whatever the recipe's optimizer is.
        "zero_force_ds_cpu_optimizer": False,
    }
    for name, value in filled.items():
        if config.get(name, value) != value:
            raise BadInput(
                f"strategy: {name} is {config[name]} in the file, but the recipe gives {value}; remove it there"
            )
    for name in ("optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "data_types"):
        if name in config:
            raise BadInput(f"strategy: the file has a section {name!r}, which the recipe decides; remove it there")
    return config | filled
