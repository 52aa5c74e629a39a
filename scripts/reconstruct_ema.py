"""Make the EMA of any length, after training, from the snapshots phema_SIGMA_STEP.pt of a training folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import Self

from masked_diffusion import logger, script_util
from masked_diffusion.training.ema import mix_snapshots, plan_reconstruction, posthoc_name
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import atomic_write
from masked_diffusion.utils.flag_values import MAX_SIGMA_REL
from masked_diffusion.utils.options import Config, option


@dataclass(frozen=True)
class ReconstructionConfig(Config):
    """reconstruction"""

    log_dir: str = option(
        "", "training folder that holds the snapshots", check=lambda text: None if text else "a training folder"
    )
    sigma_rel: float | None = option(
        None, "width of the average, as a share of the training before --step", above=0, below=MAX_SIGMA_REL
    )
    step: int | None = option(None, "last step of the average; None: the newest snapshot's", at_least=1)
    out: str | None = option(None, "file to write; None: posthoc_ema_SIGMA_STEP.pt in log_dir")

    def check(self) -> Self:
        super().check()
        if self.sigma_rel is None:
            raise UserError("--sigma_rel is missing: give the width of the average, such as 0.08")
        return self


def main() -> None:
    config = script_util.parse_flags(ReconstructionConfig, __doc__)
    recipe = plan_reconstruction(config.log_dir, config.sigma_rel, config.step)
    path = Path(config.out or Path(config.log_dir, posthoc_name(config.sigma_rel, recipe.step)))
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: {path.parent} is no folder; make it, or name another --out")
    logger.configure(config.log_dir)
    logger.log(
        f"sigma_rel {config.sigma_rel} at step {recipe.step} from {len(recipe.paths)} snapshots: "
        f"relative residual of the profile {recipe.residual:.1e}"
    )
    state = mix_snapshots(recipe)
    with atomic_write(path) as file:
        torch.save(state, file)
    logger.log(f"wrote {path}")


if __name__ == "__main__":
    script_util.run(main)
