"""A network as CUDA graphs, captured once for each shape, and what `--compile` compiles."""

import pytest
import torch
from helpers import make_image_sampler, small_model

from masked_diffusion.guidance import Guidance
from masked_diffusion.sampling import cuda_graphs
from masked_diffusion.sampling.cuda_graphs import GraphedForward

ARGUMENTS = torch.randn(2, 3, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 2])


class Recorded(GraphedForward):
    """A graph on a CPU: replaying it runs the network on the graph's own inputs, into its own output."""

    captures = 0

    def _can_graph(self, x):
        return not torch.is_grad_enabled()

    def _capture(self, values):
        self.captures += 1
        inputs = [value.clone() for value in values]
        output = torch.zeros_like(self.forward(*inputs))

        class Graph:
            def replay(graph):
                output.copy_(self.forward(*inputs))

        return Graph(), inputs, output


@torch.no_grad()
def test_new_values_need_no_new_graph():
    model, plain = small_model(), small_model()
    model.forward = Recorded(model)
    x, t, y = ARGUMENTS
    first = model(x, t, y)
    kept = first.clone()
    for values in ((x + 1, t, y), (x, t + 7, y), (x, t, y + 3)):
        torch.testing.assert_close(model(*values), plain(*values), rtol=0, atol=0)
    assert model.forward.captures == 1 and torch.equal(first, kept)  # an output outlives the next call
    model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y]))
    assert model.forward.captures == 2
    torch.testing.assert_close(
        model(x, t, y, drop_labels=torch.tensor([True, False])), plain(x, t, torch.tensor([10, 2]))
    )
    with torch.enable_grad():
        model.requires_grad_()(x, t, y).sum().backward()
    assert model.forward.captures == 2


@torch.no_grad()
def test_a_failed_capture_falls_back_and_says_so_once(capsys, monkeypatch):
    x, t, y = ARGUMENTS
    model, plain = small_model(), small_model()
    model.forward = Recorded(model)
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 1)
    for rows in (2, 1, 1, 2):
        values = x[:rows], t[:rows], y[:rows]
        torch.testing.assert_close(model(*values), plain(*values), rtol=0, atol=0)
    assert (
        capsys.readouterr().out.count("no CUDA graph, every kernel is launched on its own: there are graphs of 1") == 1
    )
    assert model.forward.captures == 1
    broken = small_model()
    broken.forward = GraphedForward(broken)  # its capture needs a GPU
    monkeypatch.setattr(broken.forward, "_can_graph", lambda x: True)
    monkeypatch.setattr(broken.forward, "_capture", lambda values: (_ for _ in ()).throw(RuntimeError("capturing\n.")))
    torch.testing.assert_close(broken(x, t, y), plain(x, t, y), rtol=0, atol=0)
    assert capsys.readouterr().out.endswith("every kernel is launched on its own: capturing\n")


def test_classes_guidance_and_steps_compile_nothing_again(monkeypatch):
    graphs = []
    compile_module = torch.nn.Module.compile
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend=backend, **kw))
    torch._dynamo.reset()
    model = small_model(depth=2, decode_layer=0)
    model.compile_blocks()
    first, second = torch.tensor([1, 2]), torch.tensor([7, 7])
    make_image_sampler(model, guidance=Guidance("interval", 2.0, interval=(0, 500)))([0, 1], first)
    compiled = len(graphs)
    for solver in ("ddim", "dpm++", "heun"):
        for guidance in (Guidance("interval", 5.0, interval=(300, 700)), Guidance("power-cosine", 3.0), Guidance()):
            make_image_sampler(model, solver, guidance=guidance)([5, 9], second)
    assert compiled and len(graphs) == compiled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("number_format", [None, torch.bfloat16])
@torch.no_grad()
def test_a_graph_computes_the_same_on_a_gpu(number_format):
    model, plain = small_model().cuda(), small_model().cuda()
    model.forward = GraphedForward(model)
    x, t, y = (value.cuda() for value in ARGUMENTS)
    with torch.autocast("cuda", number_format, enabled=number_format is not None):
        for rows in (2, 1, 2):
            for shift in range(3):
                values = x[:rows] + shift, t[:rows], y[:rows] + shift
                torch.testing.assert_close(model(*values), plain(*values), rtol=1e-3, atol=1e-3)
    assert len(model.forward.graphs) == 2 and not model.forward.failed
