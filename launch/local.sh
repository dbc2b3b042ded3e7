#!/usr/bin/env bash
# Start a command on this machine: on all its GPUs, or on N CPU processes.
#
#     launch/local.sh [-n N] [--max-restarts R] train/finetune.py ...
#
#   -n N               number of processes; default: one per GPU, or one where there is none
#   --max-restarts R   when a process has died, start all of them again, up to R times: the run goes on from its last
#                      checkpoint
#   OMP_NUM_THREADS    threads of each CPU process; default: the cores shared out evenly
#   PYTHON             the interpreter; default: .venv's, where there is one
#   SPIKETUNE_JOB      a name for this job: the same command with the same name goes on with its own run
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
exec "$python" "$here/processes.py" local "$@"
