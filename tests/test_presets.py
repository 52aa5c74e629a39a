"""Published recipes: their values, how flags override them, and that each is printed in full."""

import image_sample
import pytest
from helpers import run_train, train_flags

from masked_diffusion import create_model, presets
from masked_diffusion.config import RunConfig
from masked_diffusion.script_util import parse_flags
from masked_diffusion.training.resume import resolve
from masked_diffusion.utils.errors import UserError


def parse(*words, config_class=RunConfig):
    return parse_flags(config_class, "A test.", words)


@pytest.mark.parametrize("name", presets.TRAINING)
def test_every_value_of_a_recipe_is_set_and_resolving_changes_none(name):
    given, row = parse("--preset", name), presets.TRAINING[name]
    assert given.values().items() >= row.items() and given.train.global_batch_size == 256
    changed = {key for key, value in resolve(given).values().items() if key in row and value != row[key]}
    assert changed <= {"snr_gamma", "decode_layer"}  # auto and None stand for values of the family


def test_the_recipes_are_those_of_the_scripts():
    model = parse("--preset", "mdtv2-xl2").model
    assert (model.model, model.decode_layer, model.mask_ratio) == ("MDTv2_XL_2", 4, 0.3)
    # What the paper says of the families is their default, too.
    for name, optimizer, gamma in (("mdtv2-s2", "adan", 5.0), ("mdt-xl2", "adamw", None), ("dit-xl2", "adamw", None)):
        config = parse("--preset", name)
        default = resolve(RunConfig().replaced(model=config.model.model))
        assert (config.train.optimizer, resolve(config).diffusion.snr_gamma) == (optimizer, gamma)
        assert (default.train.optimizer, default.diffusion.snr_gamma) == (optimizer, gamma)
        assert default.train.grad_clip == config.train.grad_clip
    assert create_model("MDT_S_2").decode_layer == presets.TRAINING["mdt-xl2"]["decode_layer"]


def test_given_flags_override_in_any_order():
    assert parse("--lr", "1e-4", "--preset", "mdtv2-s2", "--mask_ratio=None").train.lr == 1e-4
    config = parse("--mask_ratio", "None", "--preset=mdtv2-s2")
    assert config.model.mask_ratio is None and config.train.lr == 5e-4
    assert parse("--preset", "mdtv2-s2", "--lr", "3e-4").train.lr == 3e-4  # a value that is the default, but given
    batch = parse("--preset", "mdtv2-s2", "--batch_size", "16").train
    assert (batch.batch_size, batch.global_batch_size) == (16, None)
    assert parse("--preset", "None").train == RunConfig().train


def test_a_global_and_a_local_batch_exclude_each_other():
    with pytest.raises(
        UserError, match=r"--global_batch_size 256 and --batch_size 32 exclude each other: leave one of them out"
    ):
        parse("--global_batch_size", "256", "--batch_size", "32")


def test_an_unknown_recipe_is_a_sentence():
    with pytest.raises(UserError, match=r"--preset is mdtv3: it must be one of mdtv2-s2, mdtv2-xl2, mdt-xl2, dit-xl2"):
        parse("--preset", "mdtv3")


def test_the_published_sampling():
    flags = parse("--preset", "mdtv2-xl2-fid", "--seed", "5", config_class=image_sample.Flags)
    assert flags.sample.weights.model_path == "shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt"
    guidance = flags.sample.guidance
    assert (guidance.cfg_cond, guidance.cfg_scale, guidance.scale_pow) == (True, 3.8, 4.0)
    assert flags.sample.solver.num_sampling_steps == "250" and flags.images.num_samples == 50000
    line = presets.describe(flags.images.preset, flags.values())
    assert line.startswith("preset mdtv2-xl2-fid: --model_path shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt --cfg_cond True ")
    assert line.endswith("; overridden: --seed 5 (not 0)")
    unguided = ("--cfg_scale", "None", "--scale_pow", "None", "--cfg_cond", "False", "--guidance", "none")
    guidance = parse("--preset", "mdtv2-xl2-fid", *unguided, config_class=image_sample.Flags).sample.guidance
    assert guidance.rule("power-cosine") == "none" and guidance.unused("none") == []


def test_a_run_says_its_recipe_in_full(images, tmp_path, monkeypatch):
    flags = [word for word in train_flags(images, tmp_path, max_steps=1) if "--batch_size" not in word]
    run_train(monkeypatch, [*flags, "--preset=mdtv2-s2", "--global_batch_size=8", "--decode_layer=2"])
    log = (tmp_path / "log.txt").read_text()
    row = presets.TRAINING["mdtv2-s2"]
    line = next(line for line in log.splitlines() if "preset mdtv2-s2: " in line)
    assert all(f"--{name} " in line for name in row) and "--model MDTv2_Nano_2 (not MDTv2_S_2)" in line
    assert "8 images x 1 ranks = global batch 8 per step" in log


def test_the_papers_steps():
    assert presets.paper_steps("MDTv2_XL_2") == 2_500_000 and presets.paper_steps("MDT_B_2") == 400_000
    assert presets.paper_steps("MDTv2_Nano_2") is None
