"""Models from files, folders and the hub: architecture from state dicts, hostile and broken files."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from fill import fill, tensor
from helpers import DATA
from safetensors.torch import save_file

from masked_diffusion import create_model, load_model
from masked_diffusion.models import DiT, MDTv2
from masked_diffusion.weights.pretrained import find_architecture

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


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.endswith("_S_2")])
def test_released_files_load_strictly(name, tmp_path, capsys):
    state = {
        key: torch.full(shape, 0.5, dtype=getattr(torch, kind[6:])) for key, (shape, kind) in LAYOUTS[name].items()
    }
    torch.save(state, tmp_path / "weights.pt")
    model = load_model(tmp_path / "weights.pt")
    assert type(model).__name__ == name.split("_")[0] and (model.depth, model.hidden_size) == (12, 384)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert "1000 classes, input 4x32x32" in capsys.readouterr().out


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


# ---------------------------------------------------------------- safetensors, exported folders, the hub


SMALL = {"input_size": 8, "in_channels": 3, "num_classes": 10}


def test_safetensors_hold_the_same_model(tmp_path):
    model = fill(create_model("MDTv2_Nano_2", **SMALL)).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_model(tmp_path / "weights.safetensors")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    whole = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:20000])
    with pytest.raises(ValueError, match=r"cut\.safetensors cannot be read as safetensors"):
        load_model(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    "family, name, options",
    [
        (MDTv2, "MDTv2_Nano_2", SMALL | {"mask_ratio": 0.3}),
        (DiT, "DiT_Nano_2", {"depth": 3, "num_heads": 2}),
        (MDTv2, "MDTv2_Nano_4", SMALL | {"class_dropout_prob": 0.0, "mlp_ratio": 2.0}),
    ],
)
def test_an_exported_folder_is_read_by_the_hub_and_by_us(family, name, options, tmp_path):
    model = fill(create_model(name, **options)).eval()
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    card = (tmp_path / "README.md").read_text()
    assert "2303.14389" in card and "load_model" in card
    for loaded in (family.from_pretrained(tmp_path), load_model(tmp_path), load_model(tmp_path / "model.safetensors")):
        assert type(loaded) is family and (loaded.depth, loaded.num_heads) == (model.depth, model.num_heads)
        assert loaded.mask_ratio == model.mask_ratio
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def load_offline(source, cache):
    code = f"from masked_diffusion import load_model; load_model({source!r})"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_a_hub_id_is_found_in_the_cache_or_refused_in_a_sentence(tmp_path):
    repository, commit = tmp_path / "hub" / "models--shgao--MDT-XL2", "0" * 40
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for version, name in (("v1", "MDT_Nano_2"), ("v2", "MDTv2_Nano_2")):
        weights = repository / "snapshots" / commit / f"mdt_xl2_{version}_ckpt.pt"
        torch.save(create_model(name, **SMALL).state_dict(), weights)
    assert "MDTv2 of 4 blocks, 2 of them decoder blocks" in load_offline("shgao/MDT-XL2", tmp_path).stdout
    assert "MDT of 4 blocks" in load_offline("shgao/MDT-XL2/mdt_xl2_v1_ckpt.pt", tmp_path).stdout
    refused = load_offline("shgao/absent", tmp_path).stderr.strip().splitlines()[-1]
    assert refused.startswith("ValueError: shgao/absent is neither a local path nor in reach on the hub")
    assert "mdt_xl2_v2_ckpt.pt" in refused


def test_what_was_found_is_said(tmp_path, capsys):
    torch.save(create_model("MDTv2_Nano_2", **SMALL).state_dict(), tmp_path / "weights.pt")
    load_model(tmp_path / "weights.pt")
    assert (
        "weights.pt: MDTv2 of 4 blocks, 2 of them decoder blocks, width 128, patch 2, 10 classes, input 3x8x8"
        in capsys.readouterr().out
    )


# ---------------------------------------------------------------- bad files


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
