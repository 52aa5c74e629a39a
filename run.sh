#!/usr/bin/env bash
# Train on one node. Every setting comes from the environment: PRESET, and MODEL, IMAGE_SIZE, MASK_RATIO, DECODE_LAYER, LR,
# BATCH_SIZE (per GPU) and VAE, which override its values. The default is MDTv2-S/2 as published, whatever NUM_GPUS is.
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
PRESET=${PRESET:-mdtv2-s2}

command=(
  torchrun --standalone --nproc_per_node="$NUM_GPUS" --max-restarts="$MAX_RESTARTS"
  "$here/scripts/image_train.py"
  --data_dir "$DATA_DIR" --preset "$PRESET"
)
for name in MODEL IMAGE_SIZE MASK_RATIO DECODE_LAYER LR BATCH_SIZE VAE; do
  [[ -z ${!name:-} ]] || command+=("--${name,,}" "${!name}")
done
command+=("$@")
echo "OPENAI_LOGDIR=$OPENAI_LOGDIR ${command[*]}"
exec "${command[@]}"
