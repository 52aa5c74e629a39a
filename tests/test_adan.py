"""Our Adan against timm's, compiled and as a kernel, and what it does beside its step."""

import pytest
import torch
from fill import tensor
from timm.optim import Adan as TimmAdan
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from masked_diffusion.training import adan
from masked_diffusion.training.adan import STATE, Adan
from masked_diffusion.training.optim import clip_gradients, create_optimizer

SHAPES = [(300, 5), (7,), (2, 3, 3), (0,)]
OPTIONS = {"lr": 3e-3, "betas": (0.98, 0.92, 0.99), "eps": 1e-8}


def parameters():
    return [torch.nn.Parameter(tensor(f"p{i}", shape)) for i, shape in enumerate(SHAPES)]


def give_gradients(params, step):
    for i, param in enumerate(params):
        param.grad = tensor(f"g{i}/{step}", param.shape)
        param.grad.view(-1)[::3] = 0  # as in the rows of classes that are not in a batch


def bits(tensors):
    return [t.detach().contiguous().view(torch.int32).tolist() for t in tensors]


def run_both(ours, options=None, steps=5, rate=0.9):
    """Clipped steps of timm's Adan, then of ours, each with an average: [parameters, averages, optimizer] of both."""
    options = options or {}
    results, shared = [], {key: value for key, value in options.items() if key != "compile"}
    for cls in (TimmAdan, ours):
        params = parameters()
        average, optimizer = (
            [p.detach().clone() for p in params],
            cls(params, **OPTIONS, **(options if cls is ours else shared)),
        )
        for step in range(steps):
            give_gradients(params, step)
            if cls is TimmAdan:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()
                torch._foreach_lerp_(average, [p.detach() for p in params], 1 - rate)
            else:
                norm = torch.nn.utils.get_total_norm([p.grad for p in params])
                optimizer.step(**clip_gradients(optimizer, params, norm, 1.0), averages=[(average, rate)])
        results.append([params, average, optimizer])
    return results


def states(params, optimizer):
    return [optimizer.state[param][key] for param in params for key in STATE]


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("piece", [4, 1 << 18])
def test_every_bit_is_timms(weight_decay, piece, monkeypatch):
    monkeypatch.setitem(adan.PIECE, "cpu", piece)
    (params, average, optimizer), (ours, our_average, our_optimizer) = run_both(Adan, {"weight_decay": weight_decay})
    assert bits(ours) == bits(params) and bits(our_average) == bits(average)
    assert bits(states(ours, our_optimizer)) == bits(states(params, optimizer))


def test_each_class_goes_on_from_the_others_state():
    (params, _, optimizer), (ours, _, our_optimizer) = run_both(Adan)
    group, our_group = (o.state_dict()["param_groups"][0] for o in (optimizer, our_optimizer))
    assert group == our_group
    swapped, our_swapped = Adan(params, **OPTIONS), TimmAdan(ours, **OPTIONS)
    swapped.load_state_dict(optimizer.state_dict())
    our_swapped.load_state_dict(our_optimizer.state_dict())
    for both in ((params, swapped), (ours, our_swapped)):
        give_gradients(both[0], 9)
        both[1].step()
    assert bits(params) == bits(ours) and swapped.param_groups[0]["step"] == 6


def test_the_compiled_step_rounds_in_the_last_bit_and_compiles_once():
    adan._compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (params, average, optimizer), (ours, our_average, our_optimizer) = run_both(Adan, {"compile": True})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for all sizes, steps and learning rates
    for theirs, mine in zip(
        params + average + states(params, optimizer), ours + our_average + states(ours, our_optimizer), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("kind", ["compiled", "kernel"])
def test_what_cannot_be_compiled_falls_back(kind, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nwas found")

    if kind == "compiled":
        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fail)
        adan._compiled.cache_clear()
        (params, *_), (ours, *_) = run_both(Adan, {"compile": True})
        assert bits(ours) == bits(params)
        adan._compiled.cache_clear()
    else:
        monkeypatch.setattr(adan, "_trial", fail)
        assert adan._kernel.__wrapped__(torch.device("cpu")) is None
    assert capsys.readouterr().out.count("takes several passes over memory: no C++ compiler\n") == 1


def test_the_kernel_computes_the_same():
    """In Triton's interpreter, which must be chosen before Triton is imported: in a process of its own."""
    import os
    import subprocess
    import sys

    code = "import test_adan; test_adan.check_kernel('cpu')"  # tests/ is on the path below
    pytest.importorskip("triton")
    paths = os.pathsep.join([os.path.dirname(__file__), os.path.join(os.path.dirname(__file__), "data"), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr


def check_kernel(device):
    from masked_diffusion.training.adan_kernel import update_all

    for weights, weight_decay in (([], 0.0), ([0.1, 0.3], 0.02)):
        group = {**OPTIONS, "weight_decay": weight_decay, "step": 3}
        rows = [[tensor(f"{i}/{j}", s) ** 2 for j in range(6 + len(weights))] for i, s in enumerate(SHAPES)]
        mine = [[t.clone().to(device) for t in row] for row in rows]
        factor = torch.tensor(0.5)
        update_all(mine, adan._settings(group), factor.to(device), weights)
        adan.adan_update(
            *[list(column) for column in list(zip(*rows, strict=True))[:6]],
            [list(column) for column in list(zip(*rows, strict=True))[6:]],
            factor, weights, **adan._settings(group),
        )  # fmt: skip
        for row, expected in zip(mine, rows, strict=True):
            del row[1], expected[1]  # the gradients
            for ours, theirs in zip(row, expected, strict=True):
                torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=2e-7)


def test_tensors_that_are_not_contiguous_come_whole():
    results = []
    for cls in (TimmAdan, Adan):
        param = torch.nn.Parameter(tensor("p", (4, 6)).t())
        optimizer = cls([param], **OPTIONS)
        for step in range(3):
            param.grad = tensor(f"g{step}", (6, 4))
            optimizer.step()
        results.append(param)
    assert not results[1].is_contiguous() and bits(results[:1]) == bits(results[1:])


def test_a_weight_without_gradient_stays_and_its_average_follows():
    params = parameters()[:2]
    average = [torch.zeros_like(p) for p in params]
    before = params[1].detach().clone()
    params[0].grad = tensor("g", SHAPES[0])
    optimizer = create_optimizer("adan", params, lr=1e-3)
    optimizer.step(averages=[(average, 0.75)])
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    torch.testing.assert_close(average[1], 0.25 * before)
    torch.testing.assert_close(average[0], 0.25 * params[0].detach())
    assert create_optimizer("adan", params, lr=1e-3).step(lambda: 7) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_computes_the_same_on_a_gpu():
    assert adan._kernel(torch.device("cuda")) is not None
    check_kernel("cuda")


def test_shards_of_fsdp_are_updated_in_place():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        (params, average, _), _ = run_both(Adan, steps=3)
        full = parameters()
        sharded = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in full]
        our_average = [p.detach().clone() for p in sharded]
        optimizer = Adan(sharded, **OPTIONS)
        for step in range(3):
            give_gradients(full, step)
            for param, whole in zip(sharded, full, strict=True):
                param.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
            norm = torch.nn.utils.get_total_norm([p.grad for p in sharded]).full_tensor()
            optimizer.step(**clip_gradients(optimizer, sharded, norm, 1.0), averages=[(our_average, 0.9)])
        assert all(isinstance(value, DTensor) for value in states(sharded, optimizer))
        for ours, theirs in zip(sharded + our_average, params + average, strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-6, atol=1e-7)
    finally:
        torch.distributed.destroy_process_group()
