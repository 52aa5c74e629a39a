"""What is written tensor by tensor is what torch.save writes, to all who read it."""

import weakref
import zipfile

import pytest
import torch

from masked_diffusion.weights.torch_file import LateTensor, convert_late, late_tensors, save_tensors

TABLE = torch.arange(60.0).view(10, 6)
STATE = {
    "weights": TABLE[2:5],
    "turned": TABLE.t(),
    "half": torch.randn(7).half(),
    "bf16": torch.randn(2, 2).bfloat16(),
    "index": torch.arange(5),
    "bool": torch.tensor([True, False]),
    "step": torch.tensor(3.0),
    "none": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "twice": TABLE,
    "again": TABLE,
    "nested": {0: {"exp_avg": torch.ones(3), "betas": (0.9, 0.99)}, "list": [torch.zeros(1), None, "text", 2**70]},
}


def leaves(value):
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("mmap", [False, True])
def test_all_is_read_back_as_plain_tensors(tmp_path, mmap):
    for name, save in (("ours.pt", save_tensors), ("theirs.pt", torch.save)):
        with (tmp_path / name).open("wb") as file:
            save(STATE, file)
    assert zipfile.ZipFile(tmp_path / "ours.pt").testzip() is None
    found, expected = (
        leaves(torch.load(tmp_path / name, weights_only=True, mmap=mmap)) for name in ("ours.pt", "theirs.pt")
    )
    for ours, theirs in zip(found, expected, strict=True):
        if not isinstance(ours, torch.Tensor):
            assert ours == theirs
            continue
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert ours.is_contiguous() and ours.untyped_storage().nbytes() == ours.nbytes and not ours.requires_grad
        assert not mmap or ours.data_ptr() % 64 == 0


def test_one_late_tensor_is_in_memory_at_a_time(tmp_path):
    made = []

    def make(number):
        assert not made or made[-1]() is None, "the last one is still there"
        tensor = torch.full((2, 3), float(number))
        made.append(weakref.ref(tensor))
        return tensor

    late = [LateTensor(torch.Size([2, 3]), torch.float32, lambda n=n: make(n)) for n in range(4)]
    state = {"a": late[0], "b": [late[1], torch.ones(1)], "c": convert_late(late[2], torch.float16), "d": late[3]}
    assert [tensor.shape for tensor in late_tensors(state)] == [(2, 3)] * 4
    with (tmp_path / "late.pt").open("wb") as file:
        save_tensors(state, file)
    found = torch.load(tmp_path / "late.pt", weights_only=True)
    assert [found["a"][0, 0], found["b"][0][0, 0], found["c"][1, 2], found["d"][1, 1]] == [0, 1, 2, 3]
    assert found["c"].dtype == torch.float16 and len(made) == 4
