"""The closed form of FLOP against PyTorch's counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from masked_diffusion import create_model
from masked_diffusion.utils.flops import (
    attention_flops,
    attention_values,
    block_inputs,
    elementwise_values,
    forward_flops,
    training_flops,
)


def counted(model, num_kept=None):
    """FLOP of a forward pass of one image on the meta device, with attention in its two matrix products."""
    with torch.device("meta"):
        x, t = torch.empty(1, model.in_channels, model.input_size, model.input_size), torch.zeros(1, dtype=torch.long)
        masked = {"enable_mask": True, "ids_keep": torch.zeros(1, num_kept, dtype=torch.long)} if num_kept else {}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x, t, t, **masked)
    return counter.get_total_flops()


def meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options).eval()


@pytest.mark.parametrize("name", ["DiT_S_2", "DiT_Nano_4", "MDT_S_2", "MDTv2_S_2", "MDTv2_XL_2"])
def test_a_full_pass_has_the_counted_flops(name):
    model = meta(name)
    assert forward_flops(model) == counted(model)


@pytest.mark.parametrize(
    "name, options",
    [("MDT_Nano_2", {}), ("MDT_S_2", {"decode_layer": 4}), ("MDTv2_S_2", {"decode_layer": 6}), ("MDTv2_XL_2", {})],
)
@pytest.mark.parametrize("num_kept", [1, 160])
def test_a_masked_pass_has_the_counted_flops(name, options, num_kept):
    model = meta(name, mask_ratio=0.3, **options)
    assert forward_flops(model, num_kept) == counted(model, num_kept)


def test_masking_saves_encoder_work_and_adds_the_side_block():
    model = meta("MDTv2_S_2", mask_ratio=0.3)
    assert forward_flops(model, 128) < forward_flops(model) < forward_flops(model, 255)


def test_a_training_step_is_three_forward_passes_of_every_pass():
    assert training_flops(meta("DiT_Nano_2")) == 3 * forward_flops(meta("DiT_Nano_2"))
    first = meta("MDT_Nano_2", mask_ratio=0.3)  # 256 tokens, of which int(256 * 0.7) are kept
    assert training_flops(first) == 3 * (forward_flops(first) + forward_flops(first, 179))
    second = meta("MDTv2_Nano_2", mask_ratio=0.3)  # keeps 128 to 179, each equally often
    masked = sum(forward_flops(second, kept) for kept in range(128, 180)) / 52
    assert training_flops(second) == pytest.approx(3 * (forward_flops(second) + masked), rel=1e-3)


def test_sizes_follow_the_paper():
    # DiT's paper counts 118.6 billion multiply-adds for DiT-XL/2 at 256.
    assert forward_flops(meta("DiT_XL_2")) / 2e9 == pytest.approx(118.6, rel=0.005)


def test_the_blocks_that_a_pass_runs():
    model = meta(
        "MDTv2_Nano_2", input_size=8, mask_ratio=0.3
    )  # one block in, one out with a skip, two decoders, a side
    assert block_inputs(model) == [(16, False), (16, True), (16, True), (16, True)]
    assert block_inputs(model, 9) == [(9, False), (9, True), (16, True), (16, True), (16, False)]
    assert attention_flops(model, 9) == 4 * 128 * (2 * 9**2 + 3 * 16**2)
    assert attention_values(model, 9) == 4 * 128 * (2 * 9 + 3 * 16)
    assert elementwise_values(model, 9) == 128 * (17 * 9 + 21 * 9 + 2 * 21 * 16 + 17 * 16)
