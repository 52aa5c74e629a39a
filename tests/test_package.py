"""What a stranger meets first: import time, the wheel, the direction of imports, the README's commands."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from functools import cache

import pytest
from conftest import REPO

README = "\n".join((REPO / folder / "README.md").read_text() for folder in (".", "datasets", "evaluations"))


def python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_import_is_quick_and_loads_nothing_heavy():
    loaded = python(
        "import sys, masked_diffusion, masked_diffusion.respace\n"
        "print([m for m in ('tensorflow', 'mpi4py', 'diffusers', 'timm') if m in sys.modules])"
    )
    assert loaded == "[]"
    measure = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    torch_seconds = min(float(python(measure.format("torch"))) for _ in range(2))
    package_seconds = min(float(python(measure.format("torch, masked_diffusion"))) for _ in range(2))
    assert package_seconds < torch_seconds + 0.5


def test_heavy_packages_wait_until_they_are_needed():
    loaded = python(
        "import sys, masked_diffusion.script_util, masked_diffusion.train_util, masked_diffusion.sampling\n"
        "import masked_diffusion.autoencoder, masked_diffusion.image_datasets, masked_diffusion.objective\n"
        "print([m for m in ('tensorflow', 'mpi4py', 'diffusers') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_tensorboard_does_not_bring_tensorflow(tmp_path):
    code = "import sys\nfrom masked_diffusion.logger import Logger\n"
    code += f"Logger({str(tmp_path)!r}).board.add_scalar('a', 1, 1)\nprint('tensorflow' in sys.modules)"
    assert python(code) == "False" and list(tmp_path.glob("events*"))


def test_the_names_that_users_import():
    import masked_diffusion
    from masked_diffusion.models import MDT_XL_2, DiT_XL_2, MDTv2_S_2, MDTv2_XL_2  # noqa: F401

    assert masked_diffusion.create_diffusion("250").num_timesteps == 250
    with pytest.raises(AttributeError, match="nothing"):
        _ = masked_diffusion.nothing


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(REPO / "masked_diffusion", source / "masked_diffusion")
    for folder in ("scripts", "evaluations", "datasets"):
        shutil.copytree(REPO / folder, source / folder)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"masked_diffusion"}
    modules = {path.name for path in (REPO / "masked_diffusion").glob("*.py")}
    assert {name.split("/")[1] for name in names if name.startswith("masked_diffusion/")} == modules
    assert any(name.endswith("LICENSE") for name in names)


# ---------------------------------------------------------------- the direction of imports

TIERS = [
    {
        "attention",
        "diffusion_utils",
        "dist_util",
        "embeddings",
        "flops",
        "guardian",
        "guidance",
        "labels",
        "model_card",
        "models",
        "precision",
        "random_util",
    },
    {"gaussian_diffusion", "resample", "autoencoder", "image_datasets", "optim", "logger"},
    {
        "respace",
        "checkpoint",
        "sampling",
        "objective",
        "parallel",
        "preflight",
        "finetune",
        "latent_cache",
        "pictures",
        "posthoc_ema",
        "pretrained",
        "solvers",
    },
    {"train_util", "script_util"},
    {"editing", "pipeline", "sample_util"},
    {"web_requests"},
]


def package_imports(path):
    """Names of the package's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("masked_diffusion")):
            module = (node.module or "").removeprefix("masked_diffusion").strip(".")
            found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
    return found


def test_imports_run_one_way():
    tier = {name: i for i, names in enumerate(TIERS) for name in names}
    modules = {path.stem: package_imports(path) for path in (REPO / "masked_diffusion").glob("*.py")}
    modules.pop("__init__")
    assert modules.keys() <= tier.keys()
    wrong = [f"{name} -> {used}" for name, uses in modules.items() for used in uses if tier[used] > tier[name]]
    assert wrong == []
    assert "models" not in modules["train_util"]


def test_no_circles():
    modules = {path.stem: package_imports(path) for path in (REPO / "masked_diffusion").glob("*.py")}
    modules.pop("__init__")
    while modules:
        leaves = {name for name, uses in modules.items() if not uses & modules.keys()}
        assert leaves, f"a circle among {sorted(modules)}"
        modules = {name: uses for name, uses in modules.items() if name not in leaves}


def test_evaluations_stand_alone():
    for path in (REPO / "evaluations").glob("*.py"):
        assert package_imports(path) == set(), path


def test_modules_stay_readable():
    lengths = {path.name: len(path.read_text().splitlines()) for path in REPO.glob("*/*.py")}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


# ---------------------------------------------------------------- the README


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@cache
def script_flags(script):
    """The flags that a script's --help lists."""
    result = subprocess.run(
        [sys.executable, REPO / script, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert result.returncode == 0, result.stderr
    return set(re.findall(r"(--[\w-]+)", result.stdout))


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_real(command):
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPO / "Makefile").read_text(), re.MULTILINE)
        return
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None:
        assert words[0] in ("pip", "git", "export", "cd"), command
        return
    flags = {word.split("=")[0] for word in words[words.index(script) :] if word.startswith("--")}
    assert flags - script_flags(script) == set()
