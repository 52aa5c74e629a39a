"""Solvers by name: DDPM and DDIM of this package, few-step solvers through diffusers' schedulers, and flow matching's.

Those of a diffusion run on the trained discrete schedule, with guidance. The learned variance belongs to the ancestral
chain: `ddpm` uses it, all others follow the ODE or SDE of the schedule and use the prediction alone. The steps of flow
matching are in `flow_matching`.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..flow_matching import FLOW_STEPS, NUM_TIMESTEPS, Prediction, add_noise, check_velocity, renoise
from ..guidance import at_timestep
from ..respace import SpacedDiffusion, create_diffusion
from ..sample_config import SOLVERS_OF
from ..utils.errors import UserError

# name: scheduler of diffusers, its options
SCHEDULERS = {
    # Lu et al. 2022, "DPM-Solver++", algorithm 2 (second order, multistep)
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    # The same paper's stochastic form: noise on the way mends errors, as in ancestral sampling
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    # Zhao et al. 2023, "UniPC", algorithm 1 with B2(h), order 2, which the paper takes for guided sampling
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
    # Karras et al. 2022, algorithm 1 without noise: second order, two evaluations per step but the last
    "heun": ("HeunDiscreteScheduler", {}),
    # The same in first order
    "euler": ("EulerDiscreteScheduler", {}),
}


def create_solver(
    name: str, num_sampling_steps: str | int, diffusion_config: dict[str, Any]
) -> "DiffusionSolver | SchedulerSolver | FlowSolver":
    """Make a solver.

    :param name: one of `config.SOLVERS_OF` the objective that the model was trained with.
    :param num_sampling_steps: `250`; for ddpm and ddim also `10,15,20` and `ddim50`.
    :param diffusion_config: options of `create_diffusion` that the model was trained with.
    :return: an object with `progressive(denoise, noise, ...)`, see `DiffusionSolver`; `name`; `num_steps`;
        `num_outputs`, how many dicts `progressive` yields; and `original_num_steps`.
    :raises UserError: for an unknown name, one of another objective, and steps that the solver cannot take.
    """
    objective = diffusion_config.get("objective", "diffusion")
    if name not in SOLVERS_OF[objective]:
        known = any(name in solvers for solvers in SOLVERS_OF.values())
        reason = f", but the model was trained with --objective {objective}" if known else ""
        raise UserError(f"--solver is {name!r}{reason}: choose one of {', '.join(SOLVERS_OF[objective])}")
    if name in FLOW_STEPS:
        return FlowSolver(name, num_sampling_steps)
    if name in SCHEDULERS:
        return SchedulerSolver(name, num_sampling_steps, create_diffusion(**diffusion_config))
    steps = str(num_sampling_steps)
    try:
        diffusion = create_diffusion(**diffusion_config, timestep_respacing=steps)
    except UserError as error:
        raise UserError(f"--num_sampling_steps is {steps}: {error}") from error
    return DiffusionSolver(diffusion, use_ddim=name == "ddim")


def read_num_steps(name: str, num_sampling_steps: str | int, last: int) -> int:
    """The number of steps of a solver that takes no respacing.

    :raises UserError: for what is not a number from 1 to `last`.
    """
    text = str(num_sampling_steps)
    if not text.isdecimal() or not 1 <= int(text) <= last:
        raise UserError(f"--num_sampling_steps is {text!r}: solver {name} takes one number from 1 to {last}")
    return int(text)


class DiffusionSolver:
    """Ancestral sampling (DDPM) or DDIM on a respaced diffusion."""

    def __init__(self, diffusion: SpacedDiffusion, use_ddim: bool = False):
        self.diffusion, self.original_num_steps = diffusion, diffusion.original_num_steps
        self.use_ddim, self.name = use_ddim, "ddim" if use_ddim else "ddpm"
        self.num_steps = self.num_outputs = diffusion.num_timesteps

    @torch.no_grad()
    def step(
        self, denoise: Callable[..., torch.Tensor], x: torch.Tensor, index: int, **options: Any
    ) -> dict[str, torch.Tensor]:
        """One step from `index` of the respaced process, whose last step is 0. Arguments: see `progressive`.

        The timestep is known on the host, so that nothing here waits for the device.

        :return: dict of `sample` and `pred_xstart`, each (N, C, H, W).
        """
        t = torch.full((len(x),), index, device=x.device)
        timestep = self.diffusion.model_timesteps(torch.tensor([index])).item()
        take = self.diffusion.ddim_sample if self.use_ddim else self.diffusion.p_sample
        return take(at_timestep(denoise, timestep), x, t, **options)

    def add_noise(self, x_start: torch.Tensor, index: int, noise: torch.Tensor) -> torch.Tensor:
        """x_start noised to what `step` takes at `index`."""
        return self.diffusion.q_sample(x_start, torch.full((len(x_start),), index, device=x_start.device), noise)

    def renoise(self, x: torch.Tensor, index: int, noise: torch.Tensor) -> torch.Tensor:
        """What `step` gave at `index`, noised to what it takes there: eq. 1 of DDPM."""
        beta = float(self.diffusion.betas[index])
        return (1 - beta) ** 0.5 * x + beta**0.5 * noise

    def progressive(
        self,
        denoise: Callable[..., torch.Tensor],
        noise: torch.Tensor,
        clip_denoised: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Samples, step by step.

        :param denoise: `denoise(x, t, **model_kwargs)` -> (N, C or 2C, H, W), with t in the trained schedule.
        :param noise: (N, C, H, W) x_T.
        :param clip_denoised: clip every predicted x_start to [-1, 1].
        :param randn_like: where the noise on the way comes from.
        :return: a generator of dicts of `sample` and `pred_xstart`, each (N, C, H, W); the last `sample` is the result.
        """
        options, x = {"clip_denoised": clip_denoised, "model_kwargs": model_kwargs, "randn_like": randn_like}, noise
        for index in reversed(range(self.num_steps)):
            out = self.step(denoise, x, index, **options)
            yield out
            x = out["sample"]


class SolveWithoutWaiting(TorchFunctionMode):
    """Within it, `torch.linalg.solve` does not wait for the device to check that the matrix is invertible.

    UniPC solves a system of two equations in every step, whose matrix is known to be.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **(kwargs or {})).result
        return func(*args, **(kwargs or {}))


class SchedulerSolver:
    """A scheduler of diffusers on the trained betas; deterministic, but for `sde-dpm++`.

    Timesteps are evenly spaced from the last one down, as in Lin et al. 2023, "Common diffusion noise schedules ...".
    """

    def __init__(self, name: str, num_sampling_steps: str | int, diffusion: SpacedDiffusion):
        self.name, self.diffusion, self.original_num_steps = name, diffusion, diffusion.original_num_steps
        self.num_steps = read_num_steps(name, num_sampling_steps, self.original_num_steps - 1)
        self.num_outputs = 2 * self.num_steps - 1 if name == "heun" else self.num_steps

    def make_scheduler(self, device: torch.device) -> Any:
        """A fresh scheduler: each holds the state of one run. Its timesteps are on the CPU.

        :param device: of the samples.
        """
        class_name, options = SCHEDULERS[self.name]
        scheduler = getattr(import_module("diffusers"), class_name)(trained_betas=self.diffusion.betas, **options)
        if self.name not in ("heun", "euler"):
            scheduler.set_timesteps(self.num_steps)
        else:  # these would evaluate between timesteps
            stride = self.original_num_steps / self.num_steps
            timesteps = [round(self.original_num_steps - i * stride) - 1 for i in range(self.num_steps)]
            scheduler.set_timesteps(timesteps=timesteps)
        scheduler.set_begin_index(0)  # or it searches the timesteps for its place
        if self.name == "unipc":  # copies single numbers to the device in every step, unless they are there
            scheduler.sigmas = scheduler.sigmas.to(device, non_blocking=True)
        return scheduler

    @torch.no_grad()
    def progressive(
        self,
        denoise: Callable[..., torch.Tensor],
        noise: torch.Tensor,
        clip_denoised: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """As `DiffusionSolver.progressive`; only `sde-dpm++` has noise on the way."""
        scheduler = self.make_scheduler(noise.device)
        x = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            x_t = scheduler.scale_model_input(x, timestep)  # some schedulers hold x_t / sqrt(alpha_bar)
            t = torch.full((len(x),), int(timestep), device=x.device)
            denoise_now = at_timestep(denoise, int(timestep))
            out = self.diffusion.p_mean_variance(denoise_now, x_t, t, clip_denoised, model_kwargs=model_kwargs)
            eps = self.diffusion._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            noises = {"variance_noise": randn_like(x)} if self.name == "sde-dpm++" else {}
            with SolveWithoutWaiting():
                x = scheduler.step(eps, timestep, x, **noises).prev_sample
            yield {"sample": x, "pred_xstart": out["pred_xstart"]}


class FlowSolver:
    """A solver of `flow_matching`, with the interface of a `DiffusionSolver`."""

    original_num_steps = NUM_TIMESTEPS

    def __init__(self, name: str, num_sampling_steps: str | int):
        self.name, (self.take_step, make_times) = name, FLOW_STEPS[name]
        self.num_steps = self.num_outputs = read_num_steps(name, num_sampling_steps, NUM_TIMESTEPS)
        self.times = make_times(self.num_steps)[::-1]  # of the result of `step` at each index, and of pure noise: 1

    @torch.no_grad()
    def step(
        self,
        denoise: Callable[..., torch.Tensor],
        x: torch.Tensor,
        index: int,
        clip_denoised: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    ) -> dict[str, torch.Tensor]:
        """As `DiffusionSolver.step`: the step at `index` num_steps - 1 is the first one, from noise."""

        def predict(x: torch.Tensor, time: float) -> Prediction:
            timestep = NUM_TIMESTEPS * time
            t = torch.full((len(x),), timestep, device=x.device)
            velocity = at_timestep(denoise, timestep)(x, t, **(model_kwargs or {}))
            check_velocity(velocity, x)
            x_start = x - time * velocity
            if clip_denoised:
                x_start = x_start.clamp(-1, 1)
                velocity = (x - x_start) / time
            return Prediction(velocity, x_start)

        return self.take_step(predict, x, self.times[index + 1], self.times[index], randn_like)

    def add_noise(self, x_start: torch.Tensor, index: int, noise: torch.Tensor) -> torch.Tensor:
        """x_start noised to what `step` takes at `index`."""
        return add_noise(x_start, self.times[index + 1], noise)

    def renoise(self, x: torch.Tensor, index: int, noise: torch.Tensor) -> torch.Tensor:
        """What `step` gave at `index`, noised to what it takes there."""
        return renoise(x, self.times[index], self.times[index + 1], noise)

    def progressive(
        self,
        denoise: Callable[..., torch.Tensor],
        noise: torch.Tensor,
        clip_denoised: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """As `DiffusionSolver.progressive`; only `flow-sde` has noise on the way."""
        x = noise
        for index in reversed(range(self.num_steps)):
            out = self.step(denoise, x, index, clip_denoised, model_kwargs, randn_like)
            yield out
            x = out["sample"]
