"""Make the EMA of any length, after training, from the snapshots phema_SIGMA_STEP.pt of a training folder."""

from pathlib import Path

import torch

from masked_diffusion import logger, script_util
from masked_diffusion.training.ema import mix_snapshots, plan_reconstruction, posthoc_name
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import atomic_write


def parse_args():
    parser = script_util.make_parser(__doc__)
    parser.add_argument("--log_dir", required=True, help="training folder that holds the snapshots")
    parser.add_argument(
        "--sigma_rel", type=float, required=True, help="width of the average, as a share of the training before --step"
    )
    parser.add_argument("--step", type=int, help="last step of the average; None: the newest snapshot's")
    parser.add_argument("--out", help="file to write; None: posthoc_ema_SIGMA_STEP.pt in log_dir")
    return parser.parse_args()


def main():
    args = parse_args()
    recipe = plan_reconstruction(args.log_dir, args.sigma_rel, args.step)
    path = Path(args.out or Path(args.log_dir, posthoc_name(args.sigma_rel, recipe.step)))
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: {path.parent} is no folder; make it, or name another --out")
    logger.configure(args.log_dir)
    logger.log(
        f"sigma_rel {args.sigma_rel} at step {recipe.step} from {len(recipe.paths)} snapshots: "
        f"relative residual of the profile {recipe.residual:.1e}"
    )
    state = mix_snapshots(recipe)
    with atomic_write(path) as file:
        torch.save(state, file)
    logger.log(f"wrote {path}")


if __name__ == "__main__":
    script_util.run(main)
