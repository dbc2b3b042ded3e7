#!/usr/bin/env bash
# Start a command on this machine: on all its GPUs, or on N CPU processes.
#
#     launch/local.sh [-n N] [--max-restarts R] train/finetune.py ...
#
#   -n N               number of processes; default: one per GPU, or one without GPUs
#   --max-restarts R   maximum number of restarts: when a process has died, all restart, and the run resumes from its last
#                      checkpoint
#   OMP_NUM_THREADS    threads per CPU process; default: the cores divided evenly
#   PYTHON             the interpreter; default: that of .venv if it exists
#   SPIKETUNE_JOB      name of this job: the same command restarted under the same name resumes its own run
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
exec "$python" "$here/processes.py" local "$@"
