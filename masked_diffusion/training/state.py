"""The state of a training run: everything that a checkpoint holds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import dist_util
from ..config import RunConfig
from ..resample import ScheduleSampler
from ..utils.errors import UserError
from ..utils.flag_values import split_numbers
from ..weights.checkpoint import ema_name, model_name, opt_name, save_checkpoint
from .ema import PowerEMA, remove_snapshots, save_snapshots
from .guardian import Guardian, TrainingFault
from .objective import TwoPassObjective
from .optim import update_ema
from .parallel import copy_all, gather_full, load_optimizer_state, make_optimizer, optimizer_state, shard_like


class TrainState:
    """Model, optimizer, EMAs and counters of a run.

    Create it after `parallelize`, which may replace the model's parameters by shards. Checkpoints hold unsharded
    tensors, so that a run can be resumed with another kind of sharding or another number of ranks.

    :param config: from `resume.resolve`.
    """

    def __init__(
        self, config: RunConfig, objective: TwoPassObjective, schedule_sampler: ScheduleSampler, guardian: Guardian
    ) -> None:
        train = config.train
        self.config, self.model = config, objective.model
        self.schedule_sampler, self.guardian = schedule_sampler, guardian
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = make_optimizer(train.optimizer, self.params, train.lr, train.weight_decay, train.shard)
        self.ema = {rate: [p.detach().clone() for p in self.params] for rate in train.ema_rate.split(",")}
        self.phema = PowerEMA(self.params, split_numbers(train.phema))
        self.scaler = torch.amp.GradScaler(
            self.params[0].device.type,
            enabled=objective.precision == "fp16",
            growth_factor=2**train.fp16_scale_growth,
            growth_interval=1,
        )
        self.step, self.rollbacks, self.train_seconds = 0, 0, 0.0

    def update_averages(self, finite: bool) -> None:
        """Update the EMAs with the weights after this step.

        :param finite: False for a skipped step.
        """
        # A power-function average covers all steps up to now, and its beta depends on the step: skipped steps count.
        self.phema.update(self.params, self.step + 1)
        if finite:
            for rate, average in self.ema.items():
                update_ema(average, self.params, float(rate))

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within the block, the model has the weights of its first EMA and is in eval mode."""
        average = next(iter(self.ema.values()))
        own = [p.detach().clone() for p in self.params]
        self.model.eval()
        with torch.no_grad():
            copy_all(self.params, average)
            yield
            copy_all(self.params, own)
        self.model.train()

    # ------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        """Write a complete checkpoint of the current step. All ranks call it together.

        :raises UserError: on every rank, if rank 0 could not write it. No file of this step is left.
        """
        weights = {key: gather_full(value) for key, value in self.model.state_dict().items()}
        emas = {
            rate: weights | dict(zip(self.names, map(gather_full, ema), strict=True)) for rate, ema in self.ema.items()
        }
        dist_util.run_on_main(self._write, folder, weights, emas, self._train_state())

    def _train_state(self) -> dict[str, Any]:
        return {"optimizer": optimizer_state(self.opt), "phema": self.phema.state_dict()} | self.counters()

    def counters(self) -> dict[str, Any]:
        """All of a checkpoint that is small: neither weights nor averages nor the optimizer's state."""
        return {
            "scaler": self.scaler.state_dict(),
            "schedule_sampler": self.schedule_sampler.state_dict(),
            "guardian": self.guardian.state_dict(),
            "step": self.step,
            "seed": self.config.train.seed,
            "rollbacks": self.rollbacks,
            "train_seconds": self.train_seconds,
            "config": json.dumps(self.config.to_json()),
        }

    def _write(self, folder: Path, weights: dict, emas: dict, train_state: dict) -> None:
        if not all(value.isfinite().all() for value in weights.values()):  # with --keep the good ones would go for it
            raise TrainingFault(
                f"the weights of step {self.step} are NaN or infinite and are not saved: lower --lr; the last "
                "checkpoint is intact"
            )
        try:
            averages, dtype = train_state["phema"], self.config.train.phema_dtype
            save_snapshots(folder, self.step, averages, weights, self.names, dtype)
            save_checkpoint(folder, self.step, weights, emas, train_state)
        except (OSError, UserError):
            remove_snapshots(folder, self.step)
            raise

    def load_weights(self, path: Path) -> None:
        """Overwrite the parameters with those of a `model{step}.pt`, with any kind of sharding."""
        state = dist_util.load_state_dict(path, self.params[0].device)
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                param.copy_(shard_like(state[name], param))

    def load(self, model_path: Path, step: int) -> None:
        """Load everything except the model's weights from the files beside `model{step}.pt`."""
        device = self.params[0].device
        for rate, average in self.ema.items():
            state = dist_util.load_state_dict(model_path.with_name(ema_name(rate, step)), device)
            copy_all(average, [shard_like(state[n], a) for a, n in zip(average, self.names, strict=True)])
        state = dist_util.load_state_dict(model_path.with_name(opt_name(step)), device)
        keys = {"optimizer", "scaler", "schedule_sampler", "guardian", "phema", "rollbacks", "train_seconds"}
        if not isinstance(state, dict) or not state.keys() >= keys or "state" not in state["optimizer"]:
            raise UserError(f"{model_path.with_name(opt_name(step))} is no training state of this code: restore it")
        load_optimizer_state(self.opt, state["optimizer"], self.params)
        self.phema.load_state_dict(state["phema"])
        self.load_counters(state | {"step": step})

    def load_counters(self, state: dict[str, Any]) -> None:
        """Load what `counters` gave."""
        self.scaler.load_state_dict(state["scaler"])
        self.schedule_sampler.load_state_dict(state["schedule_sampler"])
        self.guardian.load_state_dict(state["guardian"])
        self.step, self.rollbacks, self.train_seconds = state["step"], state["rollbacks"], state["train_seconds"]

    def model_path(self, folder: Path) -> Path:
        """The file of the weights at the current step."""
        return folder / model_name(self.step)
