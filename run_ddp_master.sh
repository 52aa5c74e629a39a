#!/usr/bin/env bash
# Train on several nodes: run this on the first one, run_ddp_worker.sh on the others, with the same settings.
# Every setting comes from the environment, as for run.sh; the default is MDTv2-XL/2 as published.
#   MASTER_ADDR=node0 DATA_DIR=data/imagenet ./run_ddp_master.sh
# Relative paths are taken from where this is called. Further flags of scripts/image_train.py may follow.
# Run the same command again to resume from the newest checkpoint.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

: "${DATA_DIR:?set DATA_DIR to a folder of images named CLASS_ANYTHING}"
: "${MASTER_ADDR:?set MASTER_ADDR to the name or address of the first node}"
if ! command -v torchrun > /dev/null; then
  echo "error: torchrun is not on the PATH: activate the environment that PyTorch is installed in" >&2
  exit 2
fi
# A restart gets a store of its own: in the old one gloo would find the addresses of dead processes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OPENAI_LOGDIR=${OPENAI_LOGDIR:-output_mdt_xl2}
export MASTER_PORT=${MASTER_PORT:-29500}
NUM_NODES=${NUM_NODES:-8}
NODE_RANK=${NODE_RANK:-0}
NUM_GPUS=${NUM_GPUS:-8}
MAX_RESTARTS=${MAX_RESTARTS:-3}
LOCAL_ADDR=${LOCAL_ADDR:-} # this node's address, where its host name does not resolve on the others
RUN_ID=${RUN_ID:-mdt}
PRESET=${PRESET:-mdtv2-xl2}

# The rendezvous lives on the first node; a node that restarts joins it again, and all go on from the checkpoint.
command=(
  torchrun --nnodes="$NUM_NODES" --nproc_per_node="$NUM_GPUS" --max-restarts="$MAX_RESTARTS"
  --rdzv_id="$RUN_ID" --rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT"
  --rdzv_conf="is_host=$([ "$NODE_RANK" = 0 ] && echo 1 || echo 0)" ${LOCAL_ADDR:+--local_addr="$LOCAL_ADDR"}
  "$here/scripts/image_train.py"
  --data_dir "$DATA_DIR" --preset "$PRESET"
)
for name in MODEL IMAGE_SIZE MASK_RATIO DECODE_LAYER LR BATCH_SIZE VAE; do
  [[ -z ${!name:-} ]] || command+=("--${name,,}" "${!name}")
done
command+=("$@")
echo "node $NODE_RANK of $NUM_NODES: OPENAI_LOGDIR=$OPENAI_LOGDIR ${command[*]}"
exec "${command[@]}"
