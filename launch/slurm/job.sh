# What the .sbatch files beside this one share; they source it. Submit them from the project's folder.
#
# Settings, as environment variables of sbatch (`VARIABLE=value sbatch ...`); everything else is Slurm's own, given on
# the command line (`sbatch --nodes=4 --gpus-per-node=8 --partition=...`):
#
#   PROCESSES        processes per node; default: one per GPU, or one where there is none
#   MAX_RESTARTS     when a process or a node has died, start all that are left again, so often; default 3
#   MIN_NODES        go on with so few nodes when others are lost (needs sbatch --no-kill); default: all of them
#   REQUEUE          whether a job that was told to stop queues again and goes on; default 1, 0 lets it end
#   PYTHON           the interpreter; default: .venv's
set -euo pipefail

# A job's processes find each other at its first node, on a port that other jobs do not have.
run_job() {
    local host port name code=0
    export SPIKETUNE_JOB="slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    host=$(scontrol show node "$host" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    port=$((20000 + SLURM_JOB_ID % 20000))
    on_signal 'scancel --signal=USR1 "$SLURM_JOB_ID"'
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        launch/machines.sh --host "$host:$port" --machines "${MIN_NODES:-$SLURM_JOB_NUM_NODES}:$SLURM_JOB_NUM_NODES" \
        --job "$SPIKETUNE_JOB" ${PROCESSES:+-n "$PROCESSES"} --max-restarts "${MAX_RESTARTS:-3}" "$@" &
    wait_for $! || code=$?
    end_with "$code"
}

# The batch shell gets the signal of `--signal=B:USR1@...` alone; this passes it on.
on_signal() {
    told=
    trap "told=1; $1" USR1 TERM
}

# `wait` returns early when a signal arrives.
wait_for() {
    local code=0
    wait "$1" || code=$?
    while kill -0 "$1" 2>/dev/null; do
        code=0
        wait "$1" || code=$?
    done
    return "$code"
}

# 75: stopped when told to, everything saved.
end_with() {
    if [ "$1" = 75 ] || { [ -n "$told" ] && [ "$1" != 0 ] && [ "$1" != 2 ]; }; then
        if [ "${REQUEUE:-1}" = 1 ]; then
            echo "stopped before it was done; queueing again"
            scontrol requeue "$SLURM_JOB_ID"
        fi
    fi
    exit "$1"
}
