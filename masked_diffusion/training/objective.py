"""The training loss of masked diffusion, as one module."""

from collections.abc import Callable

import torch
import torch.nn as nn

from ..flow_matching import FlowMatching
from ..gaussian_diffusion import GaussianDiffusion
from ..models import DiT
from ..utils.precision import autocast


class TwoPassObjective(nn.Module):
    """The full pass and the masked pass. They share timesteps and latents, but not noise and label dropout.

    Both passes belong to one `forward`, so that DistributedDataParallel and gradient accumulation see one call per
    step. A model without a `mask_ratio` has the full pass only, as in DiT's training.

    :param diffusion: its `training_losses` are the loss of each pass.
    :param precision: number format of the network (mixed precision), one of `precision.PRECISIONS`.
    :param kept_multiple: round the number of kept tokens to a multiple of this; see `MDT.draw_kept`.
    """

    def __init__(
        self,
        model: DiT,
        diffusion: GaussianDiffusion | FlowMatching,
        precision: str = "fp32",
        kept_multiple: int = 1,
    ) -> None:
        super().__init__()
        self.model, self.diffusion, self.precision = model, diffusion, precision
        self.kept_multiple = kept_multiple
        self.masked = model.mask_ratio is not None

    def draw(
        self,
        x_start: torch.Tensor,
        rand: Callable[..., torch.Tensor] = torch.rand,
        randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
        host_rand: Callable[..., torch.Tensor] = torch.rand,
    ) -> dict[str, torch.Tensor]:
        """The random numbers of one step, drawn in the order of the published implementation.

        :param rand, randn_like: draw on the device. :param host_rand: draws on the CPU.
        :return: dict of tensors with one row per sample, for `forward`.
        """
        num, device, model = len(x_start), x_start.device, self.model
        draws = {
            "noise": randn_like(x_start),
            "drop_labels": model.draw_drop_labels(num, device, rand),
        }
        if self.masked:
            draws["masked_noise"] = randn_like(x_start)
            draws["masked_drop_labels"] = model.draw_drop_labels(num, device, rand)
            draws["ids_keep"] = model.draw_kept(num, device, rand, host_rand, self.kept_multiple)
        return {key: value for key, value in draws.items() if value is not None}

    def forward(
        self,
        x_start: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        drop_labels: torch.Tensor | None = None,
        masked_noise: torch.Tensor | None = None,
        masked_drop_labels: torch.Tensor | None = None,
        ids_keep: torch.Tensor | None = None,
        passes: str = "both",
    ) -> dict[str, torch.Tensor]:
        """The losses of one batch.

        :param x_start: (N, C, H, W) latents. :param y: (N,) int64 labels, or None.
        :param t: (N,) timesteps, int64, or float32 of flow matching.
        :param noise, drop_labels, masked_noise, masked_drop_labels, ids_keep: from `draw`; those left None are drawn
            here.
        :param passes: `both`; or only `full` or `masked`, whose gradients add up to those of `both`.
        :return: dict of (N,) losses: `loss` is the sum over the passes, `masked_loss` the loss of the masked pass,
            `mse` and `vb` are the terms of the full pass.
        """
        model, terms = autocast(self.model, self.precision), {}
        if passes != "masked":
            terms = self.diffusion.training_losses(model, x_start, t, {"y": y, "drop_labels": drop_labels}, noise)
        if self.masked and passes != "full":
            kwargs = {"y": y, "drop_labels": masked_drop_labels, "enable_mask": True, "ids_keep": ids_keep}
            masked_loss = self.diffusion.training_losses(model, x_start, t, kwargs, masked_noise)["loss"]
            terms = {**terms, "masked_loss": masked_loss, "loss": terms.get("loss", 0) + masked_loss}
        return terms
