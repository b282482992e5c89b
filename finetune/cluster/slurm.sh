#!/usr/bin/env bash
# A run over several machines under Slurm: one finetune.sh a machine, every flag passed on.
#
#   sbatch --nodes 2 --gpus-per-node 8 finetune/cluster/slurm.sh -m MODEL -d DATA -o OUTPUT_DIR [any flag]
#
# OUTPUT_DIR must lie on a disk that all machines share. Five minutes before the time limit, or when it is
# preempted, the run writes a checkpoint at its next step, ends, and is queued again: the same command goes on.

#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=finetune-%j.log

set -euo pipefail

# Slurm runs a copy of this file; the checkout is where sbatch was called, unless it is named.
REPOSITORY="${REPOSITORY:-${SLURM_SUBMIT_DIR:-$PWD}}"
[[ -f "$REPOSITORY/finetune/finetune.sh" ]] || {
    echo "error: no finetune/finetune.sh in $REPOSITORY; call sbatch from the checkout or set REPOSITORY" >&2
    exit 2
}

machines="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MASTER_ADDR="${machines%%$'\n'*}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}" # jobs on one machine do not meet
export NNODES="$SLURM_JOB_NUM_NODES"
if [[ -n "${SLURM_GPUS_PER_NODE:-}" ]]; then export GPUS_PER_NODE="${SLURM_GPUS_PER_NODE##*:}"; fi

# Each task is one machine; its number is known only there.
# shellcheck disable=SC2016  # NODE_RANK is filled in by the task's own shell
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$0" "$@"' \
    "$REPOSITORY/finetune/finetune.sh" "$@" &
step=$!
trap 'scancel --signal=USR1 "$SLURM_JOB_ID" || true' USR1
trap 'scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM
while true; do
    status=0
    wait "$step" || status=$?
    kill -0 "$step" 2>/dev/null || break # a signal ends wait, not the step
done
if ((status == 143)); then
    echo "stopped with a checkpoint: queued again" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
