#!/usr/bin/env bash
# Train on one node. Every setting comes from the environment; the defaults are MDTv2-S/2 as published.
#   DATA_DIR=data/imagenet ./run.sh
# Relative paths are taken from where this is called. Further flags of scripts/image_train.py may follow.
# Run the same command again to resume from the newest checkpoint.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

: "${DATA_DIR:?set DATA_DIR to a folder of images named CLASS_ANYTHING}"
if ! command -v torchrun > /dev/null; then
  echo "error: torchrun is not on the PATH: activate the environment that PyTorch is installed in" >&2
  exit 2
fi
# A restart gets a store of its own: in the old one gloo would find the addresses of dead processes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OPENAI_LOGDIR=${OPENAI_LOGDIR:-output_mdt_s2}
NUM_GPUS=${NUM_GPUS:-8}
MAX_RESTARTS=${MAX_RESTARTS:-3}
MODEL=${MODEL:-MDTv2_S_2}
IMAGE_SIZE=${IMAGE_SIZE:-256}
MASK_RATIO=${MASK_RATIO:-0.30}
DECODE_LAYER=${DECODE_LAYER:-6}
LR=${LR:-5e-4}
BATCH_SIZE=${BATCH_SIZE:-32}
VAE=${VAE:-ema}

command=(
  torchrun --standalone --nproc_per_node="$NUM_GPUS" --max-restarts="$MAX_RESTARTS"
  "$here/scripts/image_train.py"
  --data_dir "$DATA_DIR" --image_size "$IMAGE_SIZE" --vae "$VAE"
  --model "$MODEL" --decode_layer "$DECODE_LAYER" --mask_ratio "$MASK_RATIO"
  --lr "$LR" --batch_size "$BATCH_SIZE" "$@"
)
echo "OPENAI_LOGDIR=$OPENAI_LOGDIR ${command[*]}"
exec "${command[@]}"
