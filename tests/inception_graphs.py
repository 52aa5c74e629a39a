"""Frozen graphs with ADM's tensor names and random weights, written as protocol buffers: no TensorFlow is needed."""

import json

import numpy as np
from helpers import DATA
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_INT32

NODES = json.loads((DATA / "inception_nodes.json").read_text())


class GraphWriter:
    """Adds nodes to a GraphDef of the age of the published one."""

    def __init__(self, seed=0):
        self.definition, self.rng = GraphDef(), np.random.default_rng(seed)
        self.definition.versions.producer = 8  # BatchNormWithGlobalNormalization was removed in version 9

    def node(self, name, op, *inputs, **attributes):
        node = self.definition.node.add(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            attribute = node.attr[key]
            if isinstance(value, bool):
                attribute.b = value
            elif isinstance(value, float):
                attribute.f = value
            elif isinstance(value, int):
                attribute.type = value
            elif isinstance(value, str):
                attribute.s = value.encode()
            elif isinstance(value, list):
                attribute.list.i.extend(value)
            else:
                self._set_tensor(attribute.tensor, value)
        return name

    @staticmethod
    def _set_tensor(tensor, array):
        tensor.dtype = DT_INT32 if array.dtype == np.int32 else DT_FLOAT
        tensor.tensor_content = array.tobytes()
        for size in array.shape:
            tensor.tensor_shape.dim.add(size=size)

    def constant(self, name, array):
        array = np.asarray(array)
        array = array if array.dtype == np.int32 else array.astype(np.float32)
        return self.node(name, "Const", dtype=DT_INT32 if array.dtype == np.int32 else DT_FLOAT, value=array)

    def input(self):
        """`ExpandDims`, as the image's tensor is called; resized and scaled like the published graph does."""
        self.node("contents", "Placeholder", dtype=DT_FLOAT)
        self.node("ExpandDims", "ExpandDims", "contents", self.constant("axis", np.int32(0)), T=DT_FLOAT, Tdim=DT_INT32)
        return "ExpandDims"

    def scaled(self, x, size):
        size = self.constant("ResizeBilinear/size", np.array([size, size], np.int32))
        x = self.node("ResizeBilinear", "ResizeBilinear", x, size, T=DT_FLOAT, align_corners=False)
        x = self.node("Sub", "Sub", x, self.constant("Sub/y", 128.0), T=DT_FLOAT)
        return self.node("Mul", "Mul", x, self.constant("Mul/y", 0.0078125), T=DT_FLOAT)

    def convolution(self, name, x, channels, shape, padding="SAME", stride=1, scaled=True):
        """Convolution, batch normalisation and ReLU; `shape` is (height, width, out), `scaled` whether gamma counts."""
        height, width, out = shape
        kernel = self.rng.standard_normal((height, width, channels, out)) * np.sqrt(2 / (height * width * channels))
        strides = [1, stride, stride, 1]
        y = self.node(
            f"{name}/Conv2D", "Conv2D", x, self.constant(f"{name}/conv2d_params", kernel),
            T=DT_FLOAT, strides=strides, padding=padding,
        )  # fmt: skip
        values = {
            "moving_mean": self.rng.normal(0, 0.1, out),
            "moving_variance": self.rng.uniform(0.5, 1.5, out),
            "beta": self.rng.normal(0, 0.2, out),
            "gamma": self.rng.uniform(0.7, 1.3, out),
        }
        inputs = [self.constant(f"{name}/batchnorm/{key}", value) for key, value in values.items()]
        norm = self.node(
            f"{name}/batchnorm", "BatchNormWithGlobalNormalization", y, *inputs,
            T=DT_FLOAT, variance_epsilon=0.001, scale_after_normalization=scaled,
        )  # fmt: skip
        return self.node(name, "Relu", norm, T=DT_FLOAT)

    def pool(self, name, op, x, size, stride, padding="VALID"):
        return self.node(
            name, op, x, T=DT_FLOAT, ksize=[1, size, size, 1], strides=[1, stride, stride, 1], padding=padding
        )

    def concat(self, name, parts):
        axis = self.constant(f"{name}/axis", np.int32(3))
        attributes = {"T": DT_FLOAT, "Tidx": DT_INT32}
        node = self.node(name, "ConcatV2", *parts, axis, **attributes)
        self.definition.node[-1].attr["N"].i = len(parts)
        return node

    def head(self, pool, features, classes):
        weights = self.constant("softmax/weights", self.rng.standard_normal((features, classes)) * 3 / features**0.5)
        self.constant("softmax/biases", self.rng.standard_normal(classes))
        flat = self.node("flat", "Reshape", pool, self.constant("flat/shape", np.array([-1, features], np.int32)),
                         T=DT_FLOAT, Tshape=DT_INT32)  # fmt: skip
        self.node("softmax/logits/MatMul", "MatMul", flat, weights, T=DT_FLOAT)

    def write(self, path):
        path.write_bytes(self.definition.SerializeToString())
        return path


def write_small_graph(path):
    """Two convolutions: `mixed_6/conv` of 16 channels at 8 x 8, and `pool_3` of 32."""
    graph = GraphWriter()
    x = graph.scaled(graph.input(), 16)
    x = graph.convolution("mixed_6/conv", x, 3, (3, 3, 16), stride=2)
    x = graph.convolution("last", x, 16, (3, 3, 32))
    graph.head(graph.pool("pool_3", "AvgPool", x, 8, 1), 32, 10)
    return graph.write(path)


# ---------------------------------------------------------------- the full network


class InceptionWriter(GraphWriter):
    """Takes kernel sizes and channels from torch-fidelity's modules; joins them under the graph's names."""

    def __init__(self, modules):
        super().__init__(seed=1)
        self.modules = {name: modules.get_submodule(module) for name, module in NODES.items() if "conv2d" in name}

    def conv(self, name, x):
        conv = self.modules[f"{name}/conv2d_params"]
        valid = conv.padding == (0, 0) and conv.kernel_size != (1, 1)
        shape = (*conv.kernel_size, conv.out_channels)
        scaled = not name.startswith("mixed_5/")  # of both kinds some
        padding = "VALID" if valid else "SAME"
        return self.convolution(name, x, conv.in_channels, shape, padding, conv.stride[0], scaled)

    def tower(self, scope, x):
        """conv, conv_1, ... of a scope, one after the other."""
        i = 0
        while f"{scope}/conv{f'_{i}' if i else ''}/conv2d_params" in self.modules:
            x = self.conv(f"{scope}/conv{f'_{i}' if i else ''}", x)
            i += 1
        return x

    def fork(self, scope, x):
        """The two halves of a scope's `mixed`, both on the scope's tower."""
        x = self.tower(scope, x)
        return [self.conv(f"{scope}/mixed/{name}", x) for name in ("conv", "conv_1")]

    def block(self, i, x):
        name = f"mixed_{i}" if i else "mixed"
        if i in (3, 8):
            parts = [self.conv(f"{name}/conv", x)] if i == 3 else []
            parts += [self.tower(f"{name}/{tower}", x) for tower in ("tower", "tower_1")[: 1 if i == 3 else 2]]
            return self.concat(f"{name}/join", [*parts, self.pool(f"{name}/pool", "MaxPool", x, 3, 2)])
        pooled = self.pool(f"{name}/pool", "MaxPool" if i == 10 else "AvgPool", x, 3, 1, "SAME")
        branches = self.fork if i > 8 else lambda scope, x: [self.tower(scope, x)]
        parts = [self.conv(f"{name}/conv", x), *branches(f"{name}/tower", x), *branches(f"{name}/tower_1", x)]
        return self.concat(f"{name}/join", [*parts, self.conv(f"{name}/tower_2/conv", pooled)])


def write_inception_graph(path, modules):
    """Inception-v3 of 2015 with its real node names. :param modules: torch-fidelity's network, for its sizes alone."""
    graph = InceptionWriter(modules)
    x = graph.scaled(graph.input(), 299)
    for name in ("conv", "conv_1", "conv_2"):
        x = graph.conv(name, x)
    x = graph.pool("pool", "MaxPool", x, 3, 2)
    for name in ("conv_3", "conv_4"):
        x = graph.conv(name, x)
    x = graph.pool("pool_1", "MaxPool", x, 3, 2)
    for i in range(11):
        x = graph.block(i, x)
    graph.head(graph.pool("pool_3", "AvgPool", x, 8, 1), 2048, 1008)
    return graph.write(path)
