"""Experiment trackers: the same rows, images and configuration in each; missing packages; runs that resume."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import run_train, train_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from masked_diffusion import logger
from masked_diffusion.config import RunConfig
from masked_diffusion.script_util import parse_flags
from masked_diffusion.utils import trackers
from masked_diffusion.utils.errors import UserError

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


class Calls:
    """What a package was called with: the name of the function, its values and its options."""

    def __init__(self):
        self.seen = []

    def __getattr__(self, name):
        return lambda *args, **options: self.seen.append((name, *args, options))

    def of(self, name):
        return [call[1:] for call in self.seen if call[0] == name]


class Refused(Exception):
    pass


@pytest.fixture
def packages(monkeypatch):
    """wandb and trackio that write down what they are called with."""
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    wandb, trackio = Calls(), Calls()

    def init(**options):
        wandb.seen.append(("init", options))
        if options["project"] == "secret":
            raise Refused("api_key not configured")
        return wandb

    wandb.init, wandb.errors, wandb.Image = init, SimpleNamespace(Error=Refused), lambda pixels: ("image", pixels.sum())
    trackio.Image = wandb.Image
    for name, module in (("wandb", wandb), ("trackio", trackio)):
        monkeypatch.setitem(sys.modules, name, module)
    return wandb, trackio


def use(folder, step, names=("tensorboard", "wandb", "trackio")):
    own = logger.Logger(str(folder), loggers=names)
    own.rewind(step)
    own.log_config({"lr": 0.5, "model": "DiT_S_2", "betas": (1, 2)})
    own.logkv("step", step + 1)
    own.logkv("loss", 2.5)
    own.logkv("note", "words are for the files only")
    own.dumpkvs()
    own.image("samples", PIXELS, step + 1)
    own.close()


def test_all_trackers_get_the_same(tmp_path, packages):
    wandb, trackio = packages
    folder = tmp_path / "run7"
    use(folder, 0)
    key, row, config = json.loads((folder / trackers.ID_NAME).read_text())["id"], {"step": 1, "loss": 2.5}, {"lr": 0.5}
    config |= {"model": "DiT_S_2", "betas": [1, 2]}
    options = {"project": "masked-diffusion", "name": "run7", "config": config, "resume": "allow"}
    assert wandb.seen == [
        ("init", options | {"id": key, "dir": str(folder)}),
        ("define_metric", "*", {"step_metric": "step"}),
        ("log", row, {}),
        ("log", {"images/samples": ("image", PIXELS.sum()), "step": 1}, {}),
        ("finish", {}),
    ]
    assert trackio.seen == [
        ("init", options | {"name": f"run7-{key}"}),
        ("log", {"loss": 2.5}, {"step": 1}),
        ("log", {"images/samples": ("image", PIXELS.sum())}, {"step": 1}),
        ("finish", {}),
    ]
    board = EventAccumulator(str(folder)).Reload()
    assert board.Scalars("loss")[0].value == 2.5 and board.Images("samples")[0].step == 1
    assert set(board.Tags()["scalars"]) == row.keys()
    text = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| lr | 0.5 |" in text and "| model | DiT_S_2 |" in text


def test_a_resumed_run_goes_on_in_the_same_one_and_a_new_one_does_not(tmp_path, packages):
    wandb, trackio = packages
    for step in (0, 20, 30, 0):
        use(tmp_path, step, ["wandb", "trackio"])
    ids = [call[0]["id"] for call in wandb.of("init")]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    names = [call[0]["name"] for call in trackio.of("init")]
    assert names[0] == names[1] == names[2] != names[3]
    (tmp_path / trackers.ID_NAME).write_text("[]")
    with pytest.raises(UserError, match=r"tracker_run\.json does not hold the name of a run"):
        use(tmp_path, 30, ["wandb"])


def test_the_environment_names_the_project_and_a_refusal_is_a_sentence(tmp_path, packages, monkeypatch):
    wandb, trackio = packages
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    use(tmp_path, 0, ["trackio"])
    assert trackio.of("init")[0][0]["project"] == "mine" and wandb.seen == [] and not list(tmp_path.glob("events*"))
    monkeypatch.setenv("WANDB_PROJECT", "secret")
    with pytest.raises(UserError, match=r"wandb did not start \(api_key not configured\); log in with .*MODE=offline"):
        use(tmp_path, 0, ["wandb"])


def test_a_missing_package_is_a_sentence_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "trackio").mkdir()  # such as the folder that a tracker leaves behind
    with pytest.raises(
        UserError, match=r"--loggers trackio needs the package trackio, .*: pip install trackio, or leave"
    ):
        logger.configure(str(tmp_path / "log"), loggers=["trackio"], quiet=True)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("text", ["wandb,wandb", "mlflow", "tensorboard,,wandb"])
def test_other_names_are_a_sentence(text):
    with pytest.raises(UserError, match=f"--loggers is {text}: it must be some of tensorboard, wandb, trackio"):
        parse_flags(RunConfig, "", ["--loggers", text])


def test_training_logs_to_all(images, tmp_path, packages, monkeypatch):
    flags = {"loggers": "wandb, trackio", "num_workers": 0, "sample_interval": 2, "max_steps": 2, "diffusion_steps": 25}
    run_train(monkeypatch, train_flags(images, tmp_path, **flags))
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if not isinstance(value, str)} for row in rows]
    wandb, trackio = packages
    for package in packages:
        (options,) = package.of("init")[0]
        assert options["config"]["lr"] == 1e-3 and options["config"]["architecture"]["name"] == "MDTv2_Nano_2"
        assert package.seen[-1][0] == "finish"
    assert [call[0] for call in wandb.of("log") if "loss" in call[0]] == rows and [row["step"] for row in rows] == [
        1,
        2,
    ]
    assert [call[0] | call[1] for call in trackio.of("log") if "loss" in call[0]] == rows
    assert [call[0]["step"] for call in wandb.of("log") if "images/samples" in call[0]] == [2]
    assert [call[1]["step"] for call in trackio.of("log") if "images/samples" in call[0]] == [2]
    assert not list(tmp_path.glob("events*"))
