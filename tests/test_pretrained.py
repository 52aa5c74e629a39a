"""Models from files, folders and the hub: architecture from state dicts, hostile and broken files."""

import argparse
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

from masked_diffusion import create_model, dist_util, load_model
from masked_diffusion.models import MDT, DiT, MDTv2
from masked_diffusion.utils.errors import UserError
from masked_diffusion.weights import pretrained
from masked_diffusion.weights.pretrained import find_architecture, find_weights

SMALL = {"input_size": 8, "in_channels": 3, "num_classes": 10}
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


def as_dits_training(state):
    """The checkpoint of DiT's train.py, with the flags of that script."""
    flags = argparse.Namespace(results_dir="results", epochs=1400, global_batch_size=256)
    raw = {key: value + 1 for key, value in state.items()}
    return {"model": raw, "ema": state, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "args": flags}


@pytest.mark.parametrize(
    "wrap",
    [lambda s: {"ema": s, "model": {}}, lambda s: {"module." + k: v for k, v in s.items()}, as_dits_training],
)
def test_checkpoints_of_other_codes_are_unwrapped(wrap, tmp_path):
    model = fill(create_model("DiT_Nano_2", input_size=8))
    torch.save(wrap(model.state_dict()), tmp_path / "0001000.pt")
    assert torch.equal(load_model(tmp_path / "0001000.pt").pos_embed, model.pos_embed)


def test_v1_takes_its_decode_layer_from_the_caller(tmp_path):
    torch.save(create_model("MDT_Nano_2", input_size=8, decode_layer=1).state_dict(), tmp_path / "v1.pt")
    assert load_model(tmp_path / "v1.pt").decode_layer == 2
    assert load_model(tmp_path / "v1.pt", decode_layer=1).decode_layer == 1


# ---------------------------------------------------------------- memory

PEAK = """
import sys, torch, torch._dynamo  # which the first model on the meta device imports
from masked_diffusion.weights import pretrained
def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak is what there is now
    before = memory("VmRSS")
    model = pretrained.load_model(path)
    print((memory("VmHWM") - before) / sum(value.nbytes for value in model.state_dict().values()))
    del model
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of memory is read from Linux")
def test_weights_are_in_memory_once(tmp_path):
    state = create_model("MDTv2_S_2").state_dict()
    torch.save(state, tmp_path / "weights.pt")
    save_file(state, tmp_path / "weights.safetensors")
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "half.pt")
    paths = [str(tmp_path / name) for name in ("weights.pt", "weights.safetensors", "half.pt")]
    run = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, check=True)
    peaks = [float(line) for line in run.stdout.splitlines() if "MDTv2" not in line]
    assert len(peaks) == 3 and max(peaks) < 1.3, peaks


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_loaded_model_does_not_change_with_its_file(name, tmp_path):
    model, path = fill(create_model("MDTv2_Nano_2", **SMALL)).eval(), tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(model.state_dict(), path)
    loaded = load_model(path)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_tensors_that_share_memory_in_the_file_do_not_share_it_in_the_model(tmp_path):
    state = create_model("MDTv2_Nano_2", **SMALL).state_dict()
    flat = torch.arange(3 * 128.0)
    state["en_inblocks.0.attn.qkv.bias"], state["en_inblocks.0.attn.proj.bias"] = flat, flat[128:256]
    state["en_outblocks.0.attn.qkv.bias"] = flat
    state["mask_token"] = torch.ones(1).expand(1, 1, 128)
    state["final_layer.linear.weight"] = state["final_layer.linear.weight"].t().contiguous().t()
    torch.save(state, tmp_path / "weights.pt")
    model = load_model(tmp_path / "weights.pt")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    values = model.state_dict().values()
    assert len({value.untyped_storage().data_ptr() for value in values}) == len(values)
    assert all(value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes for value in values)
    assert not model.mask_token.requires_grad and model.pos_embed.requires_grad


@pytest.mark.parametrize("name", ["MDTv2_Nano_2", "MDT_Nano_2", "DiT_Nano_2"])
def test_loading_draws_no_numbers(name, tmp_path):
    torch.save(create_model(name, **SMALL).state_dict(), tmp_path / "weights.pt")
    before = torch.get_rng_state()
    model = load_model(tmp_path / "weights.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))


# ---------------------------------------------------------------- safetensors, exported folders, the hub


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


def test_the_hub_draws_no_weights_that_it_overwrites(tmp_path):
    model = fill(create_model("MDT_Nano_2", **SMALL)).half()
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    loaded = MDT.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and not loaded.training
    for name, value in loaded.state_dict().items():
        expected = model.state_dict()[name]
        assert torch.equal(value, expected.float() if expected.is_floating_point() else expected)


def test_the_hub_refuses_the_folder_of_another_family(tmp_path):
    create_model("DiT_Nano_2", **SMALL).save_pretrained(tmp_path / "dit")
    create_model("MDT_Nano_2", **SMALL).save_pretrained(tmp_path / "mdt")
    for family, folder in ((MDTv2, "dit"), (DiT, "mdt"), (MDTv2, "mdt"), (MDT, "dit")):
        with pytest.raises(
            ValueError, match=rf"{folder} does not hold the weights of a {family.__name__} \(.*load_model"
        ):
            family.from_pretrained(tmp_path / folder)


def test_a_folder_exported_by_an_older_version_loads(tmp_path):
    model = fill(create_model("DiT_Nano_2", **SMALL))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mask_ratio": None, "decode_layer": None}))
    assert torch.equal(load_model(tmp_path).pos_embed, model.pos_embed)
    assert torch.equal(DiT.from_pretrained(tmp_path).pos_embed, model.pos_embed)


def load_offline(sources, cache):
    """What loading says of each source, or the last line of the refusal."""
    code = (
        "import sys\nfrom masked_diffusion import load_model\nfor source in sys.argv[1:]:\n"
        "    try: load_model(source)\n    except ValueError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", code, *sources], capture_output=True, text=True, env=env, check=True
    ).stdout.splitlines()


def test_a_hub_id_is_found_in_the_cache_or_refused_in_a_sentence(tmp_path):
    repository, commit = tmp_path / "hub" / "models--shgao--MDT-XL2", "0" * 40
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for version, name in (("v1", "MDT_Nano_2"), ("v2", "MDTv2_Nano_2")):
        weights = repository / "snapshots" / commit / f"mdt_xl2_{version}_ckpt.pt"
        torch.save(create_model(name, **SMALL).state_dict(), weights)
    sources = ("shgao/MDT-XL2", "shgao/MDT-XL2/mdt_xl2_v1_ckpt.pt", "shgao/absent")
    second, first, refused = load_offline(sources, tmp_path)
    assert "MDTv2 of 4 blocks, 2 of them decoder blocks" in second
    assert "MDT of 4 blocks" in first
    assert refused.startswith("shgao/absent is not a local path, and cannot be downloaded from the hub")
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
    pickle.loads((tmp_path / "bad.pt").read_bytes()).close()
    Hostile.path.unlink()  # the pickle does work, where it may
    with pytest.raises(ValueError, match=r"bad\.pt cannot be read as a checkpoint"):
        load_model(tmp_path / "bad.pt")
    # Nor among the flags of DiT's checkpoints, of which the class alone is allowed.
    torch.save({"ema": {}, "args": argparse.Namespace(lr=Hostile())}, tmp_path / "flags.pt")
    with pytest.raises(
        UserError, match=r"flags\.pt cannot be read as a checkpoint \(Unsupported global: GLOBAL io.open\)"
    ):
        load_model(tmp_path / "flags.pt")
    assert not (tmp_path / "pwned").exists()


class Flags(argparse.Namespace):
    pass


def test_other_objects_are_named_without_torchs_advice_to_load_them(tmp_path):
    torch.save({"ema": {}, "args": Flags(lr=1.0)}, tmp_path / "flags.pt")
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "flags.pt")
    message = str(caught.value)
    assert f"(Unsupported global: GLOBAL {__name__}.Flags)" in message
    assert "\x1b" not in message and "weights_only" not in message and "\n" not in message
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_weights_only_may_be_said_and_not_denied(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pt")
    assert dist_util.load_state_dict(str(tmp_path / "a.pt"), weights_only=True)["a"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"weights_only is False, but .*a\.pt could then run any code"):
        dist_util.load_state_dict(str(tmp_path / "a.pt"), weights_only=False)


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
    with pytest.raises(ValueError, match=r"a DiT of depth 3 and width 128 is none of the named sizes"):
        load_model(tmp_path / "odd.pt")
    state = create_model("DiT_Nano_2", input_size=8).state_dict()
    del state["blocks.1.mlp.fc1.weight"]
    torch.save(state, tmp_path / "lacking.pt")
    with pytest.raises(ValueError, match=r"lacking\.pt does not fit.*fc1"):
        load_model(tmp_path / "lacking.pt")


BIAS_TABLE = "de_blocks.0.attn.rel_pos_bias.relative_position_bias_table"
INDEX = "de_blocks.0.attn.rel_pos_bias.relative_position_index"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"bias": lambda v: v.index_fill(0, torch.tensor([3]), float("nan"))},
            "qkv.bias holds numbers that are not fin",
        ),
        ({"bias": lambda v: v.half().fill_(float("inf"))}, "qkv.bias holds numbers that are not finite"),
        ({"bias": lambda v: v.long()}, r"qkv.bias is of torch\.int64, but must be of torch\.float32 or"),
        ({"bias": lambda v: v.to(torch.complex64)}, r"qkv.bias is of torch\.complex64"),
        ({"bias": lambda v: v > 0}, r"qkv.bias is of torch\.bool"),
        ({"bias": lambda v: v[:0]}, r"qkv.bias is empty, of shape \(0,\)"),
        ({"bias": lambda v: v.to_sparse()}, "qkv.bias is not a dense tensor"),
        ({"bias": "text"}, "qkv.bias is a str instead of a tensor"),
        ({"pos_embed": lambda v: v.flatten()}, r"pos_embed has the shape \(2048,\), but must have \(1, square, 128\)"),
        ({"pos_embed": lambda v: v[:, :15]}, r"pos_embed has the shape \(1, 15, 128\)"),
        ({"pos_embed": lambda v: v[:, :0]}, "pos_embed is empty"),
        (
            {"pos_embed": lambda v: v[:, :9]},
            r"decoder_pos_embed has the shape \(1, 16, 128\), but must have \(1, 9, 128\)",
        ),
        ({"x_embedder.proj.weight": lambda v: v[:, :, :, :1]}, r"x_embedder.proj.weight has the shape"),
        ({"x_embedder.proj.weight": lambda v: v.flatten(1)}, r"x_embedder.proj.weight has the shape"),
        ({"table": lambda v: v[:0]}, "embedding_table.weight is empty"),
        ({"table": lambda v: v[0]}, r"embedding_table.weight has the shape \(128,\)"),
        ({"final_layer.linear.weight": lambda v: v[:5]}, r"final_layer.linear.weight has the shape \(5, 128\)"),
        ({BIAS_TABLE: lambda v: v[:2]}, r"bias_table has the shape \(2, 4\), but must have \(52, heads\)"),
        ({INDEX: lambda v: v.float()}, r"relative_position_index is of torch\.float32"),
        ({INDEX: lambda v: v + 40}, "relative_position_index has an index outside the 52 rows"),
        (
            {"bias": lambda v: v[:5]},
            r"bad\.pt does not fit .*it has other shapes for en_inblocks.0.attn.qkv.bias \(5,\)",
        ),
        ({"blocks.": torch.ones(1)}, r"depth \(5\) - decode_layer \(2\) must be even"),
        ({"head.weight": torch.ones(1)}, r"bad\.pt does not fit .*it has the unknown head\.weight"),
        ({7: torch.ones(1)}, r"bad\.pt does not fit .*it has the unknown 7"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_malformed_weights_are_refused_in_a_sentence(changes, message, tmp_path):
    state = create_model("MDTv2_Nano_2", **SMALL).state_dict()
    for key, change in changes.items():
        key = {"bias": "en_inblocks.0.attn.qkv.bias", "table": "y_embedder.embedding_table.weight"}.get(key, key)
        state[key] = change(state[key]) if callable(change) else change
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=message) as refusal:
        load_model(tmp_path / "bad.pt")
    assert str(refusal.value).startswith(str(tmp_path / "bad.pt")) and len(str(refusal.value)) < 600


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(dtype, tmp_path):
    model = fill(create_model("MDTv2_Nano_2", **SMALL))
    state = {key: v.to(dtype) if v.is_floating_point() else v for key, v in model.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.pos_embed, model.pos_embed, rtol=0.01, atol=0.001)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[" * 5000, "cannot be read as JSON"),
        ("[]", "holds a list instead of a dictionary"),
        ('{"classes": [1, 2]}', "'classes' are not a list of names"),
        ('{"classes": "abc"}', "'classes' are not a list of names"),
        ('{"diffusion": [1]}', "'diffusion' is"),
        ('{"model": {"name": 3}}', "'model' is"),
        ('{"model": {"name": "DiT_Nano_2", "options": []}}', "'model' is"),
        ('{"model": {"name": "DiT_Nana_2"}}', "no model is called 'DiT_Nana_2': the nearest are DiT_Nano_2, "),
        (
            '{"model": {"name": "DiT_Nano_2", "options": {"depth": 1000000000}}}',
            "has depth 1000000000, but the weights",
        ),
        ('{"model": {"name": "DiT_Nano_2", "options": {"input_size": "8"}}}', "has input_size '8', but the weights"),
        ('{"model": {"name": "DiT_Nano_2", "options": {"num_heads": "4"}}}', "cannot be built"),
        (
            '{"model": {"name": "DiT_Nano_2", "options": {"num_classes": 99999999999999}}}',
            r"does not fit .*y_embedder\.embedding_table\.weight \(11, 128\)",
        ),
        ('{"model": {"name": "DiT_Nano_2", "options": {"colour": 3}}}', "cannot be built.*colour"),
        ('{"num_heads": "abc", "depth": 4}', "cannot be built"),
    ],
)
def test_a_malformed_configuration_is_refused_in_a_sentence(text, message, tmp_path):
    torch.save(create_model("DiT_Nano_2", **SMALL).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as refusal:
        load_model(tmp_path / "weights.pt")
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("name", ["notes.pt", "notes.safetensors", "notes"])
@pytest.mark.parametrize("content", [b"Once upon a time", b""])
def test_a_file_that_is_no_checkpoint_is_refused_by_its_first_bytes(name, content, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(content * 100)
    monkeypatch.setattr(pretrained, "read_weights", None)  # nothing more is read
    with pytest.raises(UserError, match=rf"{name} cannot be read as .*it begins with {content[:9]!r}"):
        find_weights(tmp_path / name)


@pytest.mark.parametrize("config", ["", "[]", "null", '{"depth": "x"}'])
def test_a_damaged_configuration_of_an_exported_folder_is_named(tmp_path, config):
    create_model("DiT_Nano_2", **SMALL).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=str(tmp_path)):
        DiT.from_pretrained(tmp_path)
