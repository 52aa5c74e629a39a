"""Run a script of this folder as a module of the package `evaluations`.

A script belongs to no package, so its imports of the files beside it would be top-level names, as `metrics` or `files`,
which other installed packages have too. This works wherever the folder lies and whatever it is called.
"""

import os
import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def run_script(path):
    """Run the file `path` of this folder anew, as `evaluations.NAME` and as the main module."""
    folder = Path(__file__).resolve().parent
    # Python put the folder on the path, where another package's `import metrics` would find ours.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]
    spec = spec_from_file_location("evaluations", folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules["evaluations"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["evaluations"])
    try:
        runpy.run_module(f"evaluations.{Path(path).stem}", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # while the libraries are still being imported; `console` takes care of what follows
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        sys.exit(130)
