"""Users' subclasses: methods that override ours with the published arguments are called as in ADM, DiT and MDT."""

import types

import pytest
import torch
import torch.nn as nn
from fill import fill, tensor

from masked_diffusion import create_diffusion, create_model
from masked_diffusion.diffusion_utils import mean_flat
from masked_diffusion.gaussian_diffusion import LossType
from masked_diffusion.models import MDT, Attention, DiTBlock, MDTv2, modulate
from masked_diffusion.respace import SpacedDiffusion, create_gaussian_diffusion
from masked_diffusion.utils.errors import UserError

SHAPE = (2, 3, 4, 4)
X = torch.linspace(-1, 1, 96).view(SHAPE)
T = torch.tensor([0, 4])


def network(x, t, y=None):
    shift = 0 if y is None else y.view(-1, 1, 1, 1)
    return torch.cat([torch.sin(x + t.view(-1, 1, 1, 1) / 100 + shift), torch.cos(x)], dim=1)


def as_subclass(diffusion, subclass):
    """The same diffusion, of a user's class."""
    diffusion.__class__ = subclass
    return diffusion


def seeded(function, *args, **kwargs):
    torch.manual_seed(0)
    return function(*args, **kwargs)


class Steps(SpacedDiffusion):
    """Steps with the published arguments, by name, which pass on what they get."""

    calls = 0

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        Steps.calls += 1
        return super().p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0):
        Steps.calls += 1
        return super().ddim_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)


class Options(SpacedDiffusion):
    """Everything after the positions that all published versions share as keywords."""

    calls = 0

    def p_sample(self, model, x, t, **options):
        Options.calls += 1
        return super().p_sample(model, x, t, **options)

    def p_sample_loop_progressive(self, model, shape, **options):
        yield from super().p_sample_loop_progressive(model, shape, **options)

    def ddim_sample(self, model, x, t, **options):
        Options.calls += 1
        return super().ddim_sample(model, x, t, **options)

    def ddim_sample_loop_progressive(self, model, shape, **options):
        yield from super().ddim_sample_loop_progressive(model, shape, **options)

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        return super().p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        return super().condition_mean(cond_fn, p_mean_var, x, t, model_kwargs)


@pytest.mark.parametrize("subclass", [Steps, Options])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_overridden_steps_are_called(subclass, loop):
    eta = {"eta": 0.5} if loop.startswith("ddim") else {}
    options = {"noise": X, "clip_denoised": False, "model_kwargs": {"y": T}, "cond_fn": lambda x, t, y: 0.1 * x} | eta
    plain = seeded(getattr(create_diffusion("6"), loop), network, SHAPE, **options)
    subclass.calls = 0
    user = as_subclass(create_diffusion("6"), subclass)
    assert torch.equal(seeded(getattr(user, loop), network, SHAPE, **options), plain)
    assert subclass.calls == 6


class Shifted(SpacedDiffusion):
    """Another mean and variance: losses and bounds see them, not only samples."""

    def p_mean_variance(self, *args, **kwargs):
        out = super().p_mean_variance(*args, **kwargs)
        return {**out, "log_variance": out["log_variance"] + 0.5}


def test_losses_and_bounds_see_an_overridden_p_mean_variance():
    plain, user = create_diffusion("6"), as_subclass(create_diffusion("6"), Shifted)
    losses = [d.training_losses(network, X, T, {"y": T}, noise=X.flip(0)) for d in (plain, user)]
    assert torch.equal(losses[0]["mse"], losses[1]["mse"]) and not torch.isclose(*(x["vb"] for x in losses)).any()
    bounds = [seeded(d.calc_bpd_loop, network, X, model_kwargs={"y": T})["vb"] for d in (plain, user)]
    assert not torch.isclose(*bounds).any()


class Losses(SpacedDiffusion):
    """Losses written out with the published helpers, with a term of the user's own."""

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        model, kwargs = self._wrap_model(model), model_kwargs or {}
        assert self._wrap_model(model) is model
        x_t = self.q_sample(x_start, t, noise=noise)
        output = model(x_t, self._scale_timesteps(t), **kwargs)
        eps, values = torch.split(output, x_t.shape[1], dim=1)
        frozen = torch.cat([eps.detach(), values], dim=1)
        vb = self._vb_terms_bpd(
            model=lambda *args, r=frozen: r, x_start=x_start, x_t=x_t, t=t, clip_denoised=False
        )["output"]  # fmt: skip
        mse = mean_flat((noise - eps) ** 2)
        return {"mse": mse, "vb": vb, "l1": mean_flat((noise - eps).abs()), "loss": mse + vb}


@pytest.mark.parametrize("rescale_timesteps", [False, True])
def test_losses_written_with_the_published_helpers_are_ours(rescale_timesteps):
    options = {"learn_sigma": True, "timestep_respacing": "6", "rescale_timesteps": rescale_timesteps}
    seen = []

    def model(x, t, y):
        seen.append(t)
        return network(x, t, y)

    plain, user = create_gaussian_diffusion(**options), as_subclass(create_gaussian_diffusion(**options), Losses)
    expected, found = (d.training_losses(model, X, T, {"y": T}, noise=X.flip(0)) for d in (plain, user))
    assert torch.equal(seen[0], seen[1]) and seen[0].tolist() == plain.model_timesteps(T).tolist() != T.tolist()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_the_bound_takes_a_model():
    """The loss of a diffusion that trains on the bound, from the same helper."""
    diffusion = create_gaussian_diffusion(learn_sigma=True, timestep_respacing="6", use_kl=True)
    assert diffusion.loss_type is LossType.RESCALED_KL
    loss = diffusion.training_losses(network, X, T, {"y": T}, noise=X.flip(0))["loss"]
    x_t = diffusion.q_sample(X, T, X.flip(0))
    bound = diffusion._vb_terms_bpd(network, X, x_t, T, clip_denoised=False, model_kwargs={"y": T})
    assert torch.equal(loss, 6 * bound["output"])
    assert torch.equal(
        bound["pred_xstart"], diffusion.p_mean_variance(network, x_t, T, False, None, {"y": T})["pred_xstart"]
    )


def test_what_a_model_returns_behind_its_output_is_extra():
    diffusion, features = create_diffusion("6"), torch.ones(3)
    plain = diffusion.p_mean_variance(network, X, T)
    found = diffusion.p_mean_variance(lambda x, t: (network(x, t), features), X, T)
    assert "extra" not in plain and found["extra"] is features
    assert torch.equal(found["mean"], plain["mean"])


# ---------------------------------------------------------------- models

MODEL = {"input_size": 8, "in_channels": 3, "num_classes": 5}


def small(family="MDTv2", **options):
    return fill(create_model(f"{family}_Nano_2", **MODEL, **options)).eval()


def forward(model, *args):
    with torch.no_grad():
        return model(tensor("pixels", (2, 3, 8, 8)), T, torch.tensor([1, 3]), *args)


class OwnMask(MDTv2):
    """The published masking, with tokens chosen otherwise: the first half, in a shuffled order."""

    def random_masking(self, x, mask_ratio):
        num_kept = int(x.shape[1] * (1 - mask_ratio))
        shuffled = torch.arange(num_kept).flip(0).expand(len(x), -1)
        order = torch.cat([shuffled, torch.arange(num_kept, x.shape[1]).expand(len(x), -1)], dim=1)
        ids_keep, ids_restore = order[:, :num_kept], order.argsort(dim=1)
        kept = x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))
        return kept, (ids_restore >= num_kept).to(x.dtype), ids_restore, ids_keep


class OwnInterpolater(MDTv2):
    """The side-interpolater written out with the published arguments."""

    def forward_side_interpolater(self, x, c, mask, ids_restore):
        full = torch.cat([x, self.mask_token.expand(len(x), ids_restore.shape[1] - x.shape[1], -1)], dim=1)
        full = full.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2])) + self.decoder_pos_embed
        mask = mask[:, :, None]
        return mask * self.sideblocks[0](full, c) + (1 - mask) * full


def test_an_overridden_masking_is_used():
    model = as_subclass(small(mask_ratio=0.3), OwnMask)
    torch.manual_seed(0)
    found = forward(model, True)
    torch.manual_seed(0)
    num_kept = int(16 * (1 - model.draw_ratio()))
    torch.testing.assert_close(found, forward(model, False, torch.arange(num_kept).expand(2, -1)))


@pytest.mark.parametrize("family", ["MDTv2", "MDT"])
def test_an_overridden_side_interpolater_is_used(family):
    model = small(family, mask_ratio=0.3)
    expected = seeded(forward, model, True)
    calls = []

    class Counting(OwnInterpolater if family == "MDTv2" else MDT):
        def forward_side_interpolater(self, x, c, mask, ids_restore):
            calls.append(mask)
            if family == "MDT":
                return super().forward_side_interpolater(x, c, mask, ids_restore)
            return OwnInterpolater.forward_side_interpolater(self, x, c, mask, ids_restore)

    torch.testing.assert_close(seeded(forward, as_subclass(model, Counting), True), expected)
    assert len(calls) == 1 and calls[0].sum() == 2 * (16 - seeded(model.draw_kept, 2, "cpu").shape[1])


def test_the_published_pieces_of_a_masked_pass_make_it():
    model = small(mask_ratio=0.3)
    with torch.no_grad():
        patches, c = model.embed(tensor("pixels", (2, 3, 8, 8))), model.condition(T, torch.tensor([1, 3]), None)
        x, mask, ids_restore, ids_keep = model.random_masking(patches, 0.4)
        assert x.shape[1] == 9 and mask.sum(1).tolist() == [7, 7] and ids_keep.shape == (2, 9)
        everything = torch.cat([x, patches[mask.bool()].view(2, 7, -1)], dim=1)
        restored = everything.gather(1, ids_restore[:, :, None].expand(-1, -1, 128))
        assert torch.equal(restored, patches)
        skips = []
        for block in model.en_inblocks:
            x = block(x, c, ids_keep=ids_keep)
            skips.append(x)
        for block in model.en_outblocks:
            x = block(x, c, skip=skips.pop(), ids_keep=ids_keep)
        x = model.forward_side_interpolater(x, c, mask, ids_restore)
        for block in model.de_blocks:
            x = block(x, c, skip=patches)
        torch.testing.assert_close(model.unpatchify(model.final_layer(x, c)), forward(model, False, ids_keep))
        attention = model.sideblocks[0].attn
        bias = attention.get_masked_rel_bias(2, ids_keep)
    assert torch.equal(bias[1, :, 2, 5], attention.rel_pos_bias()[0, :, ids_keep[1, 2], ids_keep[1, 5]])


class Written(nn.Module):
    """Attention written out by a user, with the names that timm's and MDT's have."""

    def __init__(self, like):
        super().__init__()
        self.like = like

    def forward(self, x, ids_keep=None):
        return written_out(self.like, x, ids_keep)


def written_out(self, x, ids_keep=None):
    n, tokens, dim = x.shape
    q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    logits = self.q_norm(q) * self.scale @ self.k_norm(k).transpose(-2, -1)
    if self.rel_pos_bias is not None:
        logits = logits + (self.rel_pos_bias() if ids_keep is None else self.get_masked_rel_bias(n, ids_keep))
    x = self.attn_drop(logits.softmax(dim=-1)) @ v
    return self.proj_drop(self.proj(x.transpose(1, 2).reshape(n, tokens, dim)))


def replaced(block):
    block.attn = Written(block.attn)


def patched(block):
    block.attn.forward = types.MethodType(written_out, block.attn)


@pytest.mark.parametrize("swap", [replaced, patched])
@pytest.mark.parametrize("family", ["DiT", "MDT", "MDTv2"])
def test_an_attention_of_the_users_takes_the_place_of_ours(family, swap):
    model = small(family, **({} if family == "DiT" else {"mask_ratio": 0.3}))
    passes = [()] if family == "DiT" else [(), (True,)]
    expected = [seeded(forward, model, *options) for options in passes]
    for block in model.all_blocks():
        swap(block)
    for options, theirs in zip(passes, expected, strict=True):
        torch.testing.assert_close(seeded(forward, model, *options), theirs, rtol=1e-4, atol=1e-5)


class PlainBlock(DiTBlock):
    """A block of a user, with DiT's arguments."""

    def forward(self, x, c):
        shift, scale, gate, *rest = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift, scale))
        return x + rest[2].unsqueeze(1) * self.mlp(modulate(self.norm2(x), rest[0], rest[1]))


def test_a_block_of_the_users_takes_the_place_of_ours():
    model = small("DiT")
    expected = forward(model)
    for block in model.blocks:
        block.__class__ = PlainBlock
    torch.testing.assert_close(forward(model), expected)


def test_a_patch_embedding_of_more_channels_takes_them():
    model = small("DiT")
    with pytest.raises(UserError, match=r"\(6, 8, 8\), but this model was made for \(3, 8, 8\)"):
        model(torch.zeros(1, 6, 8, 8), T[:1], T[:1])
    model.x_embedder.proj = nn.Conv2d(6, 128, 2, 2)
    assert model(torch.zeros(1, 6, 8, 8), T[:1], T[:1]).shape == (1, 6, 8, 8)  # 3 channels and their variance


def test_an_overridden_timestep_embedding_is_used():
    model = small("DiT")
    before = forward(model)
    model.t_embedder.timestep_embedding = lambda t, dim, max_period=10000: torch.ones(len(t), dim)
    assert not torch.equal(forward(model), before)


def test_words_of_flags_are_numbers():
    model = create_model("MDTv2_Nano_2", mask_ratio="0.3", decode_layer="2", **MODEL)
    assert (model.mask_ratio, model.decode_layer) == (0.3, 2)


def test_dropout_in_attention_is_refused():
    assert Attention(8, 2, True, None, 0.0, 0.0, 16).rel_pos_bias.window_size == (4, 4)
    with pytest.raises(UserError, match=r"no dropout, but got .*attn_drop=0.1"):
        DiTBlock(8, 2, attn_drop=0.1)
