"""Which strategy a run trains under, from the recipe and the launcher's environment: DDP, or a DeepSpeed configuration.

Nothing here imports DeepSpeed; `train/runtime.py` does, with what is decided here.
"""

import json
import os
from pathlib import Path
from typing import Any

from data_prep.errors import BadInput


def chosen_strategy(setting: str | None) -> dict[str, Any] | None:
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
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(
            f"strategy: {path} is no file; give `ddp` or a DeepSpeed JSON such as ds_configs/zero2.json"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"strategy: {path} is not readable as JSON ({error})") from None
    stage = config.get("zero_optimization", {}).get("stage") if isinstance(config, dict) else None
    if stage not in (1, 2):
        raise BadInput(f"strategy: {path}: zero_optimization.stage must be 1 or 2, not {stage}")
    for name in ("offload_optimizer", "offload_param", "parameter_alignment"):
        if config["zero_optimization"].get(name):
            raise BadInput(f"strategy: {path}: zero_optimization.{name} is not supported; remove it")
    return config


def fill_deepspeed(config: dict[str, Any], *, share: int, pieces: int, ranks: int, clip_norm: float | None) -> dict:
    """A DeepSpeed configuration with every number that follows from the recipe.

    Args:
        config: of the file.
        share: the most stimuli of one micro-batch.
        pieces: micro-batches per optimizer step.
        ranks: processes.
        clip_norm: of the recipe, None for no clipping.

    Raises:
        BadInput: the file sets one of these to another value.
    """
    filled = {
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": pieces,
        "train_batch_size": share * pieces * ranks,
        "gradient_clipping": clip_norm or 0.0,
        # NAdam and SGD are "untested" in DeepSpeed's words; the project's tests compare them with DDP.
        "zero_allow_untested_optimizer": True,
    }
    for name, value in filled.items():
        if config.get(name, value) != value:
            raise BadInput(
                f"strategy: {name} is {config[name]} in the file, but the recipe gives {value}; remove it there"
            )
    for name in ("optimizer", "scheduler", "fp16", "bf16"):
        if name in config:
            raise BadInput(f"strategy: the file has a section {name!r}, which the recipe decides; remove it there")
    return config | filled
