#!/usr/bin/env bash
# Start a command on several machines: the same line on each of them, in any order.
#
#     launch/machines.sh --host ADDRESS[:PORT] --machines N --job NAME [-n N] [--max-restarts R] train/finetune.py ...
#
#   --host ADDRESS     name or address of one of the machines, where all meet; port 29400 unless you give another
#   --machines N       how many machines there are; MIN:MAX goes on with fewer, down to MIN, when some are lost
#   --job NAME         any name, the same on all machines; started again with it, the job goes on with its own run
#   -n N               processes on this machine; default: one per GPU, or one where there is none
#   --max-restarts R   when a process or a machine has died, start all that are left again, up to R times
#   --join-seconds S   how long to wait for enough machines; default 600
#   OMP_NUM_THREADS, PYTHON    see launch/local.sh
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME    the network device; default: the one that leads to ADDRESS
#
# Data and run folder must be on storage that all machines share, under the same path.
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
exec "$python" "$here/processes.py" machines "$@"
