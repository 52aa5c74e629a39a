"""Parity with the published implementation, layouts, masking, initialisation, bad sizes."""

import json

import numpy as np
import pytest
import torch
from fill import fill, tensor
from helpers import DATA

from masked_diffusion import create_diffusion, create_model, models
from masked_diffusion.layers.attention import gather_pairs, relative_position_index
from masked_diffusion.layers.embeddings import sincos_pos_embed_2d, timestep_embedding
from masked_diffusion.models import (
    MODELS,
    SIZES,
    DiT,
    DiT_models,
    MDTv2,
    MDTv2_S_2,
    TimestepEmbedder,
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
    get_2d_sincos_pos_embed_from_grid,
    model_class,
)

T, Y = torch.tensor([730, 10]), torch.tensor([3, 999])
MASKED = {"MDTv2_S_2": {"mask_ratio": 0.3, "decode_layer": 6}, "MDT_S_2": {"mask_ratio": 0.3, "decode_layer": 2}}
LAYOUTS = json.loads((DATA / "state_dicts.json").read_text())


def close(ours, golden, atol=2e-5):
    difference = np.abs(ours.detach().numpy() - golden).max()
    assert difference <= atol, difference


def tiny(name="MDTv2_Nano_2", **options):
    """A small model with weights that matter: a fresh one returns zeros."""
    return fill(create_model(name, **{"input_size": 8, "in_channels": 3, "num_classes": 10} | options))


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("name", MASKED)
def test_mdt_matches_published_outputs(name, golden, latents):
    vectors = golden("models_small")
    model = fill(create_model(name, input_size=32, **MASKED[name])).eval()
    pair = torch.cat([latents[:1], latents[:1]])
    t, y = torch.tensor([500, 500]), torch.tensor([3, 1000])
    with torch.no_grad():
        close(model(latents, T, Y), vectors[f"{name}/eval"])
        close(model.forward_with_cfg(pair, t, y), vectors[f"{name}/nocfg"])
        close(model.forward_with_cfg(pair, t, y, cfg_scale=3.8, scale_pow=4.0), vectors[f"{name}/cfg_pow4"])
        close(model.forward_with_cfg(pair, t, y, cfg_scale=4.0, scale_pow=0.01), vectors[f"{name}/cfg_pow001"])
        torch.manual_seed(8)
        close(model(latents, T, Y, enable_mask=True), vectors[f"{name}/eval_masked"])
        torch.manual_seed(7)
        close(model.train()(latents, T, Y, enable_mask=True), vectors[f"{name}/train_masked"])


def test_dit_matches_published_outputs(golden, latents):
    vectors = golden("models_small")
    model = fill(create_model("DiT_S_2", input_size=32)).eval()
    with torch.no_grad():
        close(model(latents, T, Y), vectors["DiT_S_2/eval"])
        pair = torch.cat([latents[:1], latents[:1]])
        out = model.forward_with_cfg(pair, torch.tensor([500, 500]), torch.tensor([3, 1000]), cfg_scale=4.0)
        close(out, vectors["DiT_S_2/cfg"])
        torch.manual_seed(7)
        close(model.train()(latents, T, Y), vectors["DiT_S_2/train"])


@pytest.mark.parametrize("name", MASKED)
def test_losses_and_gradients_match_published(name, golden, latents):
    vectors = golden("models_small")
    model = fill(create_model(name, input_size=32, **MASKED[name])).train()
    diffusion = create_diffusion(snr_gamma=5.0 if name.startswith("MDTv2") else None)
    t, noise = torch.tensor([900, 20]), tensor("noise", (2, 4, 32, 32))
    torch.manual_seed(9)
    full = diffusion.training_losses(model, latents, t, {"y": Y}, noise=noise)
    masked = diffusion.training_losses(model, latents, t, {"y": Y, "enable_mask": True}, noise=noise)
    for part, terms in (("full", full), ("masked", masked)):
        for key in ("loss", "mse", "vb"):
            np.testing.assert_allclose(
                terms[key].detach().numpy(), vectors[f"{name}/loss_{part}/{key}"], rtol=1e-5, atol=1e-6
            )
    (full["loss"].mean() + masked["loss"].mean()).backward()
    norms = np.array([-1 if p.grad is None else p.grad.norm().item() for p in model.parameters()])
    np.testing.assert_allclose(norms, vectors[f"{name}/grad_norms"], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "/" not in name])
def test_state_dict_layout(name):
    with torch.device("meta"):
        model = create_model(name, input_size=32)
    layout = {key: [list(value.shape), str(value.dtype)] for key, value in model.state_dict().items()}
    assert layout == LAYOUTS[name]
    assert list(layout) == list(LAYOUTS[name])
    if f"{name}/param_names" in LAYOUTS:
        assert [key for key, _ in model.named_parameters()] == LAYOUTS[f"{name}/param_names"]


@pytest.mark.parametrize(
    "name, millions", [("MDTv2_S_2", 38.455), ("MDTv2_B_2", 150.932), ("MDTv2_L_2", 507.016), ("MDTv2_XL_2", 742.264)]
)
def test_parameter_counts_of_the_paper(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)


# ---------------------------------------------------------------- masking


def test_ids_keep_are_the_smallest_scores_at_the_drawn_ratio():
    model = tiny(mask_ratio=0.3)
    torch.manual_seed(5)
    ids = model.draw_kept(4, "cpu")
    torch.manual_seed(5)
    keep = int(16 * (1 - (0.3 + 0.2 * torch.rand(1))))
    order = torch.rand(4, 16).argsort(dim=1)
    assert ids.shape == (4, keep)
    assert torch.equal(ids, order[:, :keep].sort(dim=1).values)


@pytest.mark.parametrize("name", ["MDTv2_Nano_2", "MDT_Nano_2"])
def test_masked_pass_is_blind_to_dropped_patches_in_the_encoder(name):
    # v1's decoder sees only interpolated tokens there; v2's decoder blocks see the patches again through their skip.
    model = tiny(name, mask_ratio=0.5).eval()
    x, ids = tensor("pixels", (1, 3, 8, 8)), torch.tensor([[0, 1, 2, 3, 4, 5]])
    changed = x.clone()
    changed[:, :, 6:, 6:] += 1.0  # token 15, which is dropped
    out, out_changed = (model(v, T[:1], Y[:1] % 10, enable_mask=True, ids_keep=ids).detach() for v in (x, changed))
    assert torch.equal(out, out_changed) == (name == "MDT_Nano_2")


def test_keeping_all_tokens_equals_the_full_pass():
    model = tiny(mask_ratio=0.3).eval()
    x, ids = tensor("pixels", (2, 3, 8, 8)), torch.arange(16).expand(2, -1)
    with torch.no_grad():
        close(model(x, T, Y % 10, enable_mask=True, ids_keep=ids), model(x, T, Y % 10).numpy(), atol=1e-5)


def test_masked_attention_uses_the_bias_of_the_kept_positions():
    index = relative_position_index(4, 3)
    ids = torch.tensor([[0, 5, 11], [1, 2, 3]])
    pairs = gather_pairs(index, ids)
    for n, i, j in np.ndindex(2, 3, 3):
        (r1, c1), (r2, c2) = divmod(ids[n, i].item(), 3), divmod(ids[n, j].item(), 3)
        assert pairs[n, i, j] == (r1 - r2 + 3) * 5 + (c1 - c2 + 2)
    assert index.max() == 7 * 5 - 1


@pytest.mark.parametrize(
    "name, masked",
    [
        ("MDTv2_Nano_2", True),
        ("MDT_Nano_2", True),
        ("MDTv2_Nano_2", False),
        ("MDT_Nano_2", False),
        ("DiT_Nano_2", False),
    ],
)
def test_every_trainable_parameter_gets_a_gradient(name, masked):
    model = tiny(name, **({"mask_ratio": 0.3} if masked else {})).train()
    x, y = tensor("pixels", (2, 3, 8, 8)), Y % 10
    out = [model(x, T, y), *([model(x, T, y, enable_mask=True)] if masked else [])]
    sum(o.square().mean() for o in out).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


# ---------------------------------------------------------------- labels and guidance


def test_null_label_follows_the_model():
    assert tiny(num_classes=7).null_label == 7
    assert tiny(num_classes=0).null_label == 0
    assert tiny(class_dropout_prob=0.0).null_label is None
    with pytest.raises(ValueError, match="no null class"):
        tiny(class_dropout_prob=0.0)(torch.zeros(1, 3, 8, 8), torch.zeros(1))


def test_no_label_is_the_null_label():
    model, x = tiny().eval(), tensor("pixels", (2, 3, 8, 8))
    assert torch.equal(model(x, T), model(x, T, torch.tensor([10, 10])))


def test_label_dropout_can_be_given():
    model, x = tiny().train(), tensor("pixels", (2, 3, 8, 8))
    out = model(x, T, Y % 10, drop_labels=torch.tensor([True, False]))
    assert torch.equal(out, model.eval()(x, T, torch.tensor([10, 9])))


def test_published_calls_of_the_label_embedder():
    embedder, labels = tiny().y_embedder, torch.tensor([3, 9])
    assert torch.equal(embedder.token_drop(labels, torch.tensor([1, 0])), torch.tensor([10, 9]))
    null, nine = embedder(torch.tensor([10, 9]), False)
    assert torch.equal(embedder(labels, False, torch.tensor([1, 0])), torch.stack([null, nine]))
    torch.manual_seed(0)
    dropped = torch.rand(1000) < 0.1
    torch.manual_seed(0)
    assert torch.equal(embedder.token_drop(torch.zeros(1000, dtype=torch.long)) == 10, dropped)
    embedder.eval()  # `train` decides, not the module's mode
    torch.manual_seed(0)
    out = embedder(torch.full((1000,), 9), True)
    assert torch.equal(out, torch.where(dropped[:, None], null, nine))
    with pytest.raises(ValueError, match="class_dropout_prob=0"):
        tiny(class_dropout_prob=0.0).y_embedder(labels, False, torch.tensor([1, 0]))


@pytest.mark.parametrize("bad", [[0, 11], [-1, 3]])
def test_labels_beyond_the_table_are_refused(bad):
    message = rf"labels lie between {min(bad)} and {max(bad)}, but this model has rows 0 to 10, of which 10 is the null"
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(2, 3, 8, 8), T, torch.tensor(bad))


def test_inputs_of_another_size_are_refused():
    for shape in ((2, 3, 16, 16), (2, 4, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"shape \(.*\), but this model was made for \(3, 8, 8\)"):
            tiny()(torch.zeros(shape), T, Y % 10)


def test_guidance_of_an_odd_batch_is_refused():
    model, x = tiny("DiT_Nano_2").eval(), torch.zeros(3, 3, 8, 8)
    with pytest.raises(ValueError, match=r"pairs of rows.*but got 3"):
        model.forward_with_cfg(x, T[:1].expand(3), torch.tensor([1, 10, 10]), 4.0)


def test_guidance_reaches_only_the_guided_channels():
    model = tiny(in_channels=4).eval()
    x, t, y = tensor("latent", (1, 4, 8, 8)).expand(2, -1, -1, -1), torch.tensor([300, 300]), torch.tensor([1, 10])
    with torch.no_grad():
        plain, three = model(x, t, y), model.forward_with_cfg(x, t, y, cfg_scale=3.0)
        four = model.forward_with_cfg(x, t, y, cfg_scale=3.0, guided_channels=4)
    w = 1 + 2 * (1 - np.cos(np.pi * 0.7**4)) / 2
    expected = plain[1] + w * (plain[0] - plain[1])
    close(three[0, :3], expected[:3].numpy())
    close(four[1, :4], expected[:4].numpy())
    assert torch.equal(three[:, 3:], plain[:, 3:])


# ---------------------------------------------------------------- construction


def test_position_tables_are_published_arrays():
    grid = np.stack(np.meshgrid(np.arange(3), np.arange(3)))  # column coordinate first, as MAE has it
    table = get_2d_sincos_pos_embed(8, 3)
    assert table.shape == (9, 8) and table.dtype == np.float64
    np.testing.assert_array_equal(table, get_2d_sincos_pos_embed_from_grid(8, grid.reshape(2, 1, 3, 3)))
    np.testing.assert_array_equal(table[:, :4], get_1d_sincos_pos_embed_from_grid(4, grid[0]))
    np.testing.assert_array_equal(get_2d_sincos_pos_embed(8, 3, True, 2), np.concatenate([np.zeros((2, 8)), table]))
    assert torch.equal(torch.from_numpy(table).float()[None], sincos_pos_embed_2d(8, 3))


def test_position_table_is_maes():
    table = sincos_pos_embed_2d(8, 3)[0].double().numpy()
    omega = np.array([1.0, 1 / 100])
    row, col = 2, 1
    axis = [np.concatenate([np.sin(p * omega), np.cos(p * omega)]) for p in (col, row)]
    np.testing.assert_allclose(table[row * 3 + col], np.concatenate(axis), atol=1e-7)


def test_timestep_embedding_is_cosine_then_sine():
    embedding = timestep_embedding(torch.tensor([0.0, 7.5]), 6).numpy()
    freqs = 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(embedding[1], np.concatenate([np.cos(7.5 * freqs), np.sin(7.5 * freqs)]), atol=1e-6)
    np.testing.assert_array_equal(embedding[0], [1, 1, 1, 0, 0, 0])
    odd = TimestepEmbedder.timestep_embedding(torch.tensor([0.0, 7.5]), 7).numpy()
    np.testing.assert_array_equal(odd, np.pad(embedding, ((0, 0), (0, 1))))


def test_initialisation():
    torch.manual_seed(0)
    model = MDTv2_S_2(input_size=32, mask_ratio=0.3, decode_layer=6)
    assert model(torch.randn(1, 4, 32, 32), T[:1], Y[:1]).abs().max() == 0
    block = model.en_inblocks[0]
    assert block.adaLN_modulation[1].weight.abs().max() == 0
    bound = (6 / (384 + 1536)) ** 0.5
    assert 0.99 * bound < block.mlp.fc1.weight.abs().max() <= bound
    assert abs(block.attn.rel_pos_bias.relative_position_bias_table.std() - 0.02) < 1e-3
    assert abs(model.mask_token.std() - 0.02) < 3e-3
    patch_bound = (6 / (384 + 16)) ** 0.5
    assert 0.99 * patch_bound < model.x_embedder.proj.weight.abs().max() <= patch_bound
    assert torch.equal(model.pos_embed, sincos_pos_embed_2d(384, 16)) and model.pos_embed.requires_grad
    assert not create_model("DiT_Nano_2", input_size=8).pos_embed.requires_grad


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "MDTv2_XXL_2"}, "'MDTv2_XXL_2': the nearest are MDTv2_XL_2, [^ ]+, [^ ]+$"),
        ({"decode_layer": 3}, r"depth \(4\) - decode_layer \(3\) must be even"),
        ({"decode_layer": 5}, "decode_layer is 5"),
        ({"input_size": 7}, r"input_size \(7\) must be a multiple of patch_size \(2\)"),
        ({"mask_ratio": 0.8}, "mask_ratio is 0.8"),
        ({"mask_ratio": float("nan")}, "mask_ratio is nan"),
        ({"mask_ratio": float("inf")}, "mask_ratio is inf"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob is 1.0"),
        ({"num_heads": 5}, r"hidden_size \(128\) must be a multiple of num_heads \(5\)"),
        ({"name": "DiT_Nano_2", "mask_ratio": 0.3}, "DiT has no masked pass"),
        ({"num_classes": -1}, "num_classes is -1"),
    ],
)
def test_bad_options_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{"name": "MDTv2_Nano_2", "input_size": 8} | options)


def test_the_class_of_a_name_holds_the_defaults_of_its_family():
    assert model_class("MDTv2-S/2") is MDTv2 and model_class("DiT_XL_2") is DiT
    defaults = {name: model_class(f"{name}_S_2") for name in ("MDTv2", "MDT", "DiT")}
    assert {name: (c.default_optimizer, c.default_snr_gamma, c.guidance_rule) for name, c in defaults.items()} == {
        "MDTv2": ("adan", 5.0, "power-cosine"),
        "MDT": ("adamw", None, "power-cosine"),
        "DiT": ("adamw", None, "constant"),
    }
    with pytest.raises(ValueError, match="no model is called 'MDTV2_S_2': the nearest are MDTv2_S_2,"):
        model_class("MDTV2_S_2")


def test_names_of_both_spellings():
    assert "MDTv2_XL_2" in MODELS and "DiT_B_8" in MODELS
    with torch.device("meta"):
        assert create_model("DiT-B/4").patch_size == 4


def test_every_name_is_an_attribute_of_the_module():
    assert len(MODELS) == 54 and all(models.__dict__[name] is make for name, make in MODELS.items())
    assert len(DiT_models) == 18 and DiT_models["DiT-XL/2"] is models.DiT_XL_2
    with torch.device("meta"):
        made = {name: make(input_size=16) for name, make in MODELS.items() if "Nano" in name or "Tiny" in name}
    for name, model in made.items():
        family, size, patch_size = name.split("_")
        assert (type(model).__name__, model.patch_size, model.depth) == (family, int(patch_size), SIZES[size].depth)
        assert model.decode_layer == {"MDTv2": SIZES[size].decode_layer, "MDT": 2, "DiT": None}[family]


def test_options_left_at_none_are_those_of_the_size():
    with torch.device("meta"):
        model = create_model("MDTv2_S_2", mask_ratio=None, decode_layer=None)
        assert create_model("DiT_S_2", mask_ratio=None, decode_layer=None).mask_ratio is None
    assert (model.mask_ratio, model.decode_layer) == (None, 6)


def test_published_names_are_here():
    names = (
        "modulate Attention RelativePositionBias TimestepEmbedder LabelEmbedder DiTBlock MDTBlock FinalLayer DiT MDTv2 "
        "get_2d_sincos_pos_embed get_2d_sincos_pos_embed_from_grid get_1d_sincos_pos_embed_from_grid DiT_models"
    )
    assert [name for name in names.split() if name not in models.__dict__] == []


def test_published_classes_take_the_published_arguments():
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert models.DiTBlock(32, 4, mlp_ratio=2.0)(x, c).shape == x.shape
    block = models.MDTBlock(32, 4, 4.0, True, num_patches=16)
    assert block(x, c, x).shape == x.shape and block.skip_linear.in_features == 64
    attention = models.Attention(32, 4, num_patches=16)
    assert attention.qkv.bias is None and attention.rel_pos_bias().shape == (1, 4, 16, 16)
    with torch.device("meta"):  # by position, as far as the published constructors have positions
        model = MDTv2(16, 2, 3, 64, 4, 4, 2.0, 0.1, 10, False, 0.3, 2)
        assert DiT(16, 2, 3, 64, 2, 4, 2.0, 0.1, 10, False).out_channels == 3
    assert (model.out_channels, model.mask_ratio, model.decode_layer, model.mlp_ratio) == (3, 0.3, 2, 2.0)
