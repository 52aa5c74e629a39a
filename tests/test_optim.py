import numpy as np
import pytest
import torch
from fill import tensor

from masked_diffusion import nn
from masked_diffusion.training.optim import annealed_lr, clip_gradients, create_optimizer, update_ema

SHAPES = [(4, 5), (7,), (2, 3, 3)]


@pytest.mark.parametrize("compile", [False, True])
def test_adan_steps_as_the_authors_does(golden, compile):
    vectors = golden("adan")
    params = [torch.nn.Parameter(tensor(f"p{i}", shape)) for i, shape in enumerate(SHAPES)]
    optimizer = create_optimizer("adan", params, lr=3e-3, compile=compile)
    for step in range(6):
        for i, param in enumerate(params):
            param.grad = tensor(f"g{i}/{step}", SHAPES[i])
        norm = torch.nn.utils.get_total_norm([param.grad for param in params])
        optimizer.step(**clip_gradients(optimizer, params, norm, 1.0))
        for i, param in enumerate(params):
            difference = np.abs(param.detach().numpy() - vectors[f"wd0.0/step{step}/p{i}"]).max()
            assert difference < (1e-6 if compile else 1e-7), (step, i, difference)


@pytest.mark.parametrize("name", ["adan", "adan-pytorch", "adamw"])
def test_every_optimizer_minimises(name):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = create_optimizer(name, [param], lr=0.1, weight_decay=0.0)
    for _ in range(300):
        optimizer.zero_grad()
        (param - 1).square().sum().backward()
        optimizer.step()
    assert (param - 1).abs().max() < 0.15


def test_both_adans_agree_after_the_first_step():
    params = [torch.nn.Parameter(tensor("p0", (4, 5))) for _ in range(2)]
    ours, theirs = (create_optimizer(n, [p], lr=1e-3) for n, p in zip(("adan", "adan-pytorch"), params, strict=True))
    moves = []
    for step in range(60):
        before = [p.detach().clone() for p in params]
        for param, optimizer in zip(params, (ours, theirs), strict=True):
            param.grad = tensor("g", (4, 5)) + 0.1 * tensor(f"g{step}", (4, 5))
            optimizer.step()
        moves.append([p.detach() - b for p, b in zip(params, before, strict=True)])
    cosine = torch.nn.functional.cosine_similarity(*(m.flatten() for m in moves[-1]), dim=0)
    assert cosine > 0.9


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="optimizer is 'sgd': choose one of adan"):
        create_optimizer("sgd", [], lr=1.0)


def test_ema_is_the_weighted_sum():
    source = [torch.nn.Parameter(tensor(f"s{i}", shape)) for i, shape in enumerate(SHAPES)]
    target = [tensor(f"t{i}", shape) for i, shape in enumerate(SHAPES)]
    expected = [0.9 * t + 0.1 * s.detach() for t, s in zip(target, source, strict=True)]
    update_ema(target, source, rate=0.9)
    for t, e in zip(target, expected, strict=True):
        torch.testing.assert_close(t, e)


def test_published_ema_takes_other_formats_and_lengths():
    source = [torch.nn.Parameter(tensor(f"s{i}", shape).bfloat16()) for i, shape in enumerate(SHAPES)]
    target = [torch.nn.Parameter(tensor(f"t{i}", shape)) for i, shape in enumerate(SHAPES[:2])]
    expected = [0.9 * t.detach() + 0.1 * s.detach().float() for t, s in zip(target, source, strict=False)]
    nn.update_ema(iter(target), iter(source), rate=0.9)
    for t, e in zip(target, expected, strict=True):
        torch.testing.assert_close(t.detach(), e)
    nn.update_ema([], source)
    # Of equal formats, bitwise what training computes.
    ours, theirs = ([tensor("t", (4, 5))] for _ in range(2))
    nn.update_ema(ours, [tensor("s", (4, 5))], rate=0.9)
    update_ema(theirs, [tensor("s", (4, 5))], rate=0.9)
    assert torch.equal(ours[0], theirs[0])


def test_annealing_is_a_line_to_zero():
    assert [annealed_lr(2.0, step, 4) for step in (0, 1, 4, 9)] == [2.0, 1.5, 0.0, 0.0]
    assert annealed_lr(2.0, 10**9, 0) == 2.0
