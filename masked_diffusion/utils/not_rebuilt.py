"""Published names of ADM, DiT and MDT that this package does not have, and what to use instead.

Importing such a name, or accessing it in its module, raises an ImportError that says what to use instead.
`docs/adm_dit_mdt.md` lists the names for readers.
"""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

_UNET = "ADM's U-Nets are not part of this package: use masked_diffusion.create_model for MDTv2, MDT and DiT"
_CLASSIFIER = f"{_UNET}, and give the sampling loops your own cond_fn"
_FORMATS = "choose the output formats by name: logger.configure(dir, ['stdout', 'log', 'csv', 'json', 'tensorboard'])"
_MPI = "use dist_util.mean_over_ranks, or torch.distributed"
_LAYERS = "use torch.nn"
_LAUNCHER = "the launcher (torchrun or mpiexec) decides which GPU and port a process uses"
_FP16 = "for mixed precision use torch.amp (GradScaler), or image_train.py --precision fp16"

# Name below `masked_diffusion` -> what to use instead, which ends the error message.
NOT_REBUILT = {
    "fp16_util": _FP16,
    "unet": _UNET,
    "losses": "use masked_diffusion.diffusion_utils",
    "timestep_sampler": "use masked_diffusion.resample",
    "diffusion": "use masked_diffusion.create_diffusion, and its modules gaussian_diffusion, respace and resample",
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
    "logger._configure_default_logger": "not needed: lines are printed before logger.configure, too",
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

# For a call: the name is there, but takes other arguments.
PUBLISHED_TRAIN_LOOP = (
    "TrainLoop(model=..., diffusion=..., ...) of ADM and MDT is not rebuilt here: train with scripts/image_train.py, "
    "whose flags are the published ones, or write your own loop of diffusion.training_losses, "
    "create_named_schedule_sampler and nn.update_ema"
)


def module_getattr(module_name: str) -> Callable[[str], Any]:
    """The `__getattr__` function of a module, which says what to use instead of a name in `NOT_REBUILT`.

    It raises ImportError for such a name, since `from module import name` hides the message of an AttributeError.
    """

    def getattr_(name: str) -> Any:
        _refuse(f"{module_name}.{name}")
        raise AttributeError(f"module {module_name!r} has no attribute {name!r}")

    return getattr_


def _refuse(full_name: str) -> None:
    """Raise ImportError if the name is in `NOT_REBUILT`."""
    instead = NOT_REBUILT.get(full_name.removeprefix("masked_diffusion."))
    if instead and full_name.startswith("masked_diffusion."):
        raise ImportError(f"{full_name} is not rebuilt here: {instead}", name=full_name)


class _ModuleFinder(MetaPathFinder):
    """Refuses `import masked_diffusion.NAME` for names in `NOT_REBUILT`; it comes last, after all other finders."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        _refuse(fullname)


def install() -> None:
    """Refuse imports of whole modules in `NOT_REBUILT` too. Calling it again changes nothing."""
    if not any(isinstance(finder, _ModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(_ModuleFinder())
