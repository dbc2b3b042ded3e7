# Sourced by the .sbatch files in this folder. Submit them from the project's folder.
#
# Set these environment variables for sbatch (`VARIABLE=value sbatch ...`); everything else is an option of Slurm
# (`sbatch --nodes=4 --gpus-per-node=8 --partition=...`):
#
#   PROCESSES        processes per node; default: one per GPU, or one without GPUs
#   MAX_RESTARTS     maximum number of restarts after a process or a node has died; default: 3
#   MIN_NODES        minimum number of nodes to continue with when others are lost (needs sbatch --no-kill); default: all
#   REQUEUE          whether a stopped job is requeued and resumes; default: 1; 0 lets it end
#   PYTHON           the interpreter; default: that of .venv
set -euo pipefail

# The processes of a job meet at its first node, on a port of this job.
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

# Only the batch shell receives the signal of `--signal=B:USR1@...`; this passes it on.
on_signal() {
    stopping=
    trap "stopping=1; $1" USR1 TERM
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

# Exit code 75: stopped on request, with everything saved.
end_with() {
    if [ "$1" = 75 ] || { [ -n "$stopping" ] && [ "$1" != 0 ] && [ "$1" != 2 ]; }; then
        if [ "${REQUEUE:-1}" = 1 ]; then
            echo "stopped before the end; requeueing"
            scontrol requeue "$SLURM_JOB_ID"
        fi
    fi
    exit "$1"
}
