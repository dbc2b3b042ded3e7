"""Export a run: its predictions, or its network.

python train/export.py RUN --out DIR --format {netcdf,mat,timm,predictor} [...]
"""

from data_prep.common.command_line import parse
from data_prep.common.errors import run_command
from train.evaluation.options import Export

EXAMPLES = (
    "runs/a --out exported --format predictor",
    "runs/a --out exported --format netcdf mat --split test",
)


def main() -> None:
    """Parse, check, write."""
    options = parse(Export, examples=EXAMPLES)

    from train.evaluation.exporting.run_export import export

    export(options)


if __name__ == "__main__":
    run_command(main)
