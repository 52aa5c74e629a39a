"""Published names of ADM, DiT and MDT that this package does without, and what to use instead.

Importing one of them, or taking it from its module, ends in one sentence. `docs/adm_dit_mdt.md` lists them for readers.
"""

import sys
from importlib.abc import MetaPathFinder

_UNET = "ADM's U-Nets are not part of this package: use masked_diffusion.create_model for MDTv2, MDT and DiT"
_CLASSIFIER = f"{_UNET}, and give the sampling loops your own cond_fn"
_FORMATS = "choose the outputs by name: logger.configure(dir, ['stdout', 'log', 'csv', 'json', 'tensorboard'])"
_MPI = "use dist_util.mean_over_ranks, or torch.distributed"
_LAYERS = "use torch.nn"
_LAUNCHER = "the launcher (torchrun or mpiexec) says which GPU and port a process takes"
_FP16 = "training scales the loss by torch.amp.GradScaler: image_train.py --precision fp16"

# A name, below `masked_diffusion`, and the end of the sentence.
NOT_REBUILT = {
    "fp16_util": _FP16,
    "unet": _UNET,
    "losses": "use masked_diffusion.diffusion_utils",
    "timestep_sampler": "use masked_diffusion.resample",
    "diffusion": "use masked_diffusion.create_diffusion, gaussian_diffusion, respace and resample",
    "gaussian_diffusion._WrappedModel": "use GaussianDiffusion.model_timesteps(t)",
    "respace._WrappedModel": "use SpacedDiffusion.model_timesteps(t)",
    "dist_util.SETUP_RETRY_COUNT": _LAUNCHER,
    "dist_util._find_free_port": _LAUNCHER,
    "dist_util.setup_for_distributed": "use logger.log, which prints on rank 0 only",
    "logger.KVWriter": _FORMATS,
    "logger.SeqWriter": _FORMATS,
    "logger.HumanOutputFormat": _FORMATS,
    "logger.JSONOutputFormat": _FORMATS,
    "logger.CSVOutputFormat": "use logger.CSVTable",
    "logger.TensorBoardOutputFormat": _FORMATS,
    "logger.make_output_format": _FORMATS,
    "logger.set_comm": _MPI,
    "logger.mpi_weighted_mean": _MPI,
    "logger._configure_default_logger": "lines are printed before logger.configure, too",
    "nn.SiLU": "use torch.nn.SiLU",
    "nn.GroupNorm32": _LAYERS,
    "nn.conv_nd": _LAYERS,
    "nn.linear": _LAYERS,
    "nn.avg_pool_nd": _LAYERS,
    "nn.zero_module": "use torch.nn.init.zeros_",
    "nn.scale_module": _LAYERS,
    "nn.normalization": _LAYERS,
    "nn.checkpoint": "use torch.utils.checkpoint, or image_train.py --grad_checkpoint True",
    "nn.CheckpointFunction": "use torch.utils.checkpoint",
    "script_util.create_model": _UNET,
    "script_util.create_model_and_diffusion": f"{_UNET}, and masked_diffusion.create_diffusion",
    "script_util.classifier_defaults": _CLASSIFIER,
    "script_util.classifier_and_diffusion_defaults": _CLASSIFIER,
    "script_util.create_classifier": _CLASSIFIER,
    "script_util.create_classifier_and_diffusion": _CLASSIFIER,
    "script_util.sr_model_and_diffusion_defaults": _UNET,
    "script_util.sr_create_model_and_diffusion": _UNET,
    "script_util.sr_create_model": _UNET,
    "train_util.INITIAL_LOG_LOSS_SCALE": _FP16,
}


def module_getattr(module_name):
    """A module's `__getattr__` that knows the table.

    What is in the table raises ImportError: of an AttributeError, `from module import name` would hide the message.
    """

    def getattr_(name):
        _refuse(f"{module_name}.{name}")
        raise AttributeError(f"module {module_name!r} has no attribute {name!r}")

    return getattr_


def _refuse(full_name):
    instead = NOT_REBUILT.get(full_name.removeprefix("masked_diffusion."))
    if instead and full_name.startswith("masked_diffusion."):
        raise ImportError(f"{full_name} is not rebuilt here: {instead}", name=full_name)


class _ModuleFinder(MetaPathFinder):
    """The table's word on `import masked_diffusion.NAME`; asked last, for modules that nobody else finds."""

    def find_spec(self, fullname, path, target=None):
        _refuse(fullname)


def install():
    """Let imports of whole modules know the table. Calling it again changes nothing."""
    if not any(isinstance(finder, _ModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(_ModuleFinder())
