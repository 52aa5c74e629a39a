"""A diffusers pipeline around the models: `pipe(class_labels=["golden retriever"], guidance_scale=4.0)`."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor

from .config import OLDER_AUTOENCODER
from .flow_matching import NUM_TIMESTEPS, even_times
from .guidance import Guidance, GuidedDenoiser
from .latents.autoencoder import AutoencoderFirstStage, check_first_stage, describe_first_stage
from .models import create_model
from .respace import create_diffusion, space_timesteps
from .sampling.class_names import find_label
from .sampling.image_sampler import refuse_broken, to_uint8
from .utils.errors import UserError

LEARNED = ("learned", "learned_range")


class MDTTransformer(ModelMixin, ConfigMixin):
    """A model of `create_model` as diffusers saves and loads it."""

    @register_to_config
    def __init__(self, name="MDTv2_XL_2", options=None):
        super().__init__()
        self.model = create_model(name, **(options or {}))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W), (N,) timesteps, (N,) labels -> (N, C or 2C, H, W)."""
        return self.model(x, t, y)


def make_scheduler(diffusion_config: Mapping[str, Any]) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """The default solver of a model's objective, as a scheduler of diffusers.

    Ancestral sampling on the trained schedule: what `create_diffusion` respaces. Or Euler's steps of flow matching.
    """
    if diffusion_config.get("objective") == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS)
    diffusion = create_diffusion(**diffusion_config)
    learned = diffusion_config.get("learn_sigma", True)
    fixed = "fixed_small" if diffusion_config.get("sigma_small") else "fixed_large"
    predict = {"predict_xstart": "sample", "predict_v": "v_prediction"}
    chosen = [value for key, value in predict.items() if diffusion_config.get(key)]
    return DDPMScheduler(
        num_train_timesteps=len(diffusion.betas),
        trained_betas=diffusion.betas.tolist(),
        variance_type="learned_range" if learned else fixed,
        prediction_type=chosen[0] if chosen else "epsilon",
        clip_sample=False,
    )


class MDTPipeline(DiffusionPipeline):
    """Draws images of given classes.

    :param transformer: the denoiser.
    :param scheduler: any of diffusers' on the trained betas; `DDPMScheduler` uses the learned variance, all others the
        prediction alone. For flow matching, one of diffusers' for that.
    :param vae: decodes latents: an `AutoencoderKL`, `AutoencoderDC` or `AutoencoderTiny`; None for a model of pixels.
    :param id2label: names of the classes by label.
    :param autoencoder: what is known of the VAE in training, see `latents.autoencoder.describe_first_stage`. Folders of
        older versions have none: their VAE gets the scale that those used for all.
    :param objective: `diffusion` or `flow`, that the model was trained with.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (diffusers adds a list to it)

    def __init__(
        self,
        transformer: MDTTransformer,
        scheduler: SchedulerMixin,
        vae: ModelMixin = None,
        id2label: dict = None,  # noqa: RUF013 (diffusers compares the annotation with the component)
        autoencoder: dict = None,  # noqa: RUF013
        objective: str = "diffusion",
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label, autoencoder=autoencoder, objective=objective)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their labels; [] where they are not known."""
        return list((self.config.id2label or {}).values())

    def get_label_ids(self, class_labels: str | int | Sequence[str | int]) -> list[int]:
        """Names or numbers of classes -> list of labels.

        :raises UserError: for one that is no class, or may be several, and where there is none.
        """
        class_labels = [class_labels] if isinstance(class_labels, str | int) else list(class_labels)
        if not class_labels:
            raise UserError("class_labels is empty: give a name or number of a class for each image to draw")
        return [find_label(label, self.class_names, self.transformer.model.num_classes) for label in class_labels]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | Sequence[str | int],
        guidance_scale: float = 4.0,
        num_inference_steps: int = 250,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_rule: str | None = None,
        scale_pow: float = 4.0,
        guided_channels: int | str | None = "auto",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image per entry of `class_labels`.

        :param class_labels: names or numbers of classes.
        :param guidance_scale: 1 or less is no guidance.
        :param generator: one torch.Generator, or one per image, which makes an image a function of its own.
        :param guidance_rule, scale_pow: see `guidance.Guidance`; the rule is the model's own if None.
        :param guided_channels: see `guidance.resolve_channels`.
        :param output_type: `pil`, `np` (N, H, W, 3) in [0, 1], `pt` (N, 3, H, W) in [0, 1], or `latent`.
        :return: `ImagePipelineOutput`, or a tuple without `return_dict`.
        :raises UserError: for wrong class labels, for a scheduler of another objective than the model's, for another
            number of generators than of images, for guidance of a model without a null class, for a VAE of another
            scale or shape than in training, and for images that are
            not finite.
        """
        model, device = self.transformer.model, self._execution_device
        labels = torch.tensor(self.get_label_ids(class_labels), device=device)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise UserError(
                f"generator is a list of {len(generator)}, but class_labels asks for {len(labels)} images: give one "
                "generator for each, or one for all"
            )
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps is {num_inference_steps}: it must be at least 1")
        self.check_scheduler()
        rule = "none" if guidance_scale <= 1 else guidance_rule or model.guidance_rule
        guidance = Guidance(
            rule, guidance_scale, scale_pow, guided_channels=guided_channels,
            diffusion_steps=self.scheduler.config.num_train_timesteps,
        )  # fmt: skip
        denoise = GuidedDenoiser(self.transformer, guidance, model.null_label)
        shape = (len(labels), model.in_channels, model.input_size, model.input_size)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        latents = self._denoise(denoise, noise, labels, num_inference_steps, generator)
        if output_type != "latent" and self.vae is not None:
            first_stage = AutoencoderFirstStage(self.vae)
            check_first_stage(first_stage, model.in_channels, self.config.autoencoder or OLDER_AUTOENCODER, "vae")
            latents = first_stage.decode(latents)
        precision = "fp16" if self.transformer.dtype == torch.float16 else "fp32"
        refuse_broken(latents, range(len(labels)), precision)
        images = latents if output_type == "latent" else self._to_output(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_scheduler(self) -> None:
        """Refuse a scheduler that does not take what the model predicts.

        :raises UserError: for one of diffusion with a model of flow matching, and the other way round.
        """
        name = type(self.scheduler).__name__
        flow = name.startswith("FlowMatch") or self.scheduler.config.get("prediction_type") == "flow_prediction"
        if flow != (self.config.objective == "flow"):
            wanted = "flow matching, such as FlowMatchEulerDiscreteScheduler" if not flow else "diffusion"
            raise UserError(
                f"the scheduler is a {name}, but the model was trained with --objective {self.config.objective}: take "
                f"one of {wanted}"
            )

    def _denoise(self, denoise, noise, labels, num_inference_steps, generator):
        scheduler = self.scheduler
        ancestral = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in LEARNED
        if ancestral:
            kept = space_timesteps(scheduler.config.num_train_timesteps, str(num_inference_steps))
            scheduler.set_timesteps(timesteps=sorted(kept, reverse=True), device=noise.device)
        elif isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            # From 1 to 1 / n, and then 0, as `flow-euler`: its own default ends with a step from 1 / 1000.
            scheduler.set_timesteps(sigmas=even_times(num_inference_steps)[:-1], device=noise.device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=noise.device)
        if not ancestral and scheduler.config.get("variance_type") in LEARNED:
            scheduler.register_to_config(variance_type=None)  # taken over from the trained scheduler's configuration
        accepted = inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if "generator" in accepted else {}
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching's have neither this nor scaling
        for timestep in self.progress_bar(scheduler.timesteps):
            t = timestep.to(noise.device).expand(len(x))
            scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            out = denoise(scaled, t, labels)
            if not ancestral:
                out = out[:, : x.shape[1]]
            x = scheduler.step(out, timestep, x, **options).prev_sample
        return x

    def _to_output(self, images, output_type):
        if output_type == "pt":
            return ((images + 1) / 2).clamp(0, 1)
        pixels = to_uint8(images)
        return self.numpy_to_pil(pixels / 255) if output_type == "pil" else pixels / 255.0


def build_pipeline(
    model_config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    diffusion_config: Mapping[str, Any],
    vae: ModelMixin | None = None,
    names: Sequence[str] = (),
) -> MDTPipeline:
    """Assemble a pipeline.

    :param model_config: `name` and `options` for `create_model`. :param state_dict: its weights.
    :param diffusion_config: options of `create_diffusion`. :param vae: an autoencoder of diffusers, or None.
    :param names: of the classes, in the order of their labels.
    """
    transformer = MDTTransformer(**model_config)
    transformer.model.load_state_dict(state_dict)
    id2label = dict(enumerate(names)) or None
    objective = diffusion_config.get("objective", "diffusion")
    autoencoder = describe_first_stage(AutoencoderFirstStage(vae)) if vae is not None else None
    return MDTPipeline(
        transformer.eval(),
        make_scheduler(diffusion_config),
        vae,
        id2label,
        autoencoder=autoencoder,
        objective=objective,
    )
