"""ADM's Inception network in torch: torch-fidelity's architecture with weights out of the same frozen graph.

No TensorFlow is imported: a frozen graph is a protocol buffer, whose definition tensorboard carries.
"""

import io
from pathlib import Path

import torch

from . import ranks
from .errors import UserError, check_packages

SPATIAL_CHANNELS, IMAGE_SIZE = 7, 299
CPU_IMAGES = 16  # at a time: more drop out of a processor's caches, and fewer set up each convolution too often

# Scopes of the graph, and the convolutions in them in order: `conv`, `conv_1`, ... of each are torch-fidelity's these.
STEM = {"": ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]}
A = {
    "": ["branch1x1"],
    "tower/": ["branch5x5_1", "branch5x5_2"],
    "tower_1/": ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
    "tower_2/": ["branch_pool"],
}
B = {"": ["branch3x3"], "tower/": ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]}
C = {
    "": ["branch1x1"],
    "tower/": ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
    "tower_1/": ["branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"],
    "tower_2/": ["branch_pool"],
}
D = {
    "tower/": ["branch3x3_1", "branch3x3_2"],
    "tower_1/": ["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"],
}
E = {
    "": ["branch1x1"],
    "tower/": ["branch3x3_1"],
    "tower/mixed/": ["branch3x3_2a", "branch3x3_2b"],
    "tower_1/": ["branch3x3dbl_1", "branch3x3dbl_2"],
    "tower_1/mixed/": ["branch3x3dbl_3a", "branch3x3dbl_3b"],
    "tower_2/": ["branch_pool"],
}
BLOCKS = {"5b": A, "5c": A, "5d": A, "6a": B, "6b": C, "6c": C, "6d": C, "6e": C, "7a": D, "7b": E, "7c": E}


def convolutions():
    """Name of each convolution in the graph -> name of its module in torch-fidelity."""
    names = dict(_numbered(STEM, "", ""))
    for i, (block, scopes) in enumerate(BLOCKS.items()):
        names |= _numbered(scopes, f"mixed_{i}/" if i else "mixed/", f"Mixed_{block}.")
    return names


def _numbered(scopes, prefix, module):
    return {
        f"{prefix}{scope}conv{f'_{i}' if i else ''}": module + name
        for scope, names in scopes.items()
        for i, name in enumerate(names)
    }


def read_weights(path):
    """torch-fidelity's state dict, from a frozen graph (.pb) or from a checkpoint of tensors (.pth).

    :raises UserError: for a file that is neither, or is cut short.
    """
    try:
        with Path(path).open("rb") as file:
            is_graph = file.read(1) == b"\x0a"  # the first field of a GraphDef; zip and pickle begin otherwise
        if is_graph:
            check_packages("tensorboard", reason=f"the torch backend, to read {path},")
        state = _read_graph(path) if is_graph else torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("it is no table of tensors by their names")
        return state
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # protobuf and torch raise anything from DecodeError to UnpicklingError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as the Inception network ({reason}): it must be classify_image_graph_def.pb, "
            "or torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        ) from error


def _read_graph(path):
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.util.tensor_util import make_ndarray

    nodes = {node.name: node for node in GraphDef.FromString(Path(path).read_bytes()).node}

    def constant(name):
        if name not in nodes:
            raise ValueError(f"it lacks the node {name}")
        return torch.from_numpy(make_ndarray(nodes[name].attr["value"].tensor).copy()).float()

    state = {"fc.weight": constant("softmax/weights").T, "fc.bias": constant("softmax/biases")}
    for name, module in convolutions().items():
        state[f"{module}.conv.weight"] = constant(f"{name}/conv2d_params").permute(3, 2, 0, 1)  # HWIO -> OIHW
        norm = f"{name}/batchnorm"
        beta, gamma, mean, variance = (
            constant(f"{norm}/{key}") for key in ("beta", "gamma", "moving_mean", "moving_variance")
        )
        scaled = nodes[norm].attr["scale_after_normalization"].b
        state[f"{module}.bn.weight"] = gamma if scaled else torch.ones_like(gamma)
        state |= {f"{module}.bn.bias": beta, f"{module}.bn.running_mean": mean, f"{module}.bn.running_var": variance}
    return {key: value.contiguous() for key, value in state.items()}


def fold_norms(network: torch.nn.Module) -> None:
    """Fold every batch norm into the convolution before it, in double precision: one pass over the numbers less."""
    for block in network.modules():
        if hasattr(block, "conv") and hasattr(block, "bn"):
            conv, norm = block.conv, block.bn
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            conv.weight = torch.nn.Parameter((conv.weight.double() * scale[:, None, None, None]).float(), False)
            conv.bias = torch.nn.Parameter((norm.bias.double() - norm.running_mean.double() * scale).float(), False)
            block.bn = torch.nn.Identity()


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """(N, H, W, C) -> (N, size, size, C), bilinear as TensorFlow 1 has it: the first pixels' corners coincide.

    Rows follow columns, and each is one difference, one product and one sum, as in TensorFlow: the same roundings.
    """
    for axis in (2, 1):
        length = images.shape[axis]
        place = torch.arange(size, device=images.device, dtype=torch.float32) * (length / size)
        low = place.long()
        weight = (place - low).reshape(-1, *[1] * (3 - axis))
        start = images.index_select(axis, low)
        images = images.index_select(axis, (low + 1).clamp_max(length - 1)).sub_(start).mul_(weight).add_(start)
    return images


class TorchInception:
    """Features of images, as ADM's evaluator takes them from the TensorFlow graph.

    :param path: see `read_weights`. :param device: where the network runs.
    :raises UserError: when the file is not this network's, or torch-fidelity is missing.
    """

    name = "torch"

    def __init__(self, path, device="cpu"):
        check_packages("torch-fidelity", reason="the torch backend")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        state, buffer = read_weights(path), io.BytesIO()
        torch.save(state, buffer)  # the extractor unpickles what it is given: let it be bytes of our own
        buffer.seek(0)
        try:
            extractor = FeatureExtractorInceptionV3("inception", ["2048"], buffer)
        except RuntimeError as error:
            raise UserError(f"{path} holds another network than Inception-v3 of 2015: {str(error)[:200]}") from error
        extractor.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        fold_norms(extractor)
        layers = [layer for name, layer in extractor.named_children() if name != "fc"]  # in the order of its forward
        self.device = torch.device(device)
        self.network = torch.nn.Sequential(*layers).to(self.device, memory_format=torch.channels_last)
        self.logit_weights = extractor.fc.weight.T.to(self.device)
        self.sizes = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS}

    @property
    def device_name(self):
        """What the network runs on."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ranks.processor()

    def _keep_spatial(self, module, inputs, output):
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @ranks.full_float32()
    @torch.inference_mode()
    def __call__(self, images):
        """(N, H, W, 3) uint8 images -> pool (N, 2048), spatial (N, 2023) and logits (N, 1008), float32 tensors."""
        at_a_time = CPU_IMAGES if self.device.type == "cpu" else len(images)
        parts = [self._features(part) for part in torch.from_numpy(images).split(at_a_time)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _features(self, images):
        pixels = resize(images.to(self.device).float(), IMAGE_SIZE).sub_(128).div_(128)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pool = self.network(pixels.permute(0, 3, 1, 2)).flatten(1)  # channels stay last in memory
            return {"pool": pool, "spatial": self._spatial, "logits": pool @ self.logit_weights}
