"""Loads modules of the repository's `evaluations/` folder, which is not part of the installed package."""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from masked_diffusion.utils.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "evaluations"


def load_evaluations(module: str) -> ModuleType:
    """Import a module of `evaluations/`, such as `metrics`, as `evaluations.metrics`.

    `sys.path` is neither searched nor changed, so that an installed package of the same name is never loaded instead.

    :param module: name of the module, without folder and suffix.
    :raises UserError: when the folder does not exist, because the package was installed without the repository.
    """
    if not (FOLDER / f"{module}.py").is_file():
        raise UserError(
            f"{FOLDER / module}.py does not exist: evaluation needs the evaluations/ folder of the repository, "
            "so clone it and install the package from there with `pip install -e .`"
        )
    start = FOLDER / "__init__.py"
    if Path(getattr(sys.modules.get("evaluations"), "__file__", None) or "").resolve() != start:
        spec = spec_from_file_location("evaluations", start, submodule_search_locations=[str(FOLDER)])
        sys.modules["evaluations"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["evaluations"])
    return import_module(f"evaluations.{module}")
