"""The same numbers on a GPU, and the precisions that only a GPU has."""

import json
import warnings

import numpy as np
import pytest
import torch
from fill import fill, tensor
from helpers import ATTENTION_LENGTHS, attend, check_attention, draw_attention, make_loop, tensors, trained

from masked_diffusion import create_diffusion, create_model
from masked_diffusion.guidance import Guidance
from masked_diffusion.latents.autoencoder import IdentityFirstStage
from masked_diffusion.sampling.image_sampler import ImageSampler, choose_labels
from masked_diffusion.sampling.solvers import create_solver
from masked_diffusion.training.objective import TwoPassObjective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = torch.device("cuda")
T, Y = torch.tensor([730, 10]), torch.tensor([3, 999])


@pytest.mark.parametrize("name", ["MDTv2_S_2", "MDT_S_2"])
def test_outputs_and_gradients_are_those_of_the_cpu(name, latents):
    model = fill(create_model(name, input_size=32, mask_ratio=0.3)).eval()
    ids = model.draw_kept(2, "cpu")
    results = {}
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        arguments = [value.to(device) for value in (latents, T, Y)]
        full, masked = model(*arguments), model(*arguments, enable_mask=True, ids_keep=ids.to(device))
        (full.square().mean() + masked.square().mean()).backward()
        norms = torch.stack([p.grad.norm() for p in model.parameters()])
        results[device] = [value.detach().cpu() for value in (full, masked, norms)]
    for ours, theirs in zip(results["cuda"], results["cpu"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_lower_precisions_compute_nearly_the_same_loss(precision, tmp_path):
    losses = {}
    for kind in ("fp32", precision):
        loop = trained(tmp_path / kind, precision=kind, device="cuda", max_steps=20, log_interval=20, save_interval=20)
        rows = (tmp_path / kind / "progress.jsonl").read_text().splitlines()
        losses[kind] = json.loads(rows[-1])["loss"]
        assert {p.dtype for p in loop.state.params} == {torch.float32}
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stopped_run_goes_on(precision, tmp_path):
    options = {"precision": precision, "device": "cuda"}
    trained(tmp_path / "whole", **options)
    trained(tmp_path / "parts", max_steps=2, **options)
    trained(tmp_path / "parts", **options)
    ours, theirs = tensors(tmp_path / "parts", 4), tensors(tmp_path / "whole", 4)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-4, msg=key)


def test_a_step_waits_for_the_device_once(tmp_path):
    loop = make_loop(tmp_path, device="cuda")
    for _ in range(3):
        loop.run_step(*next(loop.data))
    batch, cond = next(loop.data)
    batch, cond = batch.pin_memory(), {"y": cond["y"].pin_memory()}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        loop.run_step(batch, cond)
    torch.cuda.set_sync_debug_mode("default")
    # The guardian's look at loss and gradient norm.
    assert len([w for w in waits if "synchronizing" in str(w.message)]) == 1


@pytest.mark.parametrize("exact", [False, True])
def test_compiled_blocks_compute_the_same(exact, tmp_path):
    model = fill(create_model("MDTv2_Nano_2", input_size=16, in_channels=3, num_classes=10, mask_ratio=0.3)).cuda()
    objective = TwoPassObjective(model, create_diffusion(), kept_multiple=1 if exact else 4).train()
    x, t, y = torch.randn(8, 3, 16, 16).cuda(), torch.arange(8).cuda() * 100, torch.arange(8).cuda()
    draws = [objective.draw(x) for _ in range(12)]
    plain = [objective(x, t, y, **d)["loss"].detach() for d in draws]
    model.compile_blocks(dynamic=exact)
    for d, expected in zip(draws, plain, strict=True):
        losses = objective(x, t, y, **d)["loss"]
        torch.testing.assert_close(losses.detach(), expected, rtol=1e-3, atol=1e-3)
        losses.mean().backward()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_does_not_depend_on_its_batch(precision):
    model = fill(create_model("MDTv2_Nano_2", input_size=8, in_channels=3, num_classes=10)).eval().cuda()
    solver, guidance = create_solver("ddpm", "6", {}), Guidance("power-cosine", 2.0)
    sampler = ImageSampler(model, solver, IdentityFirstStage(), guidance=guidance, seed=4, precision=precision)
    labels = choose_labels(range(6), "random", 10, seed=4)
    whole = sampler(range(6), labels).astype(int)
    parts = np.concatenate([sampler([5, 0], labels[[5, 0]]), sampler([3], labels[[3]])]).astype(int)
    assert np.abs(whole[[5, 0, 3]] - parts).max() <= (1 if precision == "fp32" else 12)


def test_diffusion_tables_follow_the_device(latents):
    diffusion = create_diffusion()
    ours = diffusion.q_sample(latents.cuda(), T.cuda(), tensor("noise", latents.shape).cuda()).cpu()
    torch.testing.assert_close(ours, diffusion.q_sample(latents, T, tensor("noise", latents.shape)))


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [32, 64, 72])
def test_attention_errs_no_more_than_eager_attention(width, dtype):
    for length in ATTENTION_LENGTHS:
        for kept in (False, True):
            check_attention(length, width, kept, dtype, samples=5, heads=3)


@pytest.mark.parametrize("kind", ["sdpa", "triton"])
def test_gradients_of_attention_are_the_same_in_every_run(kind):
    inputs = draw_attention(160, 72, True, torch.bfloat16, samples=8, heads=4)
    first = attend(kind, *inputs)
    for _ in range(3):
        # PyTorch's own backward adds up the gradient of q in any order; the table's is ours in both.
        for ours, theirs in list(zip(attend(kind, *inputs), first, strict=True))[4 if kind == "sdpa" else 0 :]:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_trains_a_model_as_sdpa_does(compiled):
    options = {"input_size": 32, "mask_ratio": 0.3, "depth": 4, "decode_layer": 2}
    model = fill(create_model("MDTv2_S_2", **options)).cuda().train()
    objective = TwoPassObjective(model, create_diffusion(snr_gamma=5.0), "bf16", kept_multiple=16)
    x, t, y = torch.randn(4, 4, 32, 32).cuda(), torch.arange(4).cuda() * 250, torch.arange(4).cuda()
    draws, results = objective.draw(x), {}
    if compiled:
        model.compile_blocks()
    for kind in ("sdpa", "triton"):
        model.set_attention(kind, DEVICE)
        assert model.attention_in_use(DEVICE, torch.bfloat16) == kind
        model.zero_grad()
        loss = objective(x, t, y, **draws)["loss"].mean()
        loss.backward()
        results[kind] = [loss.detach(), *(param.grad.clone() for param in model.parameters() if param.grad is not None)]
    for ours, theirs in zip(results["triton"], results["sdpa"], strict=True):
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()


def test_auto_takes_the_kernel_in_half_precision():
    model = create_model("MDTv2_Nano_2", input_size=8).cuda()
    new_enough = torch.cuda.get_device_capability() >= (8, 0)
    assert model.attention_in_use(DEVICE, torch.bfloat16) == ("triton" if new_enough else "sdpa")
    assert model.attention_in_use(DEVICE, None) == "sdpa"
