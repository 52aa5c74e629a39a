"""State that one rank has on its host, for example read from a file, and that the others receive tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .. import dist_util

T = TypeVar("T")


@dataclass(eq=False)
class SentTensor:
    """A tensor that the first rank of a group holds, and that all ranks of the group receive when they need it.

    :param value: on the first rank; None on the others.
    """

    shape: torch.Size
    dtype: torch.dtype
    group: dist_util.RankGroup
    value: torch.Tensor | None

    def receive(self, device: torch.device) -> torch.Tensor:
        """The tensor, once. All ranks of the group call it together, and in the same order of tensors.

        :return: on `device`; in a group of one rank what that holds, which may be on the host or in a mapped file.
        """
        value, self.value = self.value, None
        if len(self.group.ranks) == 1:
            return value
        if value is None:
            value = torch.empty(self.shape, dtype=self.dtype, device=device)
        value = value.to(device).contiguous()
        dist.broadcast(value, self.group.ranks[0], group=self.group.devices)
        return value


def send_state(make: Callable[[], Any], group: dist_util.RankGroup) -> Any:
    """The state that the first rank of a group makes, with `SentTensor`s in it, on all ranks of the group.

    All ranks of the job call it together, each with its own group.

    :param make: returns dicts, lists and tuples of tensors and plain values; called on the first rank of each group.
    :return: tensors without dimensions, such as an optimizer's counters, come at once.
    :raises UserError: on all ranks of the job, if `make` raised one.
    :raises RuntimeError: on the other ranks, if `make` raised another error.
    """
    state, source = None, group.ranks[0]
    with dist_util.failing_together():
        if dist_util.get_rank() == source:
            state = make()
    outline = [outline_of(state)]
    if len(group.ranks) > 1:
        dist.broadcast_object_list(outline, source, group=group.hosts)

    def sent(tensor: torch.Tensor) -> torch.Tensor | SentTensor:
        held = None if tensor.is_meta else tensor
        return SentTensor(tensor.shape, tensor.dtype, group, held) if tensor.ndim else tensor

    return map_leaves(sent, torch.Tensor, outline[0] if state is None else state)


def outline_of(state: Any) -> Any:
    """A state with tensors on the meta device in place of all that have dimensions: small enough to be sent at once."""
    return map_leaves(lambda tensor: tensor.to("meta") if tensor.ndim else tensor.clone(), torch.Tensor, state)


def receive_all(state: Any, device: torch.device) -> Any:
    """A state with tensors on the device, in memory of their own, in place of its `SentTensor`s."""
    return map_leaves(lambda sent: sent.receive(device).to(device, copy=True), SentTensor, state)


def map_leaves(function: Callable[[T], Any], kind: type[T], state: Any) -> Any:
    """A copy of dicts, lists and tuples in which each value of a type is replaced by what the function makes of it."""
    if isinstance(state, kind):
        return function(state)
    if isinstance(state, dict):
        return {key: map_leaves(function, kind, value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map_leaves(function, kind, value) for value in state)
    return state
