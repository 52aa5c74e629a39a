#!/usr/bin/env bash
# Train on a Slurm cluster: one torchrun on each node, settings as in run_ddp_master.sh.
#   DATA_DIR=data/imagenet ./run_slurm.sh                    # submits itself with the resources below
#   DATA_DIR=data/imagenet sbatch --nodes=2 run_slurm.sh     # from this folder, with others
# Relative paths are taken from where this is submitted. Further flags of scripts/image_train.py may follow.
# Ten minutes before the time limit, and when it is preempted, the job saves a checkpoint and goes back into the queue;
# it then resumes by itself. Submit it again to go on after `scancel`.
#SBATCH --job-name=mdt
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

# A wait that a signal interrupts gives 128 + 10, and is begun again.
wait_for() {
  local code=138
  while [ "$code" = 138 ]; do
    wait "$1" && code=0 || code=$?
  done
  return "$code"
}

if [ "${MDT_STEP:-}" = node ]; then # srun starts this script once on each node
  trap 'pkill -USR1 -P "$train" || true' USR1 # torchrun does not pass this signal on to the ranks
  (
    trap '' USR1 # nor may it, or a rank that is not yet in its training loop, end by it
    NODE_RANK=$SLURM_NODEID exec "$MDT_HOME/run_ddp_master.sh" "$@"
  ) &
  train=$!
  wait_for "$train"
  exit
fi

: "${DATA_DIR:?set DATA_DIR to a folder of images named CLASS_ANYTHING}"
if [ -z "${SLURM_JOB_ID:-}" ]; then
  here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
  command -v sbatch > /dev/null || fail "sbatch is not on the PATH: call this on a Slurm cluster, or ./run_ddp_master.sh without one"
  MDT_HOME=$here exec sbatch "$here/run_slurm.sh" "$@"
fi

# Slurm runs a copy of this file, which does not know where it came from.
export MDT_HOME=${MDT_HOME:-$SLURM_SUBMIT_DIR}
[ -e "$MDT_HOME/run_ddp_master.sh" ] || fail "$MDT_HOME holds no run_ddp_master.sh: submit from the repository's folder, or set MDT_HOME to it"
export NUM_NODES=$SLURM_JOB_NUM_NODES
export NUM_GPUS=${NUM_GPUS:-${SLURM_GPUS_ON_NODE:-8}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export RUN_ID=$SLURM_JOB_ID
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR

requeue=
# Repeated, because a rank that is not yet in its training loop ignores the signal.
save_and_requeue() {
  requeue=yes
  echo "job $SLURM_JOB_ID: saving a checkpoint, then back into the queue"
  (while kill -USR1 "$step" 2> /dev/null; do sleep 10; done) &
}
trap save_and_requeue USR1

code=0
# srun does not take the cores of a task over from sbatch.
MDT_STEP=node srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 \
  bash "$MDT_HOME/run_slurm.sh" "$@" &
step=$!
wait_for "$step" || code=$?
if [ -n "$requeue" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
