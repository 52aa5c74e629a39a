"""A mocked device on a CPU, which counts what the host must wait for.

Its tensors say that they are on `meta`, and hold their numbers on the CPU. Tensors made on `meta` belong to it.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE, CPU = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten
# These give the host a number, or a tensor whose size depends on numbers.
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.item.default}
READS |= {aten.nonzero.default, aten.masked_select.default, aten._linalg_check_errors.default}


class DeviceTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, numbers):
        options = {"dtype": numbers.dtype, "device": DEVICE, "strides": numbers.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **options)

    def __init__(self, numbers):
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of count_waits")

    __torch_function__ = torch._C._disabled_torch_function_impl


class CountWaits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits, self.operations = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        found = []
        tree_map_only(torch.Tensor, lambda t: found.append(isinstance(t, DeviceTensor)), (args, kwargs))
        asked = kwargs.get("device")
        on_device = asked == DEVICE if asked is not None else any(found)
        self.operations += on_device
        if any(found) and (func in READS or asked == CPU):
            self.waits.append(f"{func} of a tensor on the device")
        if found and not all(found) and asked == DEVICE and not kwargs.get("non_blocking"):
            self.waits.append(f"{func} to the device without non_blocking")
        masks = args[1] if func is aten.index.Tensor and on_device else ()
        if any(t is not None and t.dtype == torch.bool for t in masks):  # the host must know how many are True
            self.waits.append(f"{func} with a mask")
        if asked is not None:
            kwargs["device"] = CPU
        args, kwargs = tree_map_only(DeviceTensor, lambda t: t.numbers, (args, kwargs))
        out = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, DeviceTensor, out) if on_device else out


@contextmanager
def count_waits():
    """Yields a `CountWaits`, whose `waits` names each wait so far."""
    with CountWaits() as mode:
        yield mode


def to_device(tensor):
    return DeviceTensor(tensor)


def module_to_device(module):
    """Replace the parameters and buffers of a module by tensors on the mocked device."""
    for part in module.modules():
        for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            part._parameters.pop(name, None)
            part._buffers[name] = DeviceTensor(value.detach())
    return module
