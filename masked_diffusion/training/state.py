"""The state of a training run: everything that a checkpoint holds."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .. import dist_util
from ..config import RunConfig
from ..resample import ScheduleSampler
from ..utils.errors import UserError
from ..utils.flag_values import split_numbers
from ..utils.tensor_files import load_state_dict
from ..weights.checkpoint import checkpoint_files, ema_name, model_name, opt_name, save_checkpoint
from .adan import Adan
from .ema import PowerEMA, remove_snapshots, save_snapshots, snapshot_files
from .guardian import Guardian, TrainingFault
from .objective import TwoPassObjective
from .optim import clip_gradients, update_ema
from .parallel import (
    copy_all,
    drop_gathered,
    fill,
    gather_late,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    run_with_gathering,
)
from .receive import receive_all, send_state


def read_on_nodes(path: Path, read: Callable[..., Any] = load_state_dict) -> Any:
    """What a file holds: the first rank of each node reads it, and the others receive its tensors when they use them.

    :param read: called with the path and `mmap=True`.
    """
    return send_state(lambda: read(path, mmap=True), dist_util.node_group())


class TrainState:
    """Model, optimizer, EMAs and counters of a run.

    Create it after `shard_model`, which may replace the model's parameters by shards. Checkpoints hold unsharded
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
        options = train.optimizer, self.params, train.lr, train.weight_decay, train.shard, train.compile
        self.opt = make_optimizer(*options)
        self.ema = {rate: [p.detach().clone() for p in self.params] for rate in train.ema_rate.split(",")}
        self.phema = PowerEMA(self.params, split_numbers(train.phema))
        self.scaler = torch.amp.GradScaler(
            self.params[0].device.type,
            enabled=objective.precision == "fp16",
            growth_factor=2**train.fp16_scale_growth,
            growth_interval=1,
        )
        self.step, self.rollbacks, self.train_seconds = 0, 0, 0.0

    def update(self, norm: torch.Tensor, finite: bool) -> None:
        """Update the weights with their gradients, which are clipped first, and every average with the new weights.

        :param norm: () global norm of the gradients.
        :param finite: False for a step whose loss or gradients are not: it is skipped.
        """
        # A power-function average covers all steps up to now, and its beta depends on the step: skipped steps count.
        averages = self.phema.at_step(self.step + 1)
        averages += [(average, float(rate)) for rate, average in self.ema.items() if finite]
        if finite or self.scaler.is_enabled():  # the scaler itself skips a bad step, and then lowers the loss scale
            options = clip_gradients(self.opt, self.params, norm, self.config.train.grad_clip)
            if finite and isinstance(self.opt, Adan):  # inside ZeRO-1 weights of other ranks come later
                options["averages"], averages = averages, []
            self.scaler.step(self.opt, **options)
            self.scaler.update()
        self.opt.zero_grad(set_to_none=True)  # frees them: nothing is written
        for average, rate in averages:
            update_ema(average, self.params, rate)

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
        drop_gathered(self.model)
        self.model.train()

    # ------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        """Write a complete checkpoint of the current step. All ranks call it together.

        :raises UserError: on every rank, if rank 0 could not write it. No file of this step is left.
        :raises TrainingFault: on every rank, for weights that are not finite.
        """
        self.check_finite()
        weights = {key: gather_late(value) for key, value in self.model.state_dict().items()}
        emas = {
            rate: weights | dict(zip(self.names, map(gather_late, ema), strict=True)) for rate, ema in self.ema.items()
        }
        train_state = self._train_state()
        snapshots = self.step, train_state["phema"], weights, self.names, self.config.train.phema_dtype
        checkpoint = self.step, weights, emas, train_state
        files = [*snapshot_files(*snapshots).values(), *checkpoint_files(*checkpoint).values()]
        run_with_gathering(self._write, files, folder, snapshots, checkpoint)

    def _train_state(self) -> dict[str, Any]:
        return {"optimizer": optimizer_state(self.opt, self.params), "phema": self.phema.state_dict()} | self.counters()

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

    def check_finite(self) -> None:
        """Refuse weights that are not finite: with --keep the good checkpoints would go for them. For all ranks.

        :raises TrainingFault: on every rank.
        """
        own = (value.to_local() if isinstance(value, DTensor) else value for value in self.model.state_dict().values())
        finite = all(value.isfinite().all() for value in own)
        if dist_util.any_rank(not finite):
            raise TrainingFault(
                f"the weights of step {self.step} are NaN or infinite and are not saved: lower --lr; the last "
                "checkpoint is intact"
            )

    def _write(self, folder: Path, snapshots: tuple, checkpoint: tuple) -> None:
        try:
            save_snapshots(folder, *snapshots)
            save_checkpoint(folder, *checkpoint)
        except (OSError, UserError):
            remove_snapshots(folder, self.step)
            raise

    def load(self, model_path: Path, step: int) -> None:
        """Load everything except the model's weights from the files beside `model{step}.pt`, on all ranks together."""
        for rate, average in self.ema.items():
            state = read_on_nodes(model_path.with_name(ema_name(rate, step)))
            for tensor, name in zip(average, self.names, strict=True):
                fill(tensor, state[name])
        state = read_on_nodes(model_path.with_name(opt_name(step)))
        parts = {"scaler", "schedule_sampler", "guardian"}
        keys = {"optimizer", "phema", "rollbacks", "train_seconds"} | parts
        if not isinstance(state, dict) or not state.keys() >= keys or "state" not in state["optimizer"]:
            raise UserError(f"{model_path.with_name(opt_name(step))} is no training state of this code: restore it")
        load_optimizer_state(self.opt, state["optimizer"], self.params)
        self.phema.load_state_dict(state["phema"])
        state |= {name: receive_all(state[name], self.params[0].device) for name in parts}
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
