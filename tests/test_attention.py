"""Attention with a relative position bias: both implementations, the gradient of the table, the bias made once.

Where there is no GPU the kernel runs in Triton's interpreter; see conftest.py.
"""

import copy
import time
from unittest import mock

import pytest
import torch
from fill import fill, tensor
from helpers import ATTENTION_LENGTHS, DEVICE, attend, check_attention, draw_attention, small_model

from masked_diffusion import create_model
from masked_diffusion.layers import cpu_attention
from masked_diffusion.layers import relative_attention as ra
from masked_diffusion.layers.attention import Attention, RelativePositionBias
from masked_diffusion.layers.blocks import DiTBlock
from masked_diffusion.layers.cpu_attention import BiasedAttention
from masked_diffusion.layers.relative_attention import (
    PairBias,
    check_implementation,
    fold_pairs,
    gather_pairs,
    look_up_kept,
    relative_attention,
    relative_position_index,
    runs_kernel,
    sum_samples,
    table_gradient,
)
from masked_diffusion.training.parallel import gather_full

pytest.importorskip("triton")
from masked_diffusion.layers import triton_attention

T, Y = torch.tensor([730, 10]), torch.tensor([3, 9])


@pytest.mark.parametrize(
    "length, width, kept, dtype",
    [
        (1, 32, False, torch.float16),
        (17, 72, True, torch.float16),
        (17, 64, False, torch.float32),
        (144, 72, False, torch.float32),
        (160, 8, False, torch.float16),
    ],
)
def test_errors_are_those_of_eager_attention(length, width, kept, dtype):
    check_attention(length, width, kept, dtype, samples=1, heads=1 if kept else 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("width", [32, 64, 72])
def test_errors_are_those_of_eager_attention_at_every_length(width, kept, dtype):
    for length in ATTENTION_LENGTHS:
        check_attention(length, width, kept, dtype, samples=2 if length < 128 else 1, heads=1)


@pytest.fixture
def bf16_cpu(monkeypatch):
    """A processor with instructions for bf16, or one that is taken for such."""
    monkeypatch.setattr(ra, "cpu_has_bf16", lambda: True)


@pytest.mark.skipif(DEVICE != "cpu", reason="for a CPU")
@pytest.mark.parametrize("length, width, kept", [(1, 32, False), (17, 72, True), (144, 64, True), (256, 72, False)])
def test_bf16_on_a_cpu_errs_no_more_than_eager_attention(length, width, kept, bf16_cpu, monkeypatch):
    calls = []
    monkeypatch.setattr(BiasedAttention, "forward", staticmethod(counted(BiasedAttention.forward, calls)))
    check_attention(length, width, kept, torch.bfloat16, kinds=["auto"], samples=3)
    assert len(calls) == 1


def counted(function, calls):
    return lambda *args: calls.append(1) or function(*args)


def test_the_kernel_reads_any_grid_any_order_and_any_strides():
    qkv, table, positions, grid, grad_out = draw_attention(11, 24, True, grid=(3, 5), samples=5)
    positions = positions.flip(1).t().contiguous().t()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    whole = relative_attention(q, k, v, table, positions, grid, "triton")
    torch.testing.assert_close(relative_attention(q, k, v, table, positions, grid, "sdpa"), whole)
    strided = v.transpose(2, 3).contiguous().transpose(2, 3)  # no unit stride
    other = relative_attention(q.contiguous(), k, strided, table, positions, grid, "triton")
    torch.testing.assert_close(other, whole, rtol=0, atol=0)
    assert whole.transpose(1, 2).is_contiguous()  # heads join without a copy
    kernel, other = (attend(kind, qkv, table, positions, grid, grad_out) for kind in ("triton", "sdpa"))
    for ours, theirs in zip(kernel, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_kernels_gradients_are_the_same_in_every_run():
    inputs = draw_attention(9, 16, True, torch.float16, grid=(4, 4), samples=3)
    for ours, again in zip(attend("triton", *inputs), attend("triton", *inputs), strict=True):
        assert torch.equal(ours, again)


def test_a_frozen_table_costs_no_gradient():
    qkv, table, positions, grid, grad_out = draw_attention(5, 16, True, grid=(3, 3))
    q, k, v = (part.detach().requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4))
    with mock.patch.object(triton_attention, "sum_samples_kernel", None):
        relative_attention(q, k, v, table, positions, grid, "triton").backward(grad_out)
    assert q.grad is not None and table.grad is None


# ---------------------------------------------------------------- the table's gradient


def embedding_gradient(grad, rows, num_rows):
    return torch.ops.aten.embedding_dense_backward(grad.permute(0, 2, 3, 1), rows, num_rows, -1, False)


@pytest.fixture
def one_thread():
    """Threads that wait for one another on a busy machine measure the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("grid", [(16, 16), (3, 5), (1, 1)])
@pytest.mark.parametrize("kept", [False, True])
def test_the_tables_gradient_is_that_of_an_embedding(grid, kept):
    height, width = grid
    index, tokens = relative_position_index(height, width), height * width
    positions = torch.rand(3, tokens).argsort(1)[:, : (tokens + 1) // 2]
    places = look_up_kept(positions, index)
    rows, slots = (places.rows, places.slots) if kept else (index[None], None)
    grad, num_rows = torch.randn(len(rows), 4, *rows.shape[1:]), int(index.max()) + 4
    ours = table_gradient(grad, rows, slots, num_rows, height, width)
    assert torch.equal(
        ours, embedding_gradient(grad, rows, num_rows)
    )  # to the last bit: training runs stay what they were
    summed = fold_pairs(sum_samples(grad, slots) if kept else grad[0], height, width).t()  # as on a GPU
    torch.testing.assert_close(summed, ours[:-3], rtol=1e-5, atol=1e-5)
    assert not ours[-3:].any()


def test_the_tables_gradient_is_much_quicker_than_an_embeddings(one_thread):
    index = relative_position_index(16, 16)
    places = look_up_kept(torch.rand(8, 256).argsort(1)[:, :160].sort(1).values, index)
    grad = torch.randn(8, 6, 160, 160)
    seconds = {embedding_gradient: [], table_gradient: []}
    for _ in range(7):
        for compute, arguments in (
            (embedding_gradient, (grad, places.rows, 964)),
            (table_gradient, (grad, places.rows, places.slots, 964, 16, 16)),
        ):
            start = time.perf_counter()
            compute(*arguments)
            seconds[compute].append(time.perf_counter() - start)
    old, new = (min(values) for values in seconds.values())
    assert old > 7 * new, f"{old * 1e3:.2f} ms against {new * 1e3:.2f}"


def test_positions_are_looked_up_once_in_a_forward_pass():
    model = small_model(mask_ratio=0.3).train()
    with mock.patch.object(ra, "gather_pairs", wraps=gather_pairs) as gather:
        model(tensor("pixels", (2, 3, 8, 8)), T, Y, enable_mask=True).sum().backward()
    assert gather.call_count == 1


# ---------------------------------------------------------------- whole models


def outputs_and_gradients(model, x, ids):
    model.zero_grad()
    full, masked = model(x, T.to(DEVICE), Y.to(DEVICE)), model(x, T.to(DEVICE), Y.to(DEVICE), True, ids)
    (full.square().mean() + masked.square().mean()).backward()
    return full, masked, *(param.grad for param in model.parameters())


def test_a_model_computes_the_same_with_either_implementation():
    model = small_model(mask_ratio=0.3, depth=3, decode_layer=1, num_heads=2).to(DEVICE)
    x, ids = tensor("pixels", (2, 3, 8, 8)).to(DEVICE), model.draw_kept(2, DEVICE)
    expected = outputs_and_gradients(model, x, ids)
    assert model.attention_in_use(torch.device(DEVICE), None) == "sdpa"
    model.set_attention("triton", torch.device(DEVICE))
    assert model.attention_in_use(torch.device(DEVICE), None) == "triton"
    model.enable_grad_checkpoint()
    with mock.patch.object(ra, "gather_pairs", None):  # which only the other implementation needs
        ours = outputs_and_gradients(model, x, ids)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x, T.to(DEVICE), Y.to(DEVICE)), expected[0], rtol=1e-4, atol=1e-5)


def test_positions_and_what_was_looked_up_for_them_compute_the_same():
    torch.manual_seed(0)
    attention = Attention(16, 2, num_patches=16)
    torch.nn.init.normal_(attention.rel_pos_bias.relative_position_bias_table)
    x, ids, index = torch.randn(2, 5, 16), torch.rand(2, 16).argsort(1)[:, :5], relative_position_index(4, 4)
    results = []
    for kept in (ids, look_up_kept(ids, index), look_up_kept(ids, index, rows_too=False)):
        attention.zero_grad()
        out = attention(x, kept)
        out.square().sum().backward()
        results.append([out, *(param.grad for param in attention.parameters() if param.grad is not None)])
    for ours in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, results[0], strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="the process group is one of CPUs")
@pytest.mark.parametrize("kind", ["sdpa", "triton"])
def test_sharded_weights_compute_the_same(kind, tmp_path):
    block, x, c = fill(DiTBlock(32, 2, num_patches=16)), torch.randn(2, 7, 32), torch.randn(2, 32)
    places = look_up_kept(torch.rand(2, 16).argsort(1)[:, :7], block.attn.rel_pos_bias.relative_position_index)
    sharded = copy.deepcopy(block)
    sharded.attn.implementation = kind
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        for each in (block, sharded):
            each(x, c, ids_keep=places).square().mean().backward()
        for ours, theirs in zip(sharded.parameters(), block.parameters(), strict=True):
            torch.testing.assert_close(gather_full(ours.grad), theirs.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            whole = torch.randn(2, 16, 32)
            torch.testing.assert_close(sharded.eval()(whole, c), block.eval()(whole, c))
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("kind, dtype", [("sdpa", torch.float32), ("triton", torch.float32), ("auto", torch.bfloat16)])
@pytest.mark.parametrize("kept", [False, True])
def test_a_compiled_block_is_one_graph(kind, dtype, kept, bf16_cpu):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = fill(DiTBlock(32, 2, num_patches=16)).to(DEVICE, dtype)
    block.attn.implementation = kind
    x, c = torch.randn(2, 7 if kept else 16, 32).to(DEVICE, dtype), torch.randn(2, 32).to(DEVICE, dtype)
    ids = torch.rand(2, 16).argsort(1)[:, :7].to(DEVICE)
    places = look_up_kept(ids, block.attn.rel_pos_bias.relative_position_index, kind != "triton") if kept else None

    def run(block):
        block.zero_grad()
        out = block(x, c, ids_keep=places)
        out.square().mean().backward()
        return [out, *(param.grad for param in block.parameters())]

    expected = [value.clone() for value in run(block)]
    block.compile(fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(block), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-6)


def test_the_operators_keep_the_rules_of_torch_library():
    qkv, table, positions, grid, grad_out = draw_attention(5, 16, True, grid=(3, 3), samples=1, heads=1)
    q, k, v = (part.detach().requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4))
    index = relative_position_index(*grid).to(DEVICE)
    places = look_up_kept(positions, index)
    arguments = (q, k, v, table.requires_grad_(), places.positions, places.slots, *grid)
    torch.library.opcheck(triton_attention._forward, arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    *tensors, height, width = detached
    outputs = [value.detach() for value in triton_attention._forward(*detached)]
    checks = ("test_schema", "test_faketensor")
    for table_too in (False, True):
        torch.library.opcheck(
            triton_attention._backward, (grad_out, *tensors, *outputs, height, width, table_too), test_utils=checks
        )
    for num_biases in (1, 2):
        q, k, v = torch.randn(3, 2, 2, 5, 16)
        bias = torch.randn(num_biases, 2, 5, 5)
        torch.library.opcheck(cpu_attention.attend, (q, k, v, bias), test_utils=checks)
        weights = cpu_attention.attend(q, k, v, bias)[1]
        arguments = (torch.randn_like(q), q, k, v, weights, num_biases, torch.float32)
        torch.library.opcheck(cpu_attention.attend_backward, arguments, test_utils=checks)
    grad = torch.randn(1, 2, 5, 5).to(DEVICE)
    torch.library.opcheck(table_gradient, (grad, places.rows, places.slots, 28, 3, 3), test_utils=checks)


# ---------------------------------------------------------------- the bias, made once


def fresh(model):
    """The outputs of a model with the same weights that never ran."""
    other = small_model()
    other.load_state_dict(model.state_dict())
    return other.to(next(model.parameters()).dtype)


def test_the_bias_is_made_once_for_the_weights():
    model, x = small_model(), tensor("pixels", (2, 3, 8, 8))
    layers = len(model.all_blocks()) - 1  # the side block does not run
    with mock.patch.object(PairBias, "apply", wraps=PairBias.apply) as look_up:
        with torch.no_grad():
            outputs = [model(x, T, Y) for _ in range(3)]
        assert look_up.call_count == layers
        assert torch.equal(outputs[0], outputs[2])
        torch.testing.assert_close(model(x, T, Y), outputs[0])  # with gradients
        assert look_up.call_count == 2 * layers
        with torch.no_grad():
            model(x, T, Y)
            assert look_up.call_count == 2 * layers  # kept meanwhile
            with torch.autocast("cpu", torch.bfloat16):
                model(x, T, Y)
            assert look_up.call_count == 3 * layers


def table_of(model):
    return model.en_inblocks[0].attn.rel_pos_bias.relative_position_bias_table


def replace_data(model):
    table_of(model).data = table_of(model).data + 1


def replace_parameter(model):
    state = {key: value * 1.1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def train_once(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
    model(tensor("pixels", (2, 3, 8, 8)), T, Y).square().sum().backward()
    optimizer.step()


def double(model):
    state = {key: value * 2 for key, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict(state, strict=False)


@torch.no_grad()
def swap(model):
    for param in model.parameters():
        param.copy_(param * 1.1)


CHANGES = {
    "in place": lambda model: torch.nn.init.ones_(table_of(model)),
    "behind autograd's back": lambda model: table_of(model).data.copy_(table_of(model).data + 1),
    "other data": replace_data,
    "other parameters": replace_parameter,
    "load_state_dict": double,
    "an optimizer's step": train_once,
    "EMA weights swapped in": swap,
    "another dtype": lambda model: model.bfloat16().float(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_no_bias_of_old_weights_is_used(change):
    model, x = small_model(), tensor("pixels", (2, 3, 8, 8))
    with torch.no_grad():
        before = model(x, T, Y)
    CHANGES[change](model)
    with torch.no_grad():
        after = model(x, T, Y)
        assert not torch.equal(after, before)
        assert torch.equal(after, fresh(model)(x, T, Y))


def test_a_copy_of_a_model_makes_its_own_bias():
    model, x = small_model(), tensor("pixels", (2, 3, 8, 8))
    with torch.no_grad():
        before = model(x, T, Y)
        other = copy.deepcopy(model)
        assert all(block.attn.rel_pos_bias.made is None for block in other.all_blocks())
        swap(other)
        assert torch.equal(other(x, T, Y), fresh(other)(x, T, Y)) and torch.equal(model(x, T, Y), before)


def test_compiled_blocks_see_changed_weights():
    torch._dynamo.reset()
    model, x = small_model(), tensor("pixels", (2, 3, 8, 8))
    for block in model.all_blocks():
        block.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        model(x, T, Y)
        torch._dynamo.utils.counters.clear()
        swap(model)
        torch.testing.assert_close(model(x, T, Y), fresh(model)(x, T, Y))
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]  # and nothing is compiled again


def test_no_bias_is_kept_in_training_or_on_other_devices():
    bias = RelativePositionBias((2, 2), 1)
    assert bias.dense(torch.float32) is not None and bias.made is not None
    attention, x = Attention(8, 1, num_patches=4).eval(), torch.randn(1, 4, 8)
    with torch.no_grad():
        assert attention.dense_bias(x) is not None
    assert attention.dense_bias(x) is None and attention.rel_pos_bias.made is not None
    assert attention.train().dense_bias(x) is None and attention.rel_pos_bias.made is None
    with torch.device("meta"):
        assert RelativePositionBias((2, 2), 1).dense(torch.float32) is None  # elsewhere than on a CPU


# ---------------------------------------------------------------- which implementation runs


def test_auto_takes_the_kernel_on_a_gpu_in_half_precision(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(ra, "gpu_has_kernel", lambda: True)
    assert runs_kernel("auto", gpu, torch.bfloat16, 72) and runs_kernel("auto", gpu, torch.float16, 64)
    assert not runs_kernel("auto", gpu, torch.float32, 64) and not runs_kernel("auto", cpu, torch.bfloat16, 64)
    assert not runs_kernel("auto", gpu, torch.bfloat16, 144) and not runs_kernel("sdpa", gpu, torch.bfloat16, 64)
    monkeypatch.setattr(ra, "gpu_has_kernel", lambda: False)
    assert not runs_kernel("auto", gpu, torch.bfloat16, 72)


def test_the_compiler_takes_what_the_machine_has_for_constants():
    def marked(): ...

    torch.compiler.assume_constant_result(marked)
    assert vars(marked) and vars(ra.gpu_has_kernel) == vars(marked) == vars(ra.cpu_multiplies_bf16)


def test_auto_takes_products_in_bf16_on_a_cpu_with_instructions_for_it(monkeypatch):
    model, cpu, bf16 = create_model("MDTv2_Nano_2", input_size=8), torch.device("cpu"), torch.bfloat16
    for has, expected in ((True, "cpu"), (False, "sdpa")):
        monkeypatch.setattr(ra, "cpu_has_bf16", lambda has=has: has)
        assert model.attention_in_use(cpu, bf16) == expected and model.attention_in_use(cpu, None) == "sdpa"
    assert create_model("DiT_Nano_2", input_size=8).attention_in_use(cpu, bf16) == "sdpa"


def test_what_this_machine_does_not_have_is_said(monkeypatch):
    monkeypatch.setattr(triton_attention, "INTERPRETED", False)
    check_implementation("triton", torch.device("cuda"))
    with pytest.raises(ValueError, match="--attention triton needs a GPU: on a CPU choose sdpa or auto"):
        create_model("MDTv2_Nano_2", input_size=8).set_attention("triton", torch.device("cpu"))
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match="--attention triton needs a GPU"):
        relative_attention(q, q, q, torch.zeros(12, 1), None, (2, 2), "triton")
    with pytest.raises(ValueError, match="--attention is 'flash': choose one of auto, sdpa, triton"):
        check_implementation("flash", torch.device("cpu"))
    monkeypatch.setattr(ra, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        check_implementation("triton", torch.device("cuda"))


@pytest.mark.parametrize(
    "q, message",
    [
        (torch.randn(1, 1, 4, 144), "heads of up to 128 features, not 144"),
        (torch.randn(1, 1, 4, 16).double(), r"not in torch\.float64"),
    ],
)
def test_inputs_that_the_kernel_cannot_compute_are_refused(q, message):
    with pytest.raises(ValueError, match=message):
        relative_attention(q.to(DEVICE), q, q, torch.zeros(12, 1), None, (2, 2), "triton")


def test_widths_are_split_into_powers_of_two_without_much_padding():
    splits = {width: triton_attention.split_width(width) for width in (8, 16, 24, 32, 48, 64, 72, 80, 96, 128)}
    assert splits[72] == (64, 16) and splits[64] == (64, 0) and splits[8] == (16, 0) and splits[96] == (64, 32)
    assert all(width <= sum(parts) <= width + 8 for width, parts in splits.items())
    assert [triton_attention.block_size(length, 72) for length in (1, 17, 64, 128, 144, 176, 256)] == [
        16,
        32,
        64,
        128,
        64,
        64,
        128,
    ]
    assert set(relative_position_index(5, 7).diagonal().tolist()) == {triton_attention._center(5, 7)}
