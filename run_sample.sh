#!/usr/bin/env bash
# Draw 50,000 images with guidance, then without, and evaluate both. Every setting comes from the environment: PRESET,
# and MODEL_PATH, NUM_SAMPLES, NUM_SAMPLING_STEPS, CFG_SCALE, SCALE_POW, BATCH_SIZE and SEED, which override its values. The
# default is what the published numbers of MDTv2-XL/2 were made with.
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
PRESET=${PRESET:-mdtv2-xl2-fid}
OUT=${OUT:-output_mdt_xl2_v2_samples}
NUM_GPUS=${NUM_GPUS:-8}
NUM_SAMPLES=${NUM_SAMPLES:-50000}
BATCH_SIZE=${BATCH_SIZE:-32}

settings=(--preset "$PRESET")
for name in MODEL_PATH NUM_SAMPLES NUM_SAMPLING_STEPS BATCH_SIZE SEED; do
  [[ -z ${!name:-} ]] || settings+=("--${name,,}" "${!name}")
done

for round in guided unguided; do
  guidance=(${CFG_SCALE:+--cfg_scale "$CFG_SCALE"} ${SCALE_POW:+--scale_pow "$SCALE_POW"} "$@")
  [[ $round == unguided ]] && guidance=("$@" --cfg_scale None --scale_pow None --cfg_cond False --guidance none)
  sample=(
    torchrun --standalone --nproc_per_node="$NUM_GPUS"
    "$here/scripts/image_sample.py"
    --log_dir "$OUT/$round" "${settings[@]}" "${guidance[@]}"
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
