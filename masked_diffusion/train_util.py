"""The training loop. It builds nothing: the script hands it model, data and diffusion."""

import json
import signal
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from tqdm.auto import tqdm

from . import dist_util, logger
from .published import (  # noqa: F401  (where ADM's and MDT's users import them from)
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    log_loss_dict,
    parse_resume_step_from_filename,
)
from .training.ema import PowerEMA, save_snapshots
from .training.optim import annealed_lr, default_grad_clip, update_ema
from .training.parallel import copy_all, like, load_optimizer_state, make_optimizer, optimizer_state, parallelize, whole
from .utils.errors import UserError
from .utils.not_rebuilt import module_getattr
from .utils.pictures import save_grid
from .utils.random_numbers import GlobalBatchRandom, fold_seed
from .weights.checkpoint import (
    ema_name,
    latest_step,
    model_name,
    opt_name,
    parse_step,
    prune_checkpoints,
    save_checkpoint,
)

NUM_QUARTILES, GRID_COLUMNS = 4, 10
__getattr__ = module_getattr(__name__)


def find_resume_step(log_dir, resume_checkpoint):
    """Where training goes on.

    :param resume_checkpoint: `auto` for the newest complete checkpoint of `log_dir`; a `model{step}.pt` that has its
        `opt{step}.pt` beside it; any other file of weights, from which training starts at step 0; or "" for neither.
    :return: the file to load (None for nothing), and the step (0 with a file: weights only).
    :raises UserError: when the named file does not exist.
    """
    newest = latest_step(log_dir)
    # A run that was started from a file elsewhere and has got further goes on from its own checkpoint.
    elsewhere = Path(resume_checkpoint).parent.resolve() != Path(log_dir).resolve()
    if newest is not None and resume_checkpoint and (resume_checkpoint == "auto" or elsewhere):
        return Path(log_dir, model_name(newest)), newest
    if resume_checkpoint in ("auto", ""):
        return None, 0
    path = Path(resume_checkpoint)
    if not path.exists():
        raise UserError(f"resume_checkpoint {path} does not exist: name a file, or auto")
    try:
        step = parse_step(path)
    except ValueError:
        return path, 0
    return path, step if path.with_name(opt_name(step)).exists() else 0


class TrainLoop:
    """Trains an objective until `lr_anneal_steps` or `max_steps`, for ever when neither is set.

    SIGTERM and SIGUSR1 end the loop after the step in hand, with a checkpoint.

    :param objective: `TwoPassObjective` on this rank's device.
    :param first_stage: encodes images; see `autoencoder`.
    :param make_data: function of `start_step` and `seed` that returns an iterator over `(batch, cond)`.
    :param batch_size: images per rank; `microbatch` of them at a time, all at once if it is not positive.
    :param ema_rate: one or several rates, a float or a comma-separated string; file names carry them as written.
    :param phema: widths of power-function EMAs to leave snapshots of, separated by commas; see `posthoc_ema`.
    :param grad_clip: global gradient norm to clip to; None takes the optimizer's default, 0 is no clipping.
    :param split_backward: full pass backward before the masked pass forward: half the activations, same gradients.
    :param shard: see `parallel.parallelize`.
    :param log_dir: where checkpoints go, of which the newest `keep` stay (0: all).
    :param load_weights: function of model and file that loads weights of another kind of model for fine-tuning.
    :param guardian: see `guardian.Guardian`; `max_rollbacks` times a spike goes back to the last checkpoint.
    :param batch_names: function of step and seed that names the files of this rank's batch, for reports of spikes.
    :param draw_grid: function that draws (n, H, W, 3) uint8 images with the model, every `sample_interval` steps.
    :param evaluate: function that draws with the model and returns a dict of metrics on rank 0, every `eval_interval`
        steps. All ranks call it.
    :param config: JSON values that go into every checkpoint. There is no generator to save: see `random_util`.
    """

    def __init__(
        self,
        *,
        objective,
        first_stage,
        make_data,
        schedule_sampler,
        log_dir,
        guardian,
        batch_size,
        load_weights,
        microbatch=-1,
        lr=3e-4,
        ema_rate="0.9999",
        phema="",
        phema_dtype="fp32",
        log_interval=100,
        save_interval=10000,
        keep=0,
        resume_checkpoint="auto",
        optimizer="adan",
        weight_decay=0.0,
        grad_clip=None,
        split_backward=False,
        shard="none",
        lr_anneal_steps=0,
        max_steps=0,
        fp16_scale_growth=1e-3,
        max_rollbacks=0,
        batch_names=None,
        sample_interval=0,
        draw_grid=None,
        eval_interval=0,
        evaluate=None,
        config=None,
        seed=0,
    ):
        self.objective, self.model = objective, objective.model
        self.first_stage, self.schedule_sampler, self.guardian = first_stage, schedule_sampler, guardian
        self.make_data, self.batch_names, self.draw_grid = make_data, batch_names, draw_grid
        self.eval_interval, self.evaluate = eval_interval, evaluate
        self.config = config
        self.log_dir, self.keep = Path(log_dir), keep
        self.log_interval, self.save_interval, self.sample_interval = log_interval, save_interval, sample_interval
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.passes = ("full", "masked") if split_backward and objective.masked else ("both",)
        self.lr, self.lr_anneal_steps, self.seed = lr, lr_anneal_steps, seed
        self.last_step = lr_anneal_steps or max_steps or None
        self.device = next(self.model.parameters()).device
        self.grad_clip = default_grad_clip(optimizer) if grad_clip is None else grad_clip
        self.scaler = torch.amp.GradScaler(
            self.device.type,
            enabled=objective.precision == "fp16",
            growth_factor=2**fp16_scale_growth,
            growth_interval=1,
        )
        self.step, self.train_seconds, self.rollbacks, self.max_rollbacks = 0, 0.0, 0, max_rollbacks
        self._stop_signal = None
        self._names = [name for name, p in self.model.named_parameters() if p.requires_grad]

        source, step = find_resume_step(self.log_dir, resume_checkpoint)
        if source is not None and not step:
            load_weights(self.model, source)
        elif source is not None:
            self.model.load_state_dict(dist_util.load_state_dict(source, self.device))
        dist_util.sync_params(self.model.parameters())
        self.ddp = parallelize(objective, shard)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = make_optimizer(optimizer, self.params, lr, weight_decay, shard)
        self.ema = {rate: [p.detach().clone() for p in self.params] for rate in str(ema_rate).split(",")}
        self.phema = PowerEMA(self.params, tuple(map(float, phema.split(","))) if phema else ())
        self.phema_dtype = phema_dtype
        if step:
            self._load_train_state(source, step)
        if dist_util.is_main():
            prune_checkpoints(self.log_dir, 0)
        logger.rewind(self.step)
        logger.log(f"starting at step {step}" + (f", weights from {source}" if source else ", fresh weights"))
        self._start_data()

    # ------------------------------------------------------------ resuming and saving

    def _load_train_state(self, model_path, step):
        for rate, params in self.ema.items():
            state = dist_util.load_state_dict(model_path.with_name(ema_name(rate, step)), self.device)
            for param, name in zip(params, self._names, strict=True):
                param.copy_(like(state[name], param))
        state = dist_util.load_state_dict(model_path.with_name(opt_name(step)), self.device)
        load_optimizer_state(self.opt, state["optimizer"], self.params)
        self.scaler.load_state_dict(state["scaler"])
        self.schedule_sampler.load_state_dict(state["schedule_sampler"])
        self.guardian.load_state_dict(state["guardian"])
        self.phema.load_state_dict(state["phema"])
        self.step, self.train_seconds, self.rollbacks = step, state["train_seconds"], state["rollbacks"]

    def _start_data(self):
        """Data and noise of the present step: after a rollback they come from another seed."""
        self.run_seed = fold_seed(self.seed, self.rollbacks) if self.rollbacks else self.seed
        self.data = self.make_data(start_step=self.step, seed=self.run_seed)
        self._sums, self._steps_since_log = defaultdict(lambda: torch.zeros((), device=self.device)), 0
        self._last_log = time.perf_counter()

    def save(self):
        """Write a complete checkpoint of the present step. All ranks call it together."""
        state = {key: whole(value) for key, value in self.model.state_dict().items()}
        emas = {rate: state | dict(zip(self._names, map(whole, ema), strict=True)) for rate, ema in self.ema.items()}
        train_state = {
            "optimizer": optimizer_state(self.opt),
            "scaler": self.scaler.state_dict(),
            "schedule_sampler": self.schedule_sampler.state_dict(),
            "guardian": self.guardian.state_dict(),
            "phema": self.phema.state_dict(),
            "step": self.step,
            "seed": self.seed,
            "rollbacks": self.rollbacks,
            "train_seconds": self.train_seconds,
            "config": json.dumps(self.config),
        }
        if dist_util.is_main():
            save_snapshots(self.log_dir, self.step, train_state["phema"], state, self._names, self.phema_dtype)
            save_checkpoint(self.log_dir, self.step, state, emas, train_state)
            prune_checkpoints(self.log_dir, self.keep)
            logger.log(f"saved {self.log_dir / model_name(self.step)}")
        dist_util.barrier()

    def _roll_back(self):
        """Go back to the last checkpoint, and on from there with other data and noise."""
        step = latest_step(self.log_dir)
        if step is None or self.rollbacks >= self.max_rollbacks:
            return
        rollbacks, path = self.rollbacks + 1, self.log_dir / model_name(step)
        state = dist_util.load_state_dict(path, self.device)
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                param.copy_(like(state[name], param))
        self._load_train_state(path, step)
        self.rollbacks = rollbacks
        logger.rewind(step)
        logger.log(f"rolled back to step {step} with other data, {rollbacks} of at most {self.max_rollbacks} times")
        self._start_data()

    # ------------------------------------------------------------ training

    def run_loop(self):
        """Train to the end, logging and saving on the way; a finished run returns at once.

        :raises TrainingFault: when too many steps in a row are not finite.
        """
        if self.last_step and self.step >= self.last_step:
            logger.log(f"step {self.step} of {self.last_step} is done: nothing to train")
            return
        self.objective.train()
        bar = tqdm(total=self.last_step, initial=self.step, unit="step", disable=None if dist_util.is_main() else True)
        with self._signals():
            self._run_steps(bar)
        bar.close()

    def _run_steps(self, bar):
        saved_step, stopped = self.step, False
        self._last_log = time.perf_counter()
        while not stopped and (not self.last_step or self.step < self.last_step):
            self.run_step(*next(self.data))
            bar.update(self.step - bar.n)
            stopped = dist_util.any_rank(self._stop_signal is not None)
            evaluated = not stopped and self._evaluate()
            if self.step % self.log_interval == 0 or self.step == self.last_step or stopped or evaluated:
                bar.set_postfix_str(self._log())
            if self.sample_interval and self.step % self.sample_interval == 0:
                self._show_grid()
            if self.step % self.save_interval == 0:
                self.save()
                saved_step = self.step
        if saved_step != self.step:
            self.save()
        if stopped:
            logger.log(f"stopped by a signal at step {self.step}: the same command goes on from here")

    @contextmanager
    def _signals(self):
        """Within the block SIGTERM and SIGUSR1 are noted, and obeyed after the step."""

        def note(number, frame):
            self._stop_signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run_step(self, batch, cond):
        """One optimizer step on this rank's batch and its `{"y": (N,)}`.

        :param batch: (N, 3, H, W) images in [-1, 1], or (N, 2, C, h, w) cached posterior means and deviations.
        """
        random = GlobalBatchRandom(
            self.run_seed, self.step, self.device, dist_util.get_rank(), dist_util.get_world_size()
        )
        batch = batch.to(self.device, non_blocking=True)
        if batch.ndim == 5:
            x_start = self.first_stage.sample(*batch.unbind(1), random.randn_like)
        else:
            x_start = self.first_stage.encode(batch, random.randn_like)
        t, weights = self.schedule_sampler.sample(len(batch), self.device, random.rand)
        rows = {"x_start": x_start, "t": t}
        rows |= self.objective.draw(x_start, random.rand, random.randn_like, random.host_rand)
        rows |= {key: value.to(self.device, non_blocking=True) for key, value in cond.items()}
        losses = self._forward_backward(rows, weights)
        loss, norm = self._optimize(losses["loss"].mean())
        self.step += 1
        if loss is None:
            logger.log(f"step {self.step} was not finite and is skipped, {self.guardian.bad_steps} in all")
            return
        self.schedule_sampler.update_with_local_losses(t, losses["loss"])
        self._add_to_sums(losses, t, norm)
        zscore = self.guardian.spike(loss)
        if zscore is not None:
            self._report_spike(zscore, loss, losses["loss"], rows)
            self._roll_back()

    def _forward_backward(self, rows, weights):
        """Accumulate the gradients of the weighted mean loss. Returns the (N,) losses, detached."""
        num, parts = len(weights), []
        starts = range(0, num, self.microbatch)
        for start in starts:
            micro, part = slice(start, start + self.microbatch), {}
            for passes in self.passes:
                last = start == starts[-1] and passes == self.passes[-1]
                with nullcontext() if last or self.ddp is self.objective else self.ddp.no_sync():
                    losses = self.ddp(**{key: value[micro] for key, value in rows.items()}, passes=passes)
                    loss = (losses["loss"] * weights[micro]).sum() / num
                    self.scaler.scale(loss).backward()
                losses = {key: value.detach() for key, value in losses.items()}
                part = part | losses | {"loss": part.get("loss", 0) + losses["loss"]}
            parts.append(part)
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _optimize(self, local_loss):
        """Step on the accumulated gradients, unless they are not finite.

        The loss and the norm are the one thing of a step that the host waits for.

        :return: the mean loss over ranks, or None for a step that was skipped; and the gradient norm.
        """
        for group in self.opt.param_groups:
            group["lr"] = annealed_lr(self.lr, self.step, self.lr_anneal_steps)
        self.scaler.unscale_(self.opt)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.params, self.grad_clip or float("inf")))
        loss, norm = dist_util.mean_over_ranks(torch.stack([local_loss, norm])).tolist()
        finite = self.guardian.is_finite(loss, norm)
        if finite or self.scaler.is_enabled():  # the scaler skips by itself, and learns from it
            self.scaler.step(self.opt)
            self.scaler.update()
        self.opt.zero_grad(set_to_none=True)
        self.phema.update(self.params, self.step + 1)  # after skipped steps too: its profile is one of all steps
        if not finite:
            return None, norm
        for rate, params in self.ema.items():
            update_ema(params, self.params, float(rate))
        return loss, norm

    def _report_spike(self, zscore, loss, losses, rows):
        worst = losses.argsort(descending=True)[:8].tolist()
        logger.log(f"step {self.step}: the loss {loss:.4f} is a spike, {zscore:.1f} standard deviations above its mean")
        names = self.batch_names(self.step - 1, self.run_seed) if self.batch_names else None
        for i in worst:
            label = rows["y"][i].item() if "y" in rows else None
            file = f"  {names[i]}" if names else ""
            logger.log(f"  loss {losses[i].item():.4f}  t {rows['t'][i].item()}  label {label}{file}")

    # ------------------------------------------------------------ looking

    @contextmanager
    def ema_weights(self):
        """Within the block the model holds its (first) EMA and is in eval mode."""
        ema = next(iter(self.ema.values()))
        own = [p.detach().clone() for p in self.params]
        self.model.eval()
        with torch.no_grad():
            copy_all(self.params, ema)
            yield
            copy_all(self.params, own)
        self.model.train()

    def _show_grid(self):
        with self.ema_weights():
            images = self.draw_grid()  # on all ranks: a sharded model needs them
        if dist_util.is_main():
            path = self.log_dir / f"grid{self.step:06d}.png"
            logger.image("samples", save_grid(path, images, columns=GRID_COLUMNS), self.step)

    def _evaluate(self):
        """Whether it is time for an evaluation; if so, its metrics go into the row that is logged next."""
        if not self.eval_interval or self.step % self.eval_interval:
            return False
        start = time.perf_counter()
        with self.ema_weights():
            metrics = self.evaluate()
        for key, value in metrics.items():
            logger.logkv(f"eval_{key}", value)
        logger.log(f"step {self.step}  " + "  ".join(f"{key} {value:.5g}" for key, value in metrics.items()))
        self._last_log += time.perf_counter() - start  # training is not slower for it
        return True

    def _add_to_sums(self, losses, t, norm):
        """Sums stay on the device until they are logged."""
        for key, value in losses.items():
            self._sums[key] += value.mean()
        quartile = t * NUM_QUARTILES // self.schedule_sampler.num_timesteps
        for q in range(NUM_QUARTILES):
            inside = quartile == q
            self._sums[f"loss_q{q}"] += (losses["loss"] * inside).sum()
            self._sums[f"count_q{q}"] += inside.sum()
        self._sums["grad_norm"] += norm
        self._steps_since_log += 1

    def _log(self):
        """Log the means since the last call, over all ranks. Returns a summary for the progress bar."""
        if not self._steps_since_log:
            return "no finite step"
        keys = sorted(self._sums)
        means = dist_util.mean_over_ranks(torch.stack([self._sums[key] for key in keys])).tolist()
        means = dict(zip(keys, means, strict=True))
        now, steps = time.perf_counter(), self._steps_since_log
        seconds, self._last_log = now - self._last_log, now
        self.train_seconds += seconds
        global_batch = self.batch_size * dist_util.get_world_size()
        speed = steps * global_batch / seconds
        row = {"step": self.step, "samples": self.step * global_batch}
        row |= {key: value / steps for key, value in means.items() if "_q" not in key}
        row |= {
            f"loss_q{q}": means[f"loss_q{q}"] / means[f"count_q{q}"]
            for q in range(NUM_QUARTILES)
            if means[f"count_q{q}"]
        }
        row |= {"lr": self.opt.param_groups[0]["lr"], "images_per_second": speed, "train_seconds": self.train_seconds}
        row |= {"bad_steps": self.guardian.bad_steps}
        if self.last_step:
            row["eta_seconds"] = (self.last_step - self.step) * seconds / steps
        self._sums.clear()
        self._steps_since_log = 0
        for key, value in row.items():
            logger.logkv(key, value)
        logger.dumpkvs()
        eta = f"  ETA {timedelta(seconds=round(row['eta_seconds']))}" if self.last_step else ""
        summary = f"loss {row['loss']:.4f}  {speed:.1f} images/s{eta}"
        of = f"/{self.last_step}" if self.last_step else ""
        logger.log(f"step {self.step}{of}  {summary}  grad_norm {row['grad_norm']:.3f}  lr {row['lr']:.2e}")
        return summary
