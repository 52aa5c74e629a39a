"""The training loop. It builds nothing: the script hands it model, data and diffusion."""

import time
from collections import defaultdict
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from . import dist_util, logger
from .checkpoint import ema_name, latest_step, model_name, opt_name, parse_step, save_checkpoint
from .optim import annealed_lr, create_optimizer, default_grad_clip, update_ema
from .random_util import GlobalBatchRandom

NUM_QUARTILES = 4


def find_resume_step(log_dir, resume_checkpoint):
    """Where training goes on.

    :param resume_checkpoint: `auto` for the newest complete checkpoint of `log_dir`; a `model{step}.pt` that has its
        `opt{step}.pt` beside it; any other file of weights, from which training starts at step 0; or "" for neither.
    :return: the folder or file to load (None for nothing), and the step (0 with a file: weights only).
    :raises ValueError: when the named file does not exist.
    """
    if resume_checkpoint == "auto":
        step = latest_step(log_dir)
        return (None, 0) if step is None else (Path(log_dir, model_name(step)), step)
    if not resume_checkpoint:
        return None, 0
    path = Path(resume_checkpoint)
    if not path.exists():
        raise ValueError(f"resume_checkpoint {path} does not exist: name a file, or auto")
    try:
        step = parse_step(path)
    except ValueError:
        return path, 0
    return path, step if path.with_name(opt_name(step)).exists() else 0


class TrainLoop:
    """Trains an objective until `lr_anneal_steps` or `max_steps`, for ever when neither is set.

    :param objective: `TwoPassObjective` on this rank's device.
    :param first_stage: encodes images; see `autoencoder`.
    :param make_data: function of `start_step` that returns an iterator over `(batch, cond)`.
    :param batch_size: images per rank; `microbatch` of them at a time, all at once if it is not positive.
    :param ema_rate: one or several rates, a float or a comma-separated string; file names carry them as written.
    :param grad_clip: global gradient norm to clip to; None takes the optimizer's default, 0 is no clipping.
    :param log_dir: where checkpoints go.
    """

    def __init__(
        self,
        *,
        objective,
        first_stage,
        make_data,
        schedule_sampler,
        log_dir,
        batch_size,
        microbatch=-1,
        lr=3e-4,
        ema_rate="0.9999",
        log_interval=100,
        save_interval=10000,
        resume_checkpoint="auto",
        optimizer="adan",
        weight_decay=0.0,
        grad_clip=None,
        lr_anneal_steps=0,
        max_steps=0,
        fp16_scale_growth=1e-3,
        seed=0,
    ):
        self.objective, self.model = objective, objective.model
        self.first_stage, self.schedule_sampler = first_stage, schedule_sampler
        self.log_dir, self.log_interval, self.save_interval = Path(log_dir), log_interval, save_interval
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr, self.lr_anneal_steps, self.seed = lr, lr_anneal_steps, seed
        self.last_step = lr_anneal_steps or max_steps or None
        self.device = next(self.model.parameters()).device
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = create_optimizer(optimizer, self.params, lr, weight_decay)
        self.grad_clip = default_grad_clip(optimizer) if grad_clip is None else grad_clip
        self.scaler = torch.amp.GradScaler(
            self.device.type,
            enabled=objective.precision == "fp16",
            growth_factor=2**fp16_scale_growth,
            growth_interval=1,
        )
        self.step, self.train_seconds = 0, 0.0
        source, step = find_resume_step(self.log_dir, resume_checkpoint)
        if source is not None:
            self.model.load_state_dict(dist_util.load_state_dict(source, self.device))
        rates = str(ema_rate).split(",")
        self.ema = {rate: [p.detach().clone() for p in self.params] for rate in rates}
        if step:
            self._resume(source, step)
        dist_util.sync_params(self.model.parameters())
        logger.log(f"starting at step {step}" + (f", weights from {source}" if source else ", fresh weights"))
        self.data = make_data(start_step=self.step)
        self.ddp = objective
        if dist_util.get_world_size() > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.ddp = DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False)
        self._sums, self._steps_since_log = defaultdict(lambda: torch.zeros((), device=self.device)), 0

    # ------------------------------------------------------------ resuming and saving

    def _resume(self, model_path, step):
        names = self._trainable_names()
        for rate, params in self.ema.items():
            state = dist_util.load_state_dict(model_path.with_name(ema_name(rate, step)), self.device)
            for param, name in zip(params, names, strict=True):
                param.copy_(state[name])
        state = dist_util.load_state_dict(model_path.with_name(opt_name(step)), self.device)
        self.opt.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.schedule_sampler.load_state_dict(state["schedule_sampler"])
        self.step, self.train_seconds = step, state["train_seconds"]

    def _trainable_names(self):
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    def save(self):
        """Write a complete checkpoint of the present step."""
        if dist_util.is_main():
            state = self.model.state_dict()
            names = self._trainable_names()
            emas = {rate: state | dict(zip(names, params, strict=True)) for rate, params in self.ema.items()}
            train_state = {
                "optimizer": self.opt.state_dict(),
                "scaler": self.scaler.state_dict(),
                "schedule_sampler": self.schedule_sampler.state_dict(),
                "step": self.step,
                "seed": self.seed,
                "train_seconds": self.train_seconds,
            }
            save_checkpoint(self.log_dir, self.step, state, emas, train_state)
            logger.log(f"saved {self.log_dir / model_name(self.step)}")
        dist_util.barrier()

    # ------------------------------------------------------------ training

    def run_loop(self):
        """Train to the end, logging and saving on the way; a finished run returns at once."""
        if self.last_step and self.step >= self.last_step:
            logger.log(f"step {self.step} of {self.last_step} is done: nothing to train")
            return
        self.objective.train()
        saved_step = None
        bar = tqdm(total=self.last_step, initial=self.step, unit="step", disable=None if dist_util.is_main() else True)
        self._last_log = time.perf_counter()
        while not self.last_step or self.step < self.last_step:
            self.run_step(*next(self.data))
            bar.update()
            if self.step % self.log_interval == 0 or self.step == self.last_step:
                bar.set_postfix_str(self._log())
            if self.step % self.save_interval == 0:
                self.save()
                saved_step = self.step
        bar.close()
        if saved_step != self.step:
            self.save()

    def run_step(self, batch, cond):
        """One optimizer step on this rank's (N, 3, H, W) images in [-1, 1] and their `{"y": (N,)}`."""
        random = GlobalBatchRandom(self.seed, self.step, self.device, dist_util.get_rank(), dist_util.get_world_size())
        batch = batch.to(self.device, non_blocking=True)
        x_start = self.first_stage.encode(batch, random.randn_like)
        t, weights = self.schedule_sampler.sample(len(batch), self.device, random.rand)
        rows = {"x_start": x_start, "t": t}
        rows |= self.objective.draw(x_start, random.rand, random.randn_like, random.host_rand)
        rows |= {key: value.to(self.device, non_blocking=True) for key, value in cond.items()}
        losses = self._forward_backward(rows, weights)
        self.schedule_sampler.update_with_local_losses(t, losses["loss"])
        self._optimize()
        self._add_to_sums(losses, t)
        self.step += 1

    def _forward_backward(self, rows, weights):
        """Accumulate the gradients of the weighted mean loss. Returns the (N,) losses, detached."""
        num, parts = len(weights), []
        for start in range(0, num, self.microbatch):
            micro = slice(start, start + self.microbatch)
            last = start + self.microbatch >= num
            with nullcontext() if last or self.ddp is self.objective else self.ddp.no_sync():
                losses = self.ddp(**{key: value[micro] for key, value in rows.items()})
                loss = (losses["loss"] * weights[micro]).sum() / num
                self.scaler.scale(loss).backward()
            parts.append({key: value.detach() for key, value in losses.items()})
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _optimize(self):
        lr = annealed_lr(self.lr, self.step, self.lr_anneal_steps)
        for group in self.opt.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.opt)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.grad_clip or float("inf"))
        self.scaler.step(self.opt)
        self.scaler.update()
        self.opt.zero_grad(set_to_none=True)
        for rate, params in self.ema.items():
            update_ema(params, self.params, float(rate))
        self._sums["grad_norm"] += norm

    # ------------------------------------------------------------ logging

    def _add_to_sums(self, losses, t):
        """Sums stay on the device until they are logged: a step never waits for the host."""
        for key, value in losses.items():
            self._sums[key] += value.mean()
        quartile = t * NUM_QUARTILES // self.schedule_sampler.num_timesteps
        for q in range(NUM_QUARTILES):
            inside = quartile == q
            self._sums[f"loss_q{q}"] += (losses["loss"] * inside).sum()
            self._sums[f"count_q{q}"] += inside.sum()
        self._steps_since_log += 1

    def _log(self):
        """Log the means since the last call, over all ranks. Returns a summary for the progress bar."""
        keys = sorted(self._sums)
        means = dist_util.mean_over_ranks(torch.stack([self._sums[key] for key in keys])).tolist()
        means = dict(zip(keys, means, strict=True))
        now = time.perf_counter()
        seconds, self._last_log = now - self._last_log, now
        self.train_seconds += seconds
        global_batch = self.batch_size * dist_util.get_world_size()
        speed = self._steps_since_log * global_batch / seconds
        row = {"step": self.step, "samples": self.step * global_batch}
        row |= {key: value / self._steps_since_log for key, value in means.items() if "_q" not in key}
        row |= {
            f"loss_q{q}": means[f"loss_q{q}"] / means[f"count_q{q}"]
            for q in range(NUM_QUARTILES)
            if means[f"count_q{q}"]
        }
        row |= {"lr": self.opt.param_groups[0]["lr"], "images_per_second": speed, "train_seconds": self.train_seconds}
        if self.last_step:
            row["eta_seconds"] = (self.last_step - self.step) * seconds / self._steps_since_log
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
