#!/usr/bin/env bash
# Start a command on several machines: run the same line on each of them, in any order.
#
#     launch/machines.sh --host ADDRESS[:PORT] --machines N --job NAME [-n N] [--max-restarts R] train/finetune.py ...
#
#   --host ADDRESS     name or address of one of the machines, where all meet; default port: 29400
#   --machines N       number of machines; MIN:MAX continues when machines are lost, down to MIN
#   --job NAME         any name, the same on all machines; restarted under it, the job resumes its own run
#   -n N               number of processes on this machine; default: one per GPU, or one without GPUs
#   --max-restarts R   maximum number of restarts: when a process or a machine has died, the rest restart
#   --join-seconds S   how long to wait for the other machines; default: 600
#   OMP_NUM_THREADS, PYTHON    see launch/local.sh
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME    the network device; default: the one that leads to ADDRESS
#
# Data and run folder must be on storage that all machines share, under the same path.
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
exec "$python" "$here/processes.py" machines "$@"
