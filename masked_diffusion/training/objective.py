"""The training loss of masked diffusion, as one module."""

import torch
import torch.nn as nn

from ..utils.precision import autocast


class TwoPassObjective(nn.Module):
    """Full pass and masked pass, which share timesteps and latents and have their own noise and label dropout.

    :param precision: see `precision.PRECISIONS`.
    :param kept_multiple: round the number of kept tokens to a multiple of this; see `MDT.draw_kept`.

    Both lie in one `forward`, so that DistributedDataParallel and gradient accumulation see one call per step. A
    model without a `mask_ratio` has the full pass only, which is DiT's training.
    """

    def __init__(self, model, diffusion, precision="fp32", kept_multiple=1):
        super().__init__()
        self.model, self.diffusion, self.precision = model, diffusion, precision
        self.kept_multiple = kept_multiple
        self.masked = model.mask_ratio is not None

    def draw(self, x_start, rand=torch.rand, randn_like=torch.randn_like, host_rand=torch.rand):
        """The random numbers of one step, in the order of the published implementation's.

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
        x_start,
        t,
        y=None,
        noise=None,
        drop_labels=None,
        masked_noise=None,
        masked_drop_labels=None,
        ids_keep=None,
        passes="both",
    ):
        """
        :param x_start: (N, C, H, W) latents. :param t: (N,) int64. :param y: (N,) int64 labels, or None.
        :param noise, drop_labels, masked_noise, masked_drop_labels, ids_keep: from `draw`; drawn here where None.
        :param passes: `both`; or `full` or `masked` alone, whose gradients add up to those of both.
        :return: dict of (N,) losses: `loss` is the sum of the passes', `masked_loss` the masked pass's own, `mse` and
            `vb` the parts of the full pass's.
        """
        model, terms = autocast(self.model, self.precision), {}
        if passes != "masked":
            terms = self.diffusion.training_losses(model, x_start, t, {"y": y, "drop_labels": drop_labels}, noise)
        if self.masked and passes != "full":
            kwargs = {"y": y, "drop_labels": masked_drop_labels, "enable_mask": True, "ids_keep": ids_keep}
            masked_loss = self.diffusion.training_losses(model, x_start, t, kwargs, masked_noise)["loss"]
            terms = {**terms, "masked_loss": masked_loss, "loss": terms.get("loss", 0) + masked_loss}
        return terms
