#!/usr/bin/env bash
# Draw 50,000 images with guidance, then without, and evaluate both. Every setting comes from the environment; the
# defaults are the published numbers of MDTv2-XL/2.
#   REFERENCE=VIRTUAL_imagenet256_labeled.npz MODEL_PATH=mdt_xl2_v2_ckpt.pt ./run_sample.sh
# Relative paths are taken from where this is called. Further flags of scripts/image_sample.py may follow, but those of
# guidance hold for the guided round alone. Run the same command again to go on where it stopped.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

: "${REFERENCE?set REFERENCE to the npz to compare with, or to nothing (REFERENCE=) to sample only}"
for program in torchrun python; do
  if ! command -v "$program" > /dev/null; then
    echo "error: $program is not on the PATH: activate the environment that PyTorch is installed in" >&2
    exit 2
  fi
done
MODEL_PATH=${MODEL_PATH:-shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt}
OUT=${OUT:-output_mdt_xl2_v2_samples}
NUM_GPUS=${NUM_GPUS:-8}
NUM_SAMPLES=${NUM_SAMPLES:-50000}
NUM_SAMPLING_STEPS=${NUM_SAMPLING_STEPS:-250}
CFG_SCALE=${CFG_SCALE:-3.8}
SCALE_POW=${SCALE_POW:-4.0}
BATCH_SIZE=${BATCH_SIZE:-32}
SEED=${SEED:-0}

for round in guided unguided; do
  guidance=(--cfg_cond True --cfg_scale "$CFG_SCALE" --scale_pow "$SCALE_POW" "$@")
  [[ $round == unguided ]] && guidance=("$@" --cfg_cond False --guidance none)
  sample=(
    torchrun --standalone --nproc_per_node="$NUM_GPUS"
    "$here/scripts/image_sample.py"
    --model_path "$MODEL_PATH" --log_dir "$OUT/$round"
    --num_samples "$NUM_SAMPLES" --num_sampling_steps "$NUM_SAMPLING_STEPS" --batch_size "$BATCH_SIZE" --seed "$SEED"
    "${guidance[@]}"
  )
  echo "${sample[*]}"
  "${sample[@]}"
  if [[ -n $REFERENCE && ! -e $OUT/$round/metrics.json ]]; then
    evaluate=(
      python "$here/evaluations/evaluator.py" "$REFERENCE" "$OUT/$round"/samples_"$NUM_SAMPLES"x*.npz
      --json "$OUT/$round/metrics.json"
    )
    echo "${evaluate[*]}"
    "${evaluate[@]}"
  fi
done
