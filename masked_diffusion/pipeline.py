"""A diffusers pipeline around the models: `pipe(class_labels=["golden retriever"], guidance_scale=4.0)`."""

import inspect

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor

from .guidance import Guidance, GuidedDenoiser
from .latents.autoencoder import StableDiffusionVAE
from .models import create_model
from .respace import create_diffusion, space_timesteps
from .sampling.class_names import find_label
from .sampling.image_sampler import to_uint8

LEARNED = ("learned", "learned_range")


class MDTTransformer(ModelMixin, ConfigMixin):
    """A model of `create_model` as diffusers saves and loads it."""

    @register_to_config
    def __init__(self, name="MDTv2_XL_2", options=None):
        super().__init__()
        self.model = create_model(name, **(options or {}))

    def forward(self, x, t, y):
        """(N, C, H, W), (N,) timesteps, (N,) labels -> (N, C or 2C, H, W)."""
        return self.model(x, t, y)


def make_scheduler(diffusion_config):
    """Ancestral sampling on the trained schedule: what `create_diffusion` respaces, as a scheduler of diffusers."""
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
        prediction alone.
    :param vae: decodes latents; None for a model of pixels.
    :param id2label: names of the classes by label.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (diffusers adds a list to it)

    def __init__(
        self,
        transformer: MDTTransformer,
        scheduler: DDPMScheduler,
        vae: AutoencoderKL = None,
        id2label: dict = None,  # noqa: RUF013 (diffusers compares the annotation with the component)
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)

    @property
    def class_names(self):
        """Names of the classes in the order of their labels; [] where nobody knows them."""
        return list((self.config.id2label or {}).values())

    def get_label_ids(self, class_labels):
        """Names or numbers of classes -> list of labels.

        :raises ValueError: for one that is no class, or may be several.
        """
        class_labels = [class_labels] if isinstance(class_labels, str | int) else class_labels
        return [find_label(label, self.class_names, self.transformer.model.num_classes) for label in class_labels]

    @torch.no_grad()
    def __call__(
        self,
        class_labels,
        guidance_scale=4.0,
        num_inference_steps=250,
        generator=None,
        guidance_rule=None,
        scale_pow=4.0,
        guided_channels=3,
        output_type="pil",
        return_dict=True,
    ):
        """Draw one image per entry of `class_labels`.

        :param class_labels: names or numbers of classes.
        :param guidance_scale: 1 or less is no guidance.
        :param generator: one torch.Generator, or one per image, which makes an image a function of its own.
        :param guidance_rule, scale_pow, guided_channels: see `guidance.Guidance`; the rule is the model's own if None.
        :param output_type: `pil`, `np` (N, H, W, 3) in [0, 1], `pt` (N, 3, H, W) in [0, 1], or `latent`.
        :return: `ImagePipelineOutput`, or a tuple without `return_dict`.
        :raises ValueError: for wrong class labels, and for guidance of a model without a null class.
        """
        model, device = self.transformer.model, self._execution_device
        labels = torch.tensor(self.get_label_ids(class_labels), device=device)
        rule = "none" if guidance_scale <= 1 else guidance_rule or model.guidance_rule
        guidance = Guidance(
            rule, guidance_scale, scale_pow, guided_channels=guided_channels,
            diffusion_steps=self.scheduler.config.num_train_timesteps,
        )  # fmt: skip
        denoise = GuidedDenoiser(self.transformer, guidance, model.null_label)
        shape = (len(labels), model.in_channels, model.input_size, model.input_size)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        latents = self._denoise(denoise, noise, labels, num_inference_steps, generator)
        if output_type != "latent":
            latents = self._to_images(latents, output_type)
        return ImagePipelineOutput(images=latents) if return_dict else (latents,)

    def _denoise(self, denoise, noise, labels, num_inference_steps, generator):
        scheduler = self.scheduler
        ancestral = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in LEARNED
        if ancestral:
            kept = space_timesteps(scheduler.config.num_train_timesteps, str(num_inference_steps))
            scheduler.set_timesteps(timesteps=sorted(kept, reverse=True), device=noise.device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=noise.device)
        if not ancestral and scheduler.config.get("variance_type") in LEARNED:
            scheduler.register_to_config(variance_type=None)  # taken over from the trained scheduler's configuration
        accepted = inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if "generator" in accepted else {}
        x = noise * scheduler.init_noise_sigma
        for timestep in self.progress_bar(scheduler.timesteps):
            t = timestep.to(noise.device).expand(len(x))
            out = denoise(scheduler.scale_model_input(x, timestep), t, labels)
            if not ancestral:
                out = out[:, : x.shape[1]]
            x = scheduler.step(out, timestep, x, **options).prev_sample
        return x

    def _to_images(self, latents, output_type):
        if self.vae is not None:
            latents = self.vae.decode(latents / StableDiffusionVAE.scale).sample
        if output_type == "pt":
            return ((latents + 1) / 2).clamp(0, 1)
        images = to_uint8(latents)
        return self.numpy_to_pil(images / 255) if output_type == "pil" else images / 255.0


def build_pipeline(model_config, state_dict, diffusion_config, vae=None, names=()):
    """Assemble a pipeline.

    :param model_config: `name` and `options` for `create_model`. :param state_dict: its weights.
    :param diffusion_config: options of `create_diffusion`. :param vae: diffusers' `AutoencoderKL`, or None.
    :param names: of the classes, in the order of their labels.
    """
    transformer = MDTTransformer(**model_config)
    transformer.model.load_state_dict(state_dict)
    id2label = dict(enumerate(names)) or None
    return MDTPipeline(transformer.eval(), make_scheduler(diffusion_config), vae, id2label)
