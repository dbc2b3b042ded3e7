#!/usr/bin/env bash
# Run every system of the study, score it, and put our numbers beside the published ones (docs/study.md).
#
#     bash launch/study.sh --data DIR --out RUNS [--small] [-n N] [--rows NAME ...] [--at-most N] [--retry-failed]
#
#   PYTHON   the interpreter; default: that of .venv if it exists
#
# The same line goes on where it was stopped; on another machine that shares the folder it joins in. --help explains the
# options; launch/slurm/study.sbatch runs it as jobs.
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
exec "$python" "$here/../train/study.py" "$@"
