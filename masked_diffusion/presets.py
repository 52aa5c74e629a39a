"""Published recipes as flags: `--preset NAME` sets these values, and every flag given beside it overrides its own.

Where the paper, the published scripts and the published README disagree, the scripts are right here, as the published
results come from them:

- Mask ratio (MDT issue #45): the paper finds 30 % best for MDT, and 30 % to 50 % for MDTv2. The code has one flag for
  both, `--mask_ratio 0.3`, to which MDTv2 adds 0.2 times a uniform number in every step: 0.3 means 30 % to 50 % there.
- Decoder blocks: the README of MDTv2 has 4 for S/2 and 2 for XL/2, `run.sh` and `run_ddp_master.sh` 6 and 4; the
  published weights of XL/2 have 4.
- Learning rate of MDTv2-S/2: 5e-4 in `run.sh`, the default of 3e-4 in the README.
- Batch: 8 x 32 images for S/2, 32 x 8 or 64 x 4 for XL/2; all are 256, whatever the number of GPUs.
"""

from typing import Any

PAPER_BATCH = 256
_TRAINING = {
    "image_size": 256, "vae": "ema", "global_batch_size": PAPER_BATCH, "diffusion_steps": 1000,
    "noise_schedule": "linear", "snr_gamma": "auto", "learn_sigma": True, "schedule_sampler": "uniform",
    "class_cond": True, "random_flip": True, "random_crop": False, "weight_decay": 0.0, "lr_anneal_steps": 0,
    "ema_rate": "0.9999",
}  # fmt: skip
_V2 = {"optimizer": "adan", "grad_clip": 1.0}
_V1 = {"optimizer": "adamw", "grad_clip": 0.0}
TRAINING: dict[str, dict[str, Any]] = {
    "mdtv2-s2": {"model": "MDTv2_S_2", "decode_layer": 6, "mask_ratio": 0.3, "lr": 5e-4} | _V2 | _TRAINING,
    "mdtv2-xl2": {"model": "MDTv2_XL_2", "decode_layer": 4, "mask_ratio": 0.3, "lr": 3e-4} | _V2 | _TRAINING,
    "mdt-xl2": {"model": "MDT_XL_2", "decode_layer": 2, "mask_ratio": 0.3, "lr": 3e-4} | _V1 | _TRAINING,
    "dit-xl2": {"model": "DiT_XL_2", "decode_layer": None, "mask_ratio": None, "lr": 1e-4} | _V1 | _TRAINING,
}
_GUIDED = {"cfg_cond": True, "cfg_scale": 3.8, "scale_pow": 4.0, "num_sampling_steps": "250", "clip_denoised": False}
_FID = {"num_samples": 50000, "quantize": "truncate", "seed": 0}
SAMPLING: dict[str, dict[str, Any]] = {
    "mdtv2-xl2-fid": {"model_path": "shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt"} | _GUIDED | _FID,
}
PAPER_STEPS = {"S": 400_000, "B": 400_000, "L": 400_000, "XL": 2_500_000}  # by size


def describe(name: str, values: dict[str, Any]) -> str:
    """A preset in full, as the flags that it stands for, and which of them are overridden.

    :param values: the values in use by name, from `Config.values`.
    """
    row = (TRAINING | SAMPLING)[name]
    kept = " ".join(f"--{key} {value}" for key, value in row.items() if values[key] == value)
    changed = ", ".join(f"--{key} {values[key]} (not {value})" for key, value in row.items() if values[key] != value)
    return f"preset {name}: {kept}" + (f"; overridden: {changed}" if changed else "")


def paper_steps(model: str) -> int | None:
    """The number of training steps of the paper for a model such as `MDTv2_XL_2`; None for sizes that it has not."""
    return PAPER_STEPS.get(model.split("_")[1])
