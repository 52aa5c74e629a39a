"""Guidance rules in closed form, the guided denoiser, and the half that is left out."""

import math

import pytest
import torch
from fill import fill

from masked_diffusion import create_model
from masked_diffusion.guidance import RULES, Guidance, GuidedDenoiser, interval_weight, resolve_channels
from masked_diffusion.utils.errors import UserError

T = torch.tensor([999, 750, 500, 250, 0])
X, Y = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(5)


def small_model(seed="", **options):
    options = {"input_size": 8, "in_channels": 3, "num_classes": 10} | options
    return fill(create_model("MDTv2_Nano_2", **options)).eval().requires_grad_(False)


class Counting:
    """A network of one number per row, which counts the rows that it runs."""

    def __init__(self, factor=1.0):
        self.factor, self.rows = factor, []

    def __call__(self, x, t, y):
        self.rows.append(len(x))
        out = self.factor * (y.float() + 1).view(-1, 1, 1, 1) * torch.ones_like(x)
        return torch.cat([out, -out], dim=1)


def test_weights_in_closed_form():
    expected = [1 + 3 * (1 - math.cos(math.pi * (1 - t / 1000) ** 2.0)) / 2 for t in T.tolist()]
    torch.testing.assert_close(Guidance("power-cosine", 4.0, 2.0).weight(T), torch.tensor(expected))
    assert Guidance("constant", 4.0).weight(T).tolist() == [4.0] * 5
    assert Guidance("none", 4.0).weight(T).tolist() == [1.0] * 5
    assert interval_weight(T, 4.0, (250, 750)).tolist() == [1.0, 4.0, 4.0, 4.0, 1.0]
    assert Guidance("interval", 4.0, interval=(250, 750)).weight(T).tolist() == [1.0, 4.0, 4.0, 4.0, 1.0]


def test_guidance_is_the_models_own():
    for options in ({}, {"guided_channels": 2}):
        model, nulls = small_model(), torch.full((5,), 10)
        doubled = model.forward_with_cfg(
            torch.cat([X, X]), torch.cat([T, T]), torch.cat([Y, nulls]), 3.0, 1000, 2.0, **options
        )
        denoise = GuidedDenoiser(model, Guidance("power-cosine", 3.0, 2.0, **options), model.null_label)
        torch.testing.assert_close(denoise(X, T, Y), doubled[:5], rtol=0, atol=0)
    assert torch.equal(GuidedDenoiser(model, Guidance())(X, T, Y), model(X, T, Y))


@pytest.mark.parametrize("name", ["MDTv2_Nano_2", "DiT_Nano_2"])
def test_each_pair_may_have_its_own_scale(name):
    model = fill(create_model(name, input_size=8, in_channels=3, num_classes=10)).eval().requires_grad_(False)
    x, t, y = torch.cat([X, X]), torch.cat([T, T]), torch.cat([Y, torch.full((5,), 10)])
    scales = torch.tensor([1.0, 1.5, 2.0, 4.0, 8.0])
    rows = [model.forward_with_cfg(x, t, y, scale.item())[[i, 5 + i]] for i, scale in enumerate(scales)]
    expected = torch.stack(rows).transpose(0, 1).flatten(0, 1)
    for given in (scales, scales.view(5, 1, 1, 1), torch.cat([scales, -scales])):
        torch.testing.assert_close(model.forward_with_cfg(x, t, y, given), expected, rtol=0, atol=0)
    for one in (scales[3], scales[3:4]):
        assert torch.equal(model.forward_with_cfg(x, t, y, one), model.forward_with_cfg(x, t, y, 4.0))
    with pytest.raises(UserError, match="cfg_scale holds 3 scales: it must hold 1, 5 or 10"):
        model.forward_with_cfg(x, t, y, scales[:3])
    with pytest.raises(UserError, match=r"cfg_scale of the guidance is .*nan.*: it must be finite"):
        model.forward_with_cfg(x, t, y, scales * math.nan)


def test_the_host_does_not_look_at_scales_on_a_device():
    model = small_model().to("meta")  # a tensor there has no values: whoever looks at one gets an error
    x = torch.zeros(4, 3, 8, 8, device="meta")
    t = y = torch.zeros(4, dtype=torch.int64, device="meta")
    for scale in (torch.tensor(4.0), torch.ones(2, dtype=torch.float64), torch.ones(2, 1, 1, 1, device="meta")):
        out = model.forward_with_cfg(x, t, y, scale)
        assert (out.device.type, out.dtype, out.shape) == ("meta", torch.float32, (4, 6, 8, 8))


def test_channels_beyond_the_guided_ones_are_left_alone():
    x = torch.zeros(1, 4, 2, 2)
    for channels, expected in ((3, [19.0] * 3 + [3.0]), ("auto", [19.0] * 3 + [3.0]), (None, [19.0] * 4)):
        denoise = GuidedDenoiser(Counting(), Guidance("constant", -1.0, guided_channels=channels), null_label=10)
        out = denoise(x, T[:1], torch.tensor([2]))[0, :, 0, 0]
        assert out.tolist() == [*expected, -3.0, -3.0, -3.0, -3.0]  # 11 - (3 - 11); the variance is the class's own


def test_all_channels_of_a_large_autoencoder_are_guided():
    assert [resolve_channels("auto", channels) for channels in (3, 4, 16, 32)] == [3, 3, None, None]
    assert [resolve_channels(guided, 16) for guided in (3, None)] == [3, None]
    model = small_model(in_channels=16, num_classes=10)
    x, y = torch.randn(2, 16, 8, 8), torch.tensor([1, 10])
    every, three = (model.forward_with_cfg(x, T[:2], y, 3.0, guided_channels=c) for c in (16, 3))
    assert torch.equal(model.forward_with_cfg(x, T[:2], y, 3.0), every) and not torch.equal(every, three)
    assert torch.equal(every[:, 16:], three[:, 16:])  # the variance is guided by neither
    with pytest.raises(ValueError, match="guided_channels of the guidance is 0: it must be at least 1, all"):
        Guidance("constant", guided_channels=0)


def test_a_weaker_model_guides_with_the_same_classes():
    strong, weak = Counting(), Counting(0.5)
    denoise = GuidedDenoiser(strong, Guidance("constant", 2.0), guide_model=weak)
    assert denoise(X, T, Y)[:, 0, 0, 0].tolist() == [1.5 * (y + 1) for y in range(5)]
    assert strong.rows == weak.rows == [5]


def test_the_guiding_half_is_left_out_where_the_weight_is_one():
    network = Counting()
    for t, rows in ((999, 5), (950, 5), (800, 10), (0, 10)):
        GuidedDenoiser(network, Guidance("power-cosine", 3.8, 4.0), null_label=10)(X, torch.full((5,), t), Y)
        assert network.rows[-1] == rows
    for skip_below, t, rows in ((1e-3, 700, 5), (1e-3, 600, 10), (-1.0, 999, 10)):
        guidance = Guidance("power-cosine", 3.8, 4.0, skip_below=skip_below)
        GuidedDenoiser(network, guidance, null_label=10)(X, torch.full((5,), t), Y)
        assert network.rows[-1] == rows
    GuidedDenoiser(network, Guidance("interval", 3.0, interval=(100, 400)), null_label=10)(X, torch.full((5,), 500), Y)
    assert network.rows[-1] == 5


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"guidance is 'strong': choose one of none, constant"):
        Guidance("strong")
    with pytest.raises(ValueError, match=r"interval \(5, 2\) is empty"):
        Guidance("interval", interval=(5, 2))
    for options in ({"cfg_scale": float("nan")}, {"scale_pow": float("inf")}, {"interval": (0, float("nan"))}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} of the guidance is .*: it must be finite"):
            Guidance("constant", **options)
    with pytest.raises(ValueError, match="guidance needs a null class"):
        GuidedDenoiser(Counting(), Guidance("constant", 2.0))


def test_a_description_names_what_matters():
    assert Guidance("none", 7.0).describe() == {"rule": "none"}
    assert Guidance("interval", 2.0, interval=(1, 5), guided_channels=3).describe() == {
        "rule": "interval", "cfg_scale": 2.0, "interval": [1, 5], "guided_channels": 3, "skip_below": 0.0,
    }  # fmt: skip
    assert [rule for rule in RULES if "scale_pow" in Guidance(rule).describe()] == ["power-cosine"]
