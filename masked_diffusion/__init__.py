"""Masked Diffusion Transformers: training and sampling of MDTv2, MDT and DiT.

The names and modules below are loaded on first use, so that importing the package stays fast.
"""

from importlib import import_module

from .utils import not_rebuilt

__version__ = "0.1.0"

_HOMES = {
    "create_model": ".models",
    "create_diffusion": ".respace",
    "load_model": ".weights.pretrained",
    "diffusion_defaults": ".published",
    "model_and_diffusion_defaults": ".published",
}
_MODULES = (  # which `masked_diffusion.NAME` finds without an import of its own, as in ADM, DiT and MDT
    "diffusion_utils", "dist_util", "gaussian_diffusion", "image_datasets", "logger", "models", "nn", "resample",
    "respace", "script_util", "train_util",
)  # fmt: skip
__all__ = list(_HOMES)
not_rebuilt.install()
_no_name = not_rebuilt.module_getattr(__name__)


def __getattr__(name):
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    return getattr(import_module(_HOMES[name], __name__), name) if name in _HOMES else _no_name(name)
