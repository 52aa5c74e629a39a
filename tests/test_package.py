"""What a stranger meets first: import time, the wheel, the direction of imports, the README's commands."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, REPO

import masked_diffusion
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.evaluations import load_evaluations

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").glob("*.md")]
PAGES += [REPO / folder / "README.md" for folder in ("datasets", "evaluations", "benchmarks")]
TOOLS = ("pip", "git", "export", "cd", "docker", "tensorboard", "source", "python3")  # what needs no look at our files


def python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_import_is_quick_and_loads_nothing_heavy():
    loaded = python(
        "import sys, masked_diffusion, masked_diffusion.respace\n"
        "print([m for m in ('tensorflow', 'mpi4py', 'diffusers', 'timm') if m in sys.modules])"
    )
    assert loaded == "[]"
    measure = (
        "import time, torch; start = time.process_time(); import masked_diffusion; print(time.process_time() - start)"
    )
    assert min(float(python(measure)) for _ in range(2)) < 0.5


def test_heavy_packages_wait_until_they_are_needed():
    loaded = python(
        "import sys, masked_diffusion.script_util, masked_diffusion.train_util\n"
        "import masked_diffusion.sampling.build, masked_diffusion.latents.cache, masked_diffusion.training.objective\n"
        "masked_diffusion.create_model('DiT_Nano_2', input_size=4)\n"
        "heavy = 'tensorflow', 'mpi4py', 'diffusers', 'timm', 'torchvision', 'torch._dynamo'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert loaded == "[]"


def test_tensorboard_does_not_bring_tensorflow(tmp_path):
    code = "import sys\nfrom masked_diffusion.logger import Logger\n"
    code += f"Logger({str(tmp_path)!r}).trackers[0].row({{'a': 1}}, 1)\nprint('tensorflow' in sys.modules)"
    assert python(code) == "False" and list(tmp_path.glob("events*"))


def test_the_names_that_users_import():
    from masked_diffusion.models import MDT_XL_2, DiT_XL_2, MDTv2_S_2, MDTv2_XL_2  # noqa: F401

    assert masked_diffusion.create_diffusion("250").num_timesteps == 250
    with pytest.raises(AttributeError, match="nothing"):
        _ = masked_diffusion.nothing


def test_modules_are_found_as_attributes():
    loaded = python(
        "import sys, masked_diffusion as md\n"
        "assert not any(name in sys.modules for name in ('torch', 'masked_diffusion.respace'))\n"
        "print(md.gaussian_diffusion.ModelMeanType.EPSILON.name, len(md.respace.space_timesteps(1000, 'ddim50')),\n"
        "      *(getattr(md, name).__name__ for name in md._MODULES))"
    ).split()
    names = masked_diffusion._MODULES
    assert loaded == ["EPSILON", "50", *(f"masked_diffusion.{name}" for name in names)]
    published = json.loads((DATA / "published_signatures.json").read_text())["MDT masked_diffusion"]
    assert {file.removesuffix(".py") for file in published} - {"__init__"} <= set(names)


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
    files = {str(path.relative_to(REPO)) for path in (REPO / "masked_diffusion").rglob("*.py")}
    assert {name for name in names if name.startswith("masked_diffusion/")} == files
    assert any(name.endswith("LICENSE") for name in names)


# ---------------------------------------------------------------- the direction of imports

# From the ground up. What is called `utils` here is every module of that room.
# fmt: off
FLOORS = [
    {
        "config", "diffusion_config", "diffusion_utils", "dist_util", "flow_matching", "forward_process", "guidance",
        "layers", "logger", "presets", "published", "reverse_process", "sample_config", "utils",
    },
    {"gaussian_diffusion", "image_datasets", "images", "models", "resample"},
    {"respace", "weights"},
    {"latents", "training"},
    {"nn", "script_util", "train_util"},
    {"sampling"},
    {"pipeline"},
]
# fmt: on


@cache
def modules():
    """Every module of the package, `models` or `training.optim`, with its file."""
    package = REPO / "masked_diffusion"
    files = {path.relative_to(package).with_suffix(""): path for path in package.rglob("*.py")}
    return {".".join(name.parts): path for name, path in files.items() if name.name != "__init__"}


def package_imports(path, name=""):
    """Modules of the package that a file imports, anywhere in it.

    :param name: of the module that the file is, where it is one: relative imports are read from there.
    """
    found, known = set(), modules()
    rooms = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            parts = [alias.name for alias in node.names if alias.name.split(".")[0] == "masked_diffusion"]
        elif isinstance(node, ast.ImportFrom):
            base = ["masked_diffusion", *rooms][: len(rooms) + 2 - node.level] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            parts = [f"{base}.{alias.name}" for alias in node.names if base.split(".")[0] == "masked_diffusion"]
        else:
            continue
        for part in (part.removeprefix("masked_diffusion").strip(".") for part in parts):
            found.add(next((start for start in (part, part.rpartition(".")[0]) if start in known), part.split(".")[0]))
    return found


def test_imports_are_seen_in_every_form(tmp_path):
    source = tmp_path / "source.py"
    source.write_text(
        "import masked_diffusion.models as m\nfrom masked_diffusion import logger\nfrom masked_diffusion.layers import "
        "attention\nfrom ..guidance import guide\nfrom . import optim\nfrom .ema import update\nimport torch\n"
    )
    expected = {"models", "logger", "layers.attention", "guidance", "training.optim", "training.ema"}
    assert package_imports(source, "training.source") == expected


def test_imports_run_down_only():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    uses = {name: package_imports(path, name) for name, path in modules().items()}
    assert {name.split(".")[0] for name in uses} <= floor.keys()
    wrong = [
        f"{name} -> {used}"
        for name, imported in uses.items()
        for used in imported
        if floor[used.split(".")[0]] > floor[name.split(".")[0]]
    ]
    assert wrong == []
    assert "models" not in uses["train_util"]


def test_no_circles():
    uses = {name: package_imports(path, name) for name, path in modules().items()}
    while uses:
        leaves = {name for name, imported in uses.items() if not imported & uses.keys()}
        assert leaves, f"a circle among {sorted(uses)}"
        uses = {name: imported for name, imported in uses.items() if name not in leaves}


def test_evaluations_import_nothing_of_the_package_and_one_another_as_siblings():
    paths = list((REPO / "evaluations").glob("*.py"))
    siblings = {path.stem for path in paths} - {"as_package"}  # which is what makes a script part of the package
    assert "metrics" in siblings
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"masked_diffusion", "evaluations", *siblings}, path


@pytest.fixture
def other_packages(tmp_path):
    """A folder of installed modules with names that modules of evaluations/ have, and that of the folder."""
    folder = tmp_path / "installed"
    folder.mkdir()
    for name in ("metrics", "files", "ranks", "features", "console", "suite", "evaluations"):
        (folder / f"{name}.py").write_text(f"raise RuntimeError('an installed {name} was imported')\n")
    return folder


def test_evaluations_run_anywhere_whatever_else_is_installed(other_packages, tmp_path):
    shutil.copytree(REPO / "evaluations", tmp_path / "my-suite")
    command = [sys.executable, tmp_path / "my-suite" / "compare.py", tmp_path / "nothing.json"]
    env = {**os.environ, "PYTHONPATH": str(other_packages)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "nothing.json cannot be read" in result.stderr


def test_evaluations_are_loaded_from_the_repository_alone(other_packages, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(other_packages), *sys.path])
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluations"]:
        monkeypatch.delitem(sys.modules, name)
    before = list(sys.path)
    live = load_evaluations("live")
    assert Path(live.__file__) == REPO / "evaluations" / "live.py" and live.__name__ == "evaluations.live"
    assert load_evaluations("metrics").frechet_distance is live.frechet_distance
    assert sys.path == before and "metrics" not in sys.modules


def test_without_the_repository_evaluation_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("masked_diffusion.utils.evaluations.FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"live\.py does not exist: evaluation needs the evaluations/ folder"):
        load_evaluations("live")


def test_tests_share_their_helpers_in_one_place():
    for path in (REPO / "tests").glob("*.py"):
        assert not re.search(r"^ *(from|import) (test_|conftest)", path.read_text(), re.MULTILINE), path


def test_modules_stay_readable():
    lengths = {
        path.name: len(path.read_text().splitlines()) for path in REPO.rglob("*.py") if ".venv" not in path.parts
    }
    assert {name: length for name, length in lengths.items() if length > 500} == {}


# ---------------------------------------------------------------- the README and the pages


def documented_commands():
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return sorted({line for line in lines if line.strip() and not line.startswith("#")})


def words_of(command):
    """The words of a command without its settings of the environment."""
    return [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]


def script_of(words):
    return next((word for word in words if word.endswith((".py", ".sh"))), None)


@cache
def script_flags():
    """The flags that --help lists, of every documented script."""
    named = {script_of(words_of(command)) for command in documented_commands()} | {"scripts/image_train.py"}
    scripts = sorted(script for script in named if script and script.endswith(".py"))
    result = subprocess.run(
        [sys.executable, REPO / "tests" / "help_texts.py", *(REPO / script for script in scripts)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert result.returncode == 0, result.stderr
    texts = json.loads(result.stdout)
    return {script: set(re.findall(r"(--[\w-]+)", texts[str(REPO / script)])) for script in scripts}


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_real(command):
    words = words_of(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPO / "Makefile").read_text(), re.MULTILINE)
        return
    script = script_of(words)
    if script is None:
        assert words[0] in TOOLS, command
        return
    if script.endswith(".sh"):  # which hands its flags to training
        assert os.access(REPO / script, os.X_OK), command
    flags = {word.split("=")[0] for word in words[words.index(script) :] if word.startswith("--")}
    assert flags - script_flags()["scripts/image_train.py" if script.endswith(".sh") else script] == set()


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{page}: {target}"


def test_the_readme_is_short_and_its_python_draws(checkpoint, tmp_path, monkeypatch):
    readme = (REPO / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    code = re.search(r"In Python:\n\n```python\n(.*?)```", readme, re.DOTALL)[1]
    for published, small in (("mdt_xl2_v2_ckpt.pt", str(checkpoint)), ("[207, 279]", "[2, 0]"), ("bf16", "fp32")):
        assert published in code
        code = code.replace(published, small)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["images"].shape == (2, 8, 8, 3) and names["images"].dtype == np.uint8
    assert (tmp_path / "dogs.png").exists()
