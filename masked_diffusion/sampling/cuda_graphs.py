"""A network's forward pass as one CUDA graph: launched at once, where its kernels would be launched one by one."""

from typing import Any

import torch
from torch import Tensor

from .. import logger

WARM_UPS = 3  # calls before the capture, in which compilers and libraries set up what they may not set up in it
MAX_GRAPHS = 8  # each shape of a batch has a graph and its memory


class GraphedForward:
    """A network's `forward(x, t, y)` without gradients, captured once for each shape and number format of its inputs.

    Timesteps, labels and noise are copied into the graph's own inputs, so that new values need no new graph. What a
    graph cannot run goes to the network itself: gradients, further arguments, other devices, and new shapes after a
    capture that failed.

    Blocks stay compiled by torch.compile on their own. `mode="reduce-overhead"` would capture one graph a block, and
    since blocks share their compiled code, capture it again for the weights of each.

    :param network: in eval mode. Its weights must stay where they are in memory.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.network, self.forward = network, network.forward
        self.graphs, self.failed, self.pool = {}, False, None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the network; a tensor of its own, which the next call does not overwrite."""
        if y is None or args or kwargs or not self._can_graph(x):
            return self.forward(x, t, y, *args, **kwargs)
        number_format = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = number_format, *((value.shape, value.dtype) for value in (x, t, y))
        if key not in self.graphs and not self.failed:
            try:
                if len(self.graphs) == MAX_GRAPHS:
                    raise RuntimeError(f"there are graphs of {MAX_GRAPHS} shapes of a batch already")
                self.graphs[key] = self._capture((x, t, y))
            except RuntimeError as error:
                self.failed = True
                reason = next(iter(str(error).splitlines()), "the capture failed")
                logger.log(f"no CUDA graph, every kernel is launched on its own: {reason[:200]}")
        if key not in self.graphs:
            return self.forward(x, t, y)
        graph, inputs, output = self.graphs[key]
        for own, value in zip(inputs, (x, t, y), strict=True):
            own.copy_(value)
        graph.replay()
        return output.clone()

    def _can_graph(self, x: Tensor) -> bool:
        return x.device.type == "cuda" and not torch.is_grad_enabled() and not self.network.training

    def _capture(self, values: tuple[Tensor, ...]) -> tuple[Any, list[Tensor], Tensor]:
        """The graph, its inputs and its output."""
        inputs = [value.clone() for value in values]
        # Autocast's copies of the weights must be made in the graph: a copy that it remembers from a warm-up is freed.
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self.forward(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Of this thread alone: others, such as that of NCCL, may go on working with the device meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = self.forward(*inputs)
        self.pool = graph.pool()
        return graph, inputs, output
