"""QK-norm: what attention computes with it, in every implementation, and how weights with it are recognised."""

import pytest
import torch
from fill import fill, tensor

from masked_diffusion import create_model, load_model
from masked_diffusion.layers.attention import Attention
from masked_diffusion.layers.blocks import MDTBlock
from masked_diffusion.layers.relative_attention import look_up_kept
from masked_diffusion.training.finetune import load_pretrained
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.precision import autocast

X, T, Y = tensor("pixels", (2, 3, 8, 8)), torch.tensor([3, 300]), torch.tensor([0, 1])
IDS = torch.tensor([[0, 1, 2, 5, 6, 7, 9, 12, 14], [1, 2, 3, 4, 8, 10, 11, 13, 15]])
NORMS = ("q_norm.weight", "k_norm.weight")


def make(name="MDTv2_Nano_2", **options):
    options = {"input_size": 8, "in_channels": 3, "num_classes": 10, "qk_norm": True} | options
    return fill(create_model(name, **options)).eval()


def test_attention_is_that_of_normalized_queries_and_keys():
    attention = fill(Attention(16, 2, qkv_bias=True, num_patches=16, qk_norm=True))
    x = torch.randn(3, 16, 16)
    q, k, v = attention.qkv(x).view(3, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = (
        z * (z.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
        for z, norm in ((q, attention.q_norm), (k, attention.k_norm))
    )
    out = (q @ k.mT / 8**0.5 + attention.rel_pos_bias()).softmax(-1) @ v
    expected = attention.proj(out.transpose(1, 2).reshape(3, 16, 16))
    torch.testing.assert_close(attention(x), expected)
    assert not torch.allclose(attention.q_norm.weight, torch.ones(8))


def outputs_and_gradients(module, *inputs):
    out = module(*inputs)
    module.zero_grad()
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in module.parameters())]


def test_both_implementations_compute_the_same():
    attention, found = fill(Attention(16, 2, qkv_bias=True, num_patches=16, qk_norm=True)), {}
    x = torch.randn(2, 9, 16)
    for kind in ("sdpa", "triton"):
        attention.implementation = kind
        found[kind] = outputs_and_gradients(
            attention, x, look_up_kept(IDS, attention.rel_pos_bias.relative_position_index)
        )
    assert len(found["sdpa"]) == 8
    for ours, theirs in zip(found["triton"], found["sdpa"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mixed_precision_computes_nearly_the_same():
    model = make()
    torch.testing.assert_close(autocast(model, "bf16")(X, T, Y).float(), model(X, T, Y), rtol=0.05, atol=0.05)


def test_a_compiled_block_is_one_graph():
    block, x, c = fill(MDTBlock(16, 2, num_patches=16, qk_norm=True)), torch.randn(2, 16, 16), torch.randn(2, 16)
    expected = outputs_and_gradients(block, x, c)
    block.compile(fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(outputs_and_gradients(block, x, c), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, options", [
    ("MDTv2_Nano_2", {}), ("MDT_Nano_2", {}), ("DiT_Nano_2", {}), ("DiT_Nano_2", {"num_heads": 8, "depth": 3}),
])  # fmt: skip
def test_weights_tell_that_they_have_it(name, options, tmp_path, capsys):
    model, without = make(name, **options), make(name, **options, qk_norm=False)
    added = {key for key in model.state_dict() if key.endswith(NORMS)}
    assert without.state_dict().keys() == model.state_dict().keys() - added and len(added) == 2 * len(
        model.all_blocks()
    )
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = load_model(tmp_path / "weights.pt")
    assert (type(again), again.qk_norm, again.num_heads) == (type(model), True, model.num_heads)
    assert "with QK-norm" in capsys.readouterr().out
    assert torch.equal(again(X, T, Y), model(X, T, Y))
    model.save_pretrained(tmp_path / "folder")
    assert torch.equal(load_model(tmp_path / "folder")(X, T, Y), model(X, T, Y))


def test_fine_tuning_neither_adds_nor_drops_it(tmp_path):
    torch.save(make().state_dict(), tmp_path / "with.pt")
    torch.save(make(qk_norm=False).state_dict(), tmp_path / "without.pt")
    load_pretrained(make(num_classes=4), tmp_path / "with.pt")
    for source, model, verb in (("without", make(), "lacks"), ("with", make(qk_norm=False), "has")):
        with pytest.raises(UserError, match=rf"{verb} .*_norm.weight.*--qk_norm that it was trained with"):
            load_pretrained(model, tmp_path / f"{source}.pt")
