"""Whole files or none, and the newest of them."""

import errno
import os

import pytest
import torch

from masked_diffusion import create_model, load_model
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import atomic_write
from masked_diffusion.weights import checkpoint
from masked_diffusion.weights.checkpoint import latest_step, newest_ema, parse_step, save_checkpoint


def test_a_folder_gives_its_newest_slowest_ema(tmp_path):
    model = create_model("DiT_Nano_2", input_size=8)
    for step in (5, 12):
        save_checkpoint(tmp_path, step, model.state_dict(), {"0.9": {}, "0.999": model.state_dict()}, {"step": step})
    assert latest_step(tmp_path) == 12
    assert newest_ema(tmp_path).name == "ema_0.999_000012.pt"
    assert load_model(tmp_path).depth == 4
    (tmp_path / "model000012.pt").unlink()
    assert latest_step(tmp_path) == 5


def test_steps_are_read_off_names_or_refused():
    assert parse_step("log/model000123.pt") == 123
    assert parse_step("ema_0.9999_1000000.pt") == 1000000
    for name in ("mdt_xl2_v2_ckpt.pt", "model12.pt", "model000001.pt.partial"):
        with pytest.raises(ValueError, match="has no step in its name"):
            parse_step(name)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="full"), atomic_write(path) as file:
        file.write(b"half of the new")
        raise OSError("disk full")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def save(folder, step, value):
    weights = {"w": torch.full((3,), value)}
    save_checkpoint(folder, step, weights, {"0.9": weights, "0.99": weights}, {"step": step, "value": value})


def values(folder, step):
    """What each file of a checkpoint holds."""
    names = (f"model{step:06d}.pt", f"ema_0.9_{step:06d}.pt", f"ema_0.99_{step:06d}.pt")
    held = [torch.load(folder / name)["w"][0].item() for name in names]
    return [*held, torch.load(folder / f"opt{step:06d}.pt")["value"]]


@pytest.mark.parametrize("file", ["model", "ema_0.9_", "ema_0.99_", "opt"])
@pytest.mark.parametrize("call", ["save_tensors", "fsync"])
def test_a_full_disk_gets_its_space_back(file, call, tmp_path, monkeypatch):
    save(tmp_path, 4, 1.0)
    owner = checkpoint if call == "save_tensors" else os
    whole = getattr(owner, call)

    def full(*arguments):
        target = arguments[-1]
        name = os.readlink(f"/proc/self/fd/{target}") if call == "fsync" else target.name
        if f".{file}" in str(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(*arguments)

    monkeypatch.setattr(owner, call, full)
    for step in (4, 8):  # over a checkpoint that is there, and beside it
        with pytest.raises(
            UserError, match=rf"{file}.* could not be written \(No space left.*the last checkpoint is intact"
        ):
            save(tmp_path, step, 2.0)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {
        "model000004.pt", "ema_0.9_000004.pt", "ema_0.99_000004.pt", "opt000004.pt",
    }  # fmt: skip
    assert values(tmp_path, 4) == [1.0] * 4


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("renamed", [0, 1, 2, 3])
def test_a_checkpoint_is_complete_when_all_its_files_are_there(renamed, old, tmp_path, monkeypatch):
    if old:
        save(tmp_path, 8, 1.0)
    replace, count = os.replace, iter(range(9))

    class Killed(BaseException):
        pass

    def killed_after_some(source, target):
        if next(count) == renamed:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_after_some)
    with pytest.raises(Killed):
        save(tmp_path, 8, 2.0)
    assert latest_step(tmp_path) is None
    monkeypatch.undo()
    save(tmp_path, 8, 3.0)
    assert values(tmp_path, 8) == [3.0] * 4


def test_files_of_another_program_are_no_emas(tmp_path):
    save(tmp_path, 3, 1.0)
    for name in ("ema_best_000009.pt", "ema_0.9_latest.pt", "ema_0.9.pt"):
        (tmp_path / name).write_bytes(b"")
    assert newest_ema(tmp_path).name == "ema_0.99_000003.pt"
    (tmp_path / "ema_0.5_000004.pt").write_bytes(b"")
    assert newest_ema(tmp_path).name == "ema_0.5_000004.pt"
