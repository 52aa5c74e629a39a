"""The flags that say what a model learns: a diffusion with its schedule, prediction and loss; or flow matching."""

from dataclasses import dataclass, fields
from typing import Any

from typing_extensions import Self

from .flow_matching import T_SAMPLINGS
from .utils import flag_values
from .utils.errors import UserError
from .utils.options import Config, option

OBJECTIVES = ("diffusion", "flow")
NOISE_SCHEDULES = ("linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class DiffusionConfig(Config):
    """diffusion, or flow matching"""

    objective: str = option(
        "diffusion", "what the model learns: diffusion; or flow (flow matching), to which of the following flags only "
        "--t_sampling applies", choices=OBJECTIVES, changes_run=True,
    )  # fmt: skip
    t_sampling: str = option(
        "uniform", "with --objective flow: distribution of the training times", choices=T_SAMPLINGS, changes_run=True
    )
    diffusion_steps: int = option(1000, "timesteps of the noise schedule", at_least=1, changes_run=True)
    noise_schedule: str = option("linear", "noise schedule", choices=NOISE_SCHEDULES, changes_run=True)
    learn_sigma: bool = option(True, "learn the variance of the reverse process; never with flow", changes_run=True)
    sigma_small: bool = option(
        False, "without --learn_sigma: use the variance of the posterior instead of beta", changes_run=True
    )
    use_kl: bool = option(False, "train on the variational bound instead of the MSE", changes_run=True)
    predict_xstart: bool = option(False, "predict x_start instead of eps", changes_run=True)
    predict_v: bool = option(False, "predict v instead of eps", changes_run=True)
    rescale_learned_sigmas: bool = option(
        False, "multiply the variational loss term by diffusion_steps / 1000", changes_run=True
    )
    snr_gamma: float | str | None = option(
        "auto", "gamma of Min-SNR loss weighting; None: no weighting; auto: 5 for MDTv2, None for MDT and DiT",
        read=flag_values.read_gamma, check=flag_values.check_gamma, changes_run=True,
    )  # fmt: skip

    def check(self) -> Self:
        super().check()
        if self.predict_xstart and self.predict_v:
            raise UserError("--predict_xstart and --predict_v exclude each other: a model predicts one thing")
        if self.objective != "flow" and self.t_sampling != "uniform":
            raise UserError(f"--t_sampling {self.t_sampling} belongs to --objective flow: add it, or leave this out")
        for each in fields(self) if self.objective == "flow" else ():
            value, own = getattr(self, each.name), each.name in ("objective", "t_sampling", "learn_sigma")
            if not own and value not in (each.default, None):
                raise UserError(f"--{each.name} {value} has no meaning with --objective flow: leave it out")
        return self

    def options(self, default_snr_gamma: float | None) -> dict[str, Any]:
        """Keyword arguments for `create_diffusion`.

        :param default_snr_gamma: the default of the model's family, which `auto` stands for.
        """
        if self.objective == "flow":
            return self.values() | {"learn_sigma": False, "snr_gamma": None}
        gamma = default_snr_gamma if self.snr_gamma == "auto" else self.snr_gamma
        return self.values() | {"snr_gamma": gamma}
