"""Whole files or none, architecture from state dicts, hostile and broken files."""

import json
import pickle

import pytest
import torch
from conftest import DATA
from fill import fill, tensor

from masked_diffusion import create_model, load_model
from masked_diffusion.checkpoint import (
    atomic_write,
    find_architecture,
    latest_step,
    newest_ema,
    parse_step,
    save_checkpoint,
)

LAYOUTS = json.loads((DATA / "state_dicts.json").read_text())


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "/" not in name])
def test_every_released_layout_is_recognised(name):
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in LAYOUTS[name].items()}
    found, options = find_architecture(state)
    assert found == name
    with torch.device("meta"):
        model = create_model(found, **options)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == {
        key: shape for key, (shape, _) in LAYOUTS[name].items()
    }


@pytest.mark.parametrize(
    "name, options",
    [
        ("MDTv2_Nano_2", {"mask_ratio": 0.3, "input_size": 8, "in_channels": 3, "num_classes": 10}),
        ("MDTv2_Nano_4", {"hidden_size": 64, "num_heads": 2, "depth": 6, "decode_layer": 4, "input_size": 16}),
        ("MDT_Nano_2", {"input_size": 8, "learn_sigma": False}),
        ("DiT_Nano_8", {"input_size": 16, "num_classes": 0}),
    ],
)
def test_a_file_becomes_the_model_that_it_holds(name, options, tmp_path):
    model = fill(create_model(name, **options)).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt")
    x, t = tensor("x", (1, model.in_channels, model.input_size, model.input_size)), torch.tensor([5])
    assert torch.equal(loaded(x, t), model(x, t))
    assert not loaded.training and type(loaded) is type(model)


@pytest.mark.parametrize(
    "wrap", [lambda s: {"ema": s, "model": {}}, lambda s: {"module." + k: v for k, v in s.items()}]
)
def test_checkpoints_of_other_codes_are_unwrapped(wrap, tmp_path):
    model = fill(create_model("DiT_Nano_2", input_size=8))
    torch.save(wrap(model.state_dict()), tmp_path / "0001000.pt")
    assert torch.equal(load_model(tmp_path / "0001000.pt").pos_embed, model.pos_embed)


def test_v1_takes_its_decode_layer_from_the_caller(tmp_path):
    torch.save(create_model("MDT_Nano_2", input_size=8, decode_layer=1).state_dict(), tmp_path / "v1.pt")
    assert load_model(tmp_path / "v1.pt").decode_layer == 2
    assert load_model(tmp_path / "v1.pt", decode_layer=1).decode_layer == 1


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


class Hostile:
    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_file_is_never_run(tmp_path):
    Hostile.path = tmp_path / "pwned"
    with open(tmp_path / "bad.pt", "wb") as file:
        pickle.dump(Hostile(), file, protocol=2)
    with pytest.raises(ValueError, match=r"bad\.pt cannot be read as a checkpoint"):
        load_model(tmp_path / "bad.pt")
    assert not (tmp_path / "pwned").exists()


def test_broken_and_foreign_files(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save(create_model("DiT_Nano_2", input_size=8).state_dict(), whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.pt cannot be read"):
        load_model(tmp_path / "cut.pt")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"no state dict of DiT, MDT or MDTv2 \(it begins with \['conv\.weight'\]\)"):
        load_model(tmp_path / "foreign.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_model(tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "absent.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_model(tmp_path / "empty")
    torch.save(create_model("DiT_Nano_2", input_size=8, depth=3).state_dict(), tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"a DiT of depth 3 and width 128 has no name"):
        load_model(tmp_path / "odd.pt")
    state = create_model("DiT_Nano_2", input_size=8).state_dict()
    del state["blocks.1.mlp.fc1.weight"]
    torch.save(state, tmp_path / "lacking.pt")
    with pytest.raises(ValueError, match=r"lacking\.pt does not fit.*fc1"):
        load_model(tmp_path / "lacking.pt")
