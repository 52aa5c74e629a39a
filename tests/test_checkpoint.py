"""Whole files or none, and the newest of them."""

import pytest

from masked_diffusion import create_model, load_model
from masked_diffusion.utils.files import atomic_write
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
        with pytest.raises(ValueError, match="names no step"):
            parse_step(name)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="full"), atomic_write(path) as file:
        file.write(b"half of the new")
        raise OSError("disk full")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
