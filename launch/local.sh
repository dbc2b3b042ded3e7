#!/usr/bin/env bash
# Start a command on this machine: on all its GPUs, or on N CPU processes.
#
#     launch/local.sh [-n N] train/finetune.py ...
#
#   -n N               number of processes; default: one per GPU, or one where there is none
#   OMP_NUM_THREADS    threads of each CPU process; default: the cores shared out evenly
#   PYTHON             the interpreter; default: .venv's, where there is one
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON="$here/../.venv/bin/python"
    [ -x "$PYTHON" ] || PYTHON=python
fi
exec "$PYTHON" "$here/local_processes.py" "$@"
