"""The training loop. It builds no model and no dataset: the script passes configuration, objective and data to it."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from . import dist_util, logger
from .config import RunConfig
from .published import (  # noqa: F401  (ADM's and MDT's users import them from here)
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    log_loss_dict,
    parse_resume_step_from_filename,
)
from .resample import create_named_schedule_sampler
from .training.data import TrainingData
from .training.data_wait import DataWait
from .training.finetune import load_pretrained
from .training.guardian import Guardian
from .training.metrics import TrainMetrics
from .training.objective import TwoPassObjective
from .training.optim import annealed_lr
from .training.parallel import accumulating, gather_full, load_model_state, make_empty, parallelize, shard_model
from .training.receive import SentTensor, send_state
from .training.resume import Start, agree_on_start, read_run_config
from .training.saving import Saver, create_saver
from .training.sharded import load_sharded
from .training.state import TrainState, read_on_nodes
from .training.watchdog import Watchdog
from .utils.errors import UserError
from .utils.not_rebuilt import PUBLISHED_TRAIN_LOOP, module_getattr
from .utils.precision import cast_weights
from .utils.random_numbers import GlobalBatchRandom, fold_seed
from .weights.checkpoint import checkpoint_path, is_sharded, latest_step, remove_leftovers
from .weights.pretrained import read_weights

__getattr__ = module_getattr(__name__)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECOND_INTERRUPT = 0.5  # seconds: a SIGINT that follows sooner is the launcher's copy of the same Ctrl-C
SHOWN_SPIKE_SAMPLES = 8


class Hook(Protocol):
    """Something that runs during training, such as evaluation or sample grids."""

    def after_step(self, loop: "TrainLoop") -> bool:
        """Called on all ranks after every step. Returns whether to write a log row now."""


class TrainLoop:
    """Trains an objective until `lr_anneal_steps` or `max_steps`, or until it is stopped when neither is set.

    The constructor only stores its parts. `resume` loads the checkpoint or weights that the run starts from;
    `run_loop` calls it if that has not happened yet. SIGTERM, SIGUSR1 and Ctrl-C end the loop after the current step
    and save a checkpoint.

    :param config: from `training.resume.resolve`, which fills in the defaults of the model's family.
    :param objective: its model is on this rank's device, or on the meta device if `make_model` is given.
    :param data: the source of the batches.
    :param first_stage: the autoencoder that encodes images; see `latents.autoencoder`.
    :param log_dir: folder of the checkpoints.
    :param hooks: called after every step, in this order.
    :param make_model: builds the model with its initial weights on the host. It is called on rank 0 only, and only for
        a run that does not resume from a checkpoint: a model that is larger than a device is never whole on one.
    """

    def __new__(cls, *args: Any, **keywords: Any) -> "TrainLoop":
        if {"model", "diffusion"} <= keywords.keys():
            raise UserError(PUBLISHED_TRAIN_LOOP)
        return super().__new__(cls)

    def __init__(
        self,
        config: RunConfig,
        objective: TwoPassObjective,
        data: TrainingData,
        *,
        first_stage: Any,
        log_dir: str | Path,
        hooks: Iterable[Hook] = (),
        make_model: Callable[[], torch.nn.Module] | None = None,
    ) -> None:
        self.config, self.objective, self.model, self.source = config, objective, objective.model, data
        self.first_stage, self.log_dir, self.hooks = first_stage, Path(log_dir), tuple(hooks)
        device = next(self.model.parameters()).device
        self.device = dist_util.dev() if device.type == "meta" else device
        self.make_model = make_model or (lambda: self.model)
        self.schedule_sampler = create_named_schedule_sampler(config.train.schedule_sampler, objective.diffusion)
        self.guardian = Guardian(config.guardian.max_bad_steps, config.guardian.spike_zscore)
        self.microbatch = config.train.microbatch if config.train.microbatch > 0 else config.train.batch_size
        self.passes = ("full", "masked") if config.train.split_backward and objective.masked else ("both",)
        self.watchdog = Watchdog(config.guardian.hang_timeout, log_dir)
        self.last_step = config.train.lr_anneal_steps or config.train.max_steps or None
        self.state: TrainState | None = None
        self.saver: Saver | None = None
        self._stop_signal, self._stop_time = None, 0.0

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.state.step

    # ------------------------------------------------------------ resuming and saving

    def resume(self, start: Start | None = None) -> None:
        """Load the checkpoint or weights that the run starts from, and prepare its next step.

        All ranks call it together.

        :param start: from `training.resume.agree_on_start`, which is called if it is not given.
        :raises UserError: for a checkpoint that does not exist or belongs to another model.
        """
        if start is None:
            start = agree_on_start(self.log_dir, self.config, dist_util.run_on_main(read_run_config, self.log_dir))
        resumes_sharded = start.step and is_sharded(start.path)
        if not resumes_sharded:
            weights = self._read_weights(start.path) if start.step else self._first_weights(start.path)
        shard_model(self.model, self.config.train.shard)
        if resumes_sharded:
            make_empty(self.model, self.device)  # `load_sharded` below reads this rank's part
        else:
            load_model_state(self.model, weights, self.device)
        self.ddp = parallelize(self.objective, self.config.train.shard)
        self.state = TrainState(self.config, self.objective, self.schedule_sampler, self.guardian)
        if is_sharded(start.path or "") and start.step:
            load_sharded(self.state, start.path)
        elif start.step:
            self.state.load(start.path, start.step)
        dist_util.run_on_main(remove_leftovers, self.log_dir)
        self.saver = create_saver(self.config.log, self.log_dir, self.device)
        logger.rewind(self.step)
        logger.log(
            f"starting at step {self.step}" + (f", weights from {start.path}" if start.path else ", fresh weights")
        )
        global_batch = self.config.train.batch_size * dist_util.get_world_size()
        num_timesteps = self.objective.diffusion.num_timesteps
        data_wait = DataWait(self.config, self.source.names)
        self.metrics = TrainMetrics(self.device, num_timesteps, global_batch, self.last_step, data_wait)
        self._start_data()

    def _first_weights(self, path: Path | None) -> dict[str, SentTensor]:
        """Random initial weights, or for fine-tuning those of a file; from rank 0, so that all ranks have the same."""

        def make() -> dict[str, torch.Tensor]:
            model = self.make_model()
            if path is not None:
                load_pretrained(model, path, self.config.classes)
            return model.state_dict()

        return send_state(make, dist_util.all_ranks())

    def _read_weights(self, path: Path) -> dict[str, SentTensor]:
        """The weights of a checkpoint of this run."""
        weights, own = read_on_nodes(path, read_weights), self.model.state_dict()
        wrong = [name for name in (*own, *weights) if name not in own or name not in weights]
        wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
        if wrong:
            name = wrong[0]
            found, wanted = (tuple(state[name].shape) if name in state else "absent" for state in (weights, own))
            raise UserError(
                f"{path} is of another model than the flags describe ({name} is {found}, but must be {wanted}): repeat "
                "--model, --num_classes, --decode_layer and --qk_norm, or start at step 0 from its weights in another "
                "--log_dir with --resume_checkpoint"
            )
        return weights

    def _start_data(self) -> None:
        """Start the data stream at the current step. After a rollback, data and noise come from another seed."""
        seed, rollbacks = self.config.train.seed, self.state.rollbacks
        self.run_seed = fold_seed(seed, rollbacks) if rollbacks else seed
        self.data = self.source.stream(self.step, self.run_seed, self.first_stage)
        self.metrics.clear()

    def save(self) -> None:
        """Write a complete checkpoint of the current step, or begin to. All ranks call it together."""
        self.watchdog.phase(f"saving step {self.step}")
        with self.metrics.paused():
            # While steps are skipped the run may have diverged: the checkpoints before are then kept.
            self.saver.save(self.state, 0 if self.guardian.bad_in_a_row else self.config.log.keep)

    def _roll_back(self) -> None:
        """Roll back to the last checkpoint, and continue from there with other data and noise."""
        self.saver.finish()
        step = dist_util.run_on_main(latest_step, self.log_dir)
        rollbacks, allowed = self.state.rollbacks + 1, self.config.guardian.rollback_on_spike
        if step is None or rollbacks > allowed:
            return
        path = checkpoint_path(self.log_dir, step)
        if is_sharded(path):
            load_sharded(self.state, path)
        else:
            load_model_state(self.model, self._read_weights(path), self.device)
            self.state.load(path, step)
        self.state.rollbacks = rollbacks
        logger.rewind(step)
        logger.log(
            f"rolled back to step {step} to continue with other data (rollback {rollbacks} of at most {allowed})"
        )
        self._start_data()

    # ------------------------------------------------------------ training

    def run_loop(self) -> None:
        """Train to the end, with logging and checkpoints; return at once if the run is finished already.

        :raises TrainingFault: when the loss or gradients of too many steps in a row are not finite.
        :raises UserError: when the data cannot be read any more, or (LoaderWorkerDied) a data loading process was
            killed. A checkpoint is saved first.
        """
        if self.state is None:
            self.resume()
        if self.last_step and self.step >= self.last_step:
            logger.log(f"step {self.step} of {self.last_step} is done: nothing to train")
            return
        settings = {name: value for name, value in self.config.values().items() if name != "classes"}
        dist_util.run_on_main(logger.log_config, settings)
        self.objective.train()
        with (
            tqdm(total=self.last_step, initial=self.step, unit="step", disable=not dist_util.is_main() or None) as bar,
            self._signals(),
            self.watchdog.watching(),
            self.saver.finishing(),
        ):
            self._run_steps(bar)

    def _run_steps(self, bar: tqdm) -> None:
        log, saved_step, failure = self.config.log, self.step, None
        self.metrics.clear()
        while not self.last_step or self.step < self.last_step:
            self.watchdog.phase(f"loading the data of step {self.step}")
            try:
                with self.metrics.data_wait.waiting():
                    batch, cond = next(self.data)
            except UserError as error:  # an image is gone or damaged, a data loading process was killed
                failure = error
            self.watchdog.phase(f"waiting for the other ranks before step {self.step}")
            # All ranks must leave the loop at the same step: in the next one the others would wait for this rank.
            if dist_util.any_rank(failure is not None or self._stop_signal is not None or self.saver.has_failed()):
                break
            self.watchdog.phase(f"step {self.step}")
            self.run_step(batch, cond)
            self.watchdog.phase(f"evaluation, sample grids and logging after step {self.step}")
            bar.update(self.step - bar.n)
            wants_row = [hook.after_step(self) for hook in self.hooks]
            if any(wants_row) or self.step % log.log_interval == 0 or self.step == self.last_step:
                bar.set_postfix_str(self._log_row())
            if self.step % log.save_interval == 0:
                self.save()
                saved_step = self.step
        self.watchdog.phase("writing the last checkpoints")
        self.saver.finish()
        stopped = not self.last_step or self.step < self.last_step
        if self.metrics.steps:
            self._log_row()
        if saved_step != self.step:
            self.save()
        self.saver.finish()
        if failure is not None:
            raise failure
        if stopped:
            cause = "by a signal" if self._stop_signal is not None else "since another rank stopped"
            logger.log(f"stopped {cause} at step {self.step}: the same command resumes from here")

    def _log_row(self) -> str:
        lr, bad_steps = self.state.opt.param_groups[0]["lr"], self.guardian.bad_steps
        summary, seconds = self.metrics.log_row(self.step, lr, bad_steps, self.state.train_seconds)
        self.state.train_seconds = seconds
        return summary

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Within the block, a signal ends the loop after the current step; a second Ctrl-C ends the program at once."""

        def note(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            second = self._stop_signal == signal.SIGINT and now - self._stop_time > SECOND_INTERRUPT
            if number == signal.SIGINT and second:
                raise KeyboardInterrupt
            if self._stop_signal is None:
                self._stop_signal, self._stop_time = number, now

        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run_step(self, batch: torch.Tensor, cond: dict[str, torch.Tensor]) -> None:
        """One optimizer step on this rank's batch.

        :param batch: (N, 3, H, W) float32 images in [-1, 1], or (N, 2, C, h, w) float32 means and standard deviations
            of cached posteriors.
        :param cond: `{"y": (N,) int64}`, or `{}`.
        """
        # Determinism: every random number depends only on the seed, the step and the position in the global batch, so
        # neither the number of ranks nor a restart changes it.
        rank, world_size = dist_util.get_rank(), dist_util.get_world_size()
        random = GlobalBatchRandom(self.run_seed, self.step, self.device, rank, world_size)
        x_start = self._encode(batch.to(self.device, non_blocking=True), random)
        t, weights = self.schedule_sampler.sample(len(batch), self.device, random.rand)
        rows = {"x_start": x_start, "t": t}
        rows |= self.objective.draw(x_start, random.rand, random.randn_like, random.host_rand)
        rows |= {key: value.to(self.device, non_blocking=True) for key, value in cond.items()}

        with cast_weights(self.model, self.objective.precision):
            losses = self._forward_backward(rows, weights)  # (N,) each
        loss, norm = self._optimize(losses["loss"].mean())
        self.state.step += 1
        if loss is None:
            logger.log(
                f"step {self.step} is skipped: its loss or gradients are not finite ({self.guardian.bad_steps} skipped "
                "steps in total)"
            )
            return
        self.schedule_sampler.update_with_local_losses(t, losses["loss"])
        self.metrics.add(losses, t, norm)
        zscore = self.guardian.spike(loss)
        if zscore is not None:
            self._report_spike(zscore, loss, losses["loss"], rows)
            self._roll_back()

    def _encode(self, batch: torch.Tensor, random: GlobalBatchRandom) -> torch.Tensor:
        """(N, C, h, w) latents, drawn from the posterior if any. It is computed here, a microbatch at a time, or read
        from a cache."""
        if batch.ndim == 4:
            batch = torch.cat([self.first_stage.moments(images) for images in batch.split(self.microbatch)])
        return self.first_stage.sample(batch, random.randn_like)

    def _forward_backward(self, rows: dict[str, torch.Tensor], weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradient accumulation over the microbatches of the weighted mean loss. Returns (N,) losses, detached."""
        num, parts = len(weights), []
        starts = range(0, num, self.microbatch)
        for start in starts:
            micro, part = slice(start, start + self.microbatch), {}
            for passes in self.passes:
                # Gradient accumulation: the ranks exchange gradients once, in the last backward pass of the step.
                last = start == starts[-1] and passes == self.passes[-1]
                with accumulating(self.ddp, last):
                    losses = self.ddp(**{key: value[micro] for key, value in rows.items()}, passes=passes)
                    # Divided by the size of the batch, not of the microbatch, so that the parts add up to the mean.
                    loss = (losses["loss"] * weights[micro]).sum() / num
                    self.state.scaler.scale(loss).backward()
                losses = {key: value.detach() for key, value in losses.items()}
                part = part | losses | {"loss": part.get("loss", 0) + losses["loss"]}
            parts.append(part)
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _optimize(self, local_loss: torch.Tensor) -> tuple[float | None, float]:
        """Update the weights with the accumulated gradients, or skip the step if loss or gradients are not finite.

        :return: the mean loss over the ranks (None for a skipped step), and the gradient norm.
        """
        state, train = self.state, self.config.train
        self.saver.before_update()
        for group in state.opt.param_groups:
            group["lr"] = annealed_lr(train.lr, self.step, train.lr_anneal_steps)
        # Remove the loss scale of fp16 first: clipping needs the norm of the true gradients.
        state.scaler.unscale_(state.opt)
        grads = [param.grad for param in state.params if param.grad is not None]
        grad_norm = gather_full(torch.nn.utils.get_total_norm(grads))
        # The only point of a step where the host waits for the device: loss and norm decide whether to skip the step.
        loss, norm = dist_util.mean_over_ranks(torch.stack([local_loss, grad_norm])).tolist()
        finite = self.guardian.is_finite(loss, norm)
        state.update(grad_norm, finite)
        return (loss if finite else None), norm

    def _report_spike(self, zscore: float, loss: float, losses: torch.Tensor, rows: dict[str, torch.Tensor]) -> None:
        """Log the samples of the batch with the largest losses, over all ranks: timestep, label and file of each."""
        names = self.source.batch_names(self.step - 1, self.run_seed)
        worst = losses.argsort(descending=True)[:SHOWN_SPIKE_SAMPLES].tolist()
        own = [
            (
                losses[i].item(),
                rows["t"][i].item(),
                rows["y"][i].item() if "y" in rows else None,
                names[i] if names else "",
            )
            for i in worst
        ]
        found = sorted(chain.from_iterable(dist_util.gather_objects(own)), key=lambda sample: -sample[0])
        logger.log(f"step {self.step}: the loss {loss:.4f} is a spike, {zscore:.1f} standard deviations above its mean")
        for sample_loss, t, label, file in found[:SHOWN_SPIKE_SAMPLES]:
            logger.log(f"  loss {sample_loss:.4f}  t {t:g}  label {label}" + (f"  {file}" if file else ""))
