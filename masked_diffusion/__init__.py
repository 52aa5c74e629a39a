"""Masked Diffusion Transformers: training and sampling of MDTv2, MDT and DiT.

The three names below are loaded on first use, so that importing the package stays fast.
"""

from importlib import import_module

_HOMES = {"create_model": ".models", "create_diffusion": ".respace", "load_model": ".weights.pretrained"}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
