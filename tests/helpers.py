"""What several test files need: small models, runs and their flags, files to read, definitions to compare with."""

import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import export
import image_sample
import image_train
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import fill
from PIL import Image
from sklearn.datasets import load_sample_images

from evaluations import console, evaluator
from masked_diffusion import (
    create_diffusion,
    create_model,
    dist_util,
    logger,
    script_util,
)
from masked_diffusion.config import RunConfig
from masked_diffusion.guidance import Guidance
from masked_diffusion.images.finding import find_images
from masked_diffusion.images.packing import pack_images
from masked_diffusion.latents.autoencoder import IdentityFirstStage
from masked_diffusion.layers.relative_attention import gather_pairs, relative_attention, relative_position_index
from masked_diffusion.sample_config import SOLVERS_OF, SampleConfig
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.sampling.solvers import create_solver
from masked_diffusion.train_util import TrainLoop
from masked_diffusion.training.objective import TwoPassObjective
from masked_diffusion.training.resume import resolve
from masked_diffusion.utils.random_numbers import fold_seed

DATA = Path(__file__).parent / "data"
REPO = Path(__file__).parent.parent
needs_tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="TensorFlow is not installed")


# ---------------------------------------------------------------- training


def write_images(folder, names, size=(12, 10)):
    rng = np.random.default_rng(0)
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return [str(Path(folder, name)) for name in names]


def break_image(path, kind, monkeypatch):
    """Make a file an image that cannot be read."""
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
        Image.new("RGB", (12, 12)).save(path)
    elif kind == "dangling link":
        path.unlink()
        path.symlink_to("/nowhere/a_1.png")
    else:
        path.unlink()
        path.symlink_to(path)


def stream(start_step, seed, batch_size=8):
    """A data iterator in memory: the batch of a step is a function of the seed and the step."""
    step = start_step
    while True:
        generator = torch.Generator().manual_seed(seed % 1000 + step)
        yield (
            torch.rand(batch_size, 3, 8, 8, generator=generator) * 2 - 1,
            {"y": torch.randint(0, 10, (batch_size,), generator=generator)},
        )
        step += 1


class Batches:
    """`training.data.TrainingData` in memory."""

    names = ()

    def stream(self, start_step, seed, first_stage):
        return stream(start_step, seed)

    def batch_names(self, step, seed):
        return [f"image_{step}_{i}.png" for i in range(8)]


def make_loop(log_dir, device="cpu", hooks=(), data=None, meta=False, num_classes=10, **flags):
    """A loop over `stream` that has resumed, with the flags of image_train.py.

    With `meta`, the model is on the meta device until the loop gives it its weights.
    """
    logger.configure(str(log_dir), quiet=not dist_util.is_main())
    small = {"model": "MDTv2_Nano_2", "image_size": 8, "vae": "identity", "mask_ratio": 0.3, "max_steps": 4}
    small |= {"batch_size": 8, "lr": 1e-3, "ema_rate": "0.9,0.99", "log_interval": 2, "save_interval": 2}
    config = resolve(RunConfig().replaced(**small | flags).check())
    options = {"input_size": 8, "in_channels": 3, "num_classes": num_classes, "depth": 2}

    def make_model():
        torch.manual_seed(0)
        return create_model("MDTv2_Nano_2", **options, mask_ratio=config.model.mask_ratio)

    with torch.device("meta" if meta else "cpu"):
        model = make_model()
    model = model if meta else model.to(device)
    parts = {"first_stage": IdentityFirstStage(), "log_dir": log_dir, "hooks": hooks}
    objective = TwoPassObjective(model, create_diffusion(), config.precision)
    loop = TrainLoop(config, objective, data or Batches(), make_model=make_model if meta else None, **parts)
    loop.resume()
    return loop


def trained(log_dir, **options):
    loop = make_loop(log_dir, **options)
    loop.run_loop()
    return loop


def tensors(folder, step):
    """Every tensor of a checkpoint, by file and key."""
    found = {}
    for path in sorted(Path(folder).glob(f"*{step:06d}.pt")):
        stack = [(path.name, torch.load(path, weights_only=True))]
        while stack:
            name, value = stack.pop()
            if isinstance(value, torch.Tensor):
                found[name] = value
            elif isinstance(value, dict):
                stack += [(f"{name}/{key}", item) for key, item in value.items()]
    return found


def whole_tensors(folder, step, out):
    """The checkpoint of a step as `export.py --format whole` writes it."""
    out.mkdir(exist_ok=True)
    export.export_whole(folder / f"sharded{step:06d}", out)
    return tensors(out, step)


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys() and ours
    for key, value in ours.items():
        if tolerance:
            torch.testing.assert_close(value, theirs[key], **tolerance, msg=key)
        else:
            assert torch.equal(value, theirs[key]), key


def train_flags(images, log_dir, **options):
    flags = {
        "data_dir": images, "log_dir": log_dir, "model": "MDTv2_Nano_2", "image_size": 8, "vae": "identity",
        "mask_ratio": 0.3, "batch_size": 8, "max_steps": 3, "optimizer": "adamw", "lr": 1e-3, "num_workers": 1,
        "ema_rate": "0.9", "log_interval": 1, "schedule_sampler": "loss-second-moment",
    } | options  # fmt: skip
    return [f"--{key}={value}" for key, value in flags.items()]


def run_script(script, *flags, launcher=(), check=True):
    if not launcher:
        return fork(script, list(map(str, flags)), check=check)
    command = [sys.executable, *launcher, str(REPO / "scripts" / script), *map(str, flags)]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def run_train(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["image_train.py", *flags])
    script_util.run(image_train.main)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@cache
def fork_server():
    """The process of fork_ranks.py that runs scripts for the tests of this one."""
    command = [sys.executable, REPO / "tests" / "fork_ranks.py"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def fork(script, flags, check=True, timeout=280, **options):
    """Run a script with flags as `fork_ranks.run` does; options are its arguments."""
    server = fork_server()
    with tempfile.TemporaryDirectory() as folder:
        request = {"script": script, "flags": list(flags), "options": options, "folder": os.getcwd()}
        request |= {"environ": dict(os.environ), "stdout": f"{folder}/stdout", "stderr": f"{folder}/stderr"}
        server.stdin.write(json.dumps(request) + "\n")
        group = int(server.stdout.readline())
        if not select.select([server.stdout], [], [], timeout)[0]:
            os.killpg(group, signal.SIGKILL)
        code = int(server.stdout.readline())
        out, err = (Path(request[name]).read_text(errors="replace") for name in ("stdout", "stderr"))
    assert not check or code == 0, f"exit code {code}\n{out}{err}"
    return subprocess.CompletedProcess([script, *flags], code, out, err)


def find(folder, index, **options):
    """The images of a folder, by an index."""
    return find_images(str(folder), index, **options)


# ---------------------------------------------------------------- packed images


def pack(folder, out, **options):
    options = {
        "shard_size": 5,
        "class_cond": True,
        "on_bad_image": "error",
        "num_workers": 0,
        "verify": False,
    } | options
    pack_images(data_dir=str(folder), out=str(out), **options)
    return str(out)


def contents(out):
    """Every file that packing makes, by name."""
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.is_file() and path.name != "log.txt"}


# ---------------------------------------------------------------- sampling


def small_model(**options):
    return fill(create_model("MDTv2_Nano_2", **{"input_size": 8, "in_channels": 3, "num_classes": 10} | options)).eval()


def make_image_sampler(model=None, solver="ddpm", **options):
    options = {"guidance": Guidance("power-cosine", 2.0), "seed": 4} | options
    objective = next(objective for objective, solvers in SOLVERS_OF.items() if solver in solvers)
    model = model or small_model(learn_sigma=objective == "diffusion")
    return ImageSampler(model, create_solver(solver, "6", {"objective": objective}), IdentityFirstStage(), **options)


def sample_flags(checkpoint, log_dir, **options):
    flags = {"model_path": checkpoint, "log_dir": log_dir, "num_samples": 11, "batch_size": 4, "cfg_cond": True}
    flags |= {"num_sampling_steps": 3} | options
    return [word for key, value in flags.items() for word in (f"--{key}", *str(value).split("="))]


def run_sample(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["image_sample.py", *flags])
    script_util.run(image_sample.main)


def run_export(monkeypatch, **flags):
    words = [f"--{key}={value}" for key, value in flags.items()]
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    script_util.run(export.main)


def generators(seed, num):
    """One per image, as image_sample.py has them."""
    return [torch.Generator().manual_seed(fold_seed(seed, i)) for i in range(num)]


def read(path):
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"].astype(int), arrays["arr_1"]


# ---------------------------------------------------------------- attention


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTENTION_LENGTHS = (1, 17, 128, 144, 160, 176, 256)


def draw_attention(length, width, kept, dtype=torch.float32, samples=2, heads=2, grid=None):
    """Inputs of attention, packed as the qkv layer leaves them, with a gradient of the output."""
    torch.manual_seed(0)
    if grid is None:
        side = max(side for side in range(1, 17) if length % side == 0)
        grid = (16, 16) if kept else (side, length // side)
    tokens = grid[0] * grid[1]
    positions = torch.rand(samples, tokens).argsort(1)[:, :length].sort(1).values.to(DEVICE) if kept else None
    qkv = torch.randn(samples, length, 3, heads, width).to(DEVICE, dtype)
    table = torch.randn((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads).to(DEVICE)
    return qkv, table, positions, grid, torch.randn(samples, heads, length, width).to(DEVICE, dtype)


def attend(kind, qkv, table, positions, grid, grad_out):
    """Output and the gradients of q, k, v and table, in float64: of an implementation, or written out."""
    dtype = torch.float64 if kind == "exact" else qkv.dtype
    qkv = qkv.to(dtype, copy=True).requires_grad_()
    table = table.to(torch.float64 if kind == "exact" else torch.float32, copy=True).requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if kind in ("sdpa", "triton", "auto"):
        out = relative_attention(q, k, v, table, positions, grid, kind)
    else:
        index = relative_position_index(*grid).to(DEVICE)
        rows = index[None] if positions is None else gather_pairs(index, positions)
        bias = F.embedding(rows, table).permute(0, 3, 1, 2).to(dtype)
        out = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
    out.backward(grad_out.to(dtype))
    return [value.double() for value in (out.detach(), *qkv.grad.unbind(2), table.grad)]


def check_attention(length, width, kept, dtype, kinds=("triton", "sdpa"), **options):
    inputs = draw_attention(length, width, kept, dtype, **options)
    exact = attend("exact", *inputs)
    # In single precision both err by roundings only, and which of the two rounds better is chance.
    floor = 1e-5 if dtype != torch.float32 else 2e-5
    for kind in kinds:
        values = zip(attend(kind, *inputs), attend("eager", *inputs), exact, strict=True)
        for name, (ours, eager, true) in zip(("out", "q", "k", "v", "table"), values, strict=True):
            error, allowed = (ours - true).abs().max().item(), 2 * (eager - true).abs().max().item() + floor
            assert error <= allowed, f"{kind}, {name}: an error of {error:.2e}, allowed {allowed:.2e}"


# ---------------------------------------------------------------- editing and the web page


IMAGE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
HOLE = np.zeros((8, 8), dtype=bool)
HOLE[2:6, 3:] = True


def sample_config(model_path, *words):
    """A `SampleConfig` of flags, guided."""
    flags = ["--model_path", str(model_path), "--cfg_cond", *map(str, words)]
    return script_util.parse_flags(SampleConfig, "", flags)


def painting(image, paint, scale=1):
    """What an editor holds of an image and an (H, W) uint8 paint, both enlarged."""
    layer = np.zeros((*paint.shape, 4), dtype=np.uint8)
    layer[:, :, 3] = paint
    opaque = np.concatenate([image, np.full((*image.shape[:2], 1), 255, dtype=np.uint8)], axis=2)
    enlarge = [array.repeat(scale, axis=0).repeat(scale, axis=1) for array in (opaque, layer)]
    return {"background": enlarge[0], "layers": [enlarge[1]]}


# ---------------------------------------------------------------- evaluation


def write_npz(path, members):
    """An npz whose members are given as arrays, or as the raw bytes of a npy file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in members.items():
            if not isinstance(member, bytes):
                buffer = io.BytesIO()
                np.save(buffer, member)
                member = buffer.getvalue()
            archive.writestr(f"{name}.npy", member)
    return path


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def half_distances(u, v):
    """ADM's rule in numpy: half precision after every operation, sums in single precision."""
    u, v = u.astype(np.float16), v.astype(np.float16)
    norms = [(x * x).astype(np.float32).sum(1).astype(np.float16) for x in (u, v)]
    products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
    return np.maximum(norms[0][:, None] - np.float16(2) * products + norms[1], np.float16(0)).astype(np.float32)


def adm_distances(u, v, tile=10_000):
    """ADM's formula and rule in eager TensorFlow, each tile by itself: in half precision where it is finite in it."""
    from evaluations.inception_tensorflow import import_tensorflow

    tf = import_tensorflow()

    def formula(u, v):
        norm_u = tf.reshape(tf.reduce_sum(tf.square(u), 1), [-1, 1])
        norm_v = tf.reshape(tf.reduce_sum(tf.square(v), 1), [1, -1])
        return tf.maximum(norm_u - 2 * tf.matmul(u, v, False, True) + norm_v, 0.0)

    def of_tile(u, v):
        half = formula(tf.cast(u, tf.float16), tf.cast(v, tf.float16)).numpy()
        return half.astype(np.float32) if np.isfinite(half).all() else formula(u, v).numpy()

    with tf.device("CPU"):
        rows, columns = range(0, len(u), tile), range(0, len(v), tile)
        return np.block([[of_tile(u[i : i + tile], v[j : j + tile]) for j in columns] for i in rows])


def exact_distances(u, v):
    return ((u[:, None].astype(np.float64) - v[None]) ** 2).sum(-1)


def by_definition(reference, samples):
    """All four numbers, from whole matrices of distances."""
    across = half_distances(reference, samples)
    radii, sample_radii = (np.sort(half_distances(f, f), axis=1)[:, 3] for f in (reference, samples))
    wide = exact_distances(reference, samples) <= np.sort(exact_distances(reference, reference), axis=1)[:, [5]]
    return {
        "precision": (across <= radii[:, None]).any(0).mean(),
        "recall": (across <= sample_radii).any(1).mean(),
        "density": wide.sum(0).mean() / 5,
        "coverage": wide.any(1).mean(),
    }


def small_features(path, images):
    """The small graph written out in float64."""
    weights = graph_constants(path)
    x = (
        torch.from_numpy(images).double().permute(0, 3, 1, 2)[:, :, ::2, ::2]
    )  # from 32 to 16 TensorFlow 1 takes every other
    x = (x - 128) / 128

    def layer(x, name, stride):
        x = F.pad(x, (0, 1, 0, 1)) if stride == 2 else F.pad(x, (1, 1, 1, 1))
        x = F.conv2d(x, weights[f"{name}/conv2d_params"].permute(3, 2, 0, 1), stride=stride)
        norm = {key: weights[f"{name}/batchnorm/{key}"][:, None, None] for key in
                ("moving_mean", "moving_variance", "beta", "gamma")}  # fmt: skip
        x = (x - norm["moving_mean"]) / (norm["moving_variance"] + 0.001).sqrt() * norm["gamma"] + norm["beta"]
        return x.relu()

    spatial = layer(x, "mixed_6/conv", 2)
    pool = layer(spatial, "last", 1).mean(dim=(2, 3))
    spatial = spatial[:, :7].permute(0, 2, 3, 1).flatten(1)
    return {"pool": pool, "spatial": spatial, "logits": pool @ weights["softmax/weights"]}


def graph_constants(path):
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.util.tensor_util import make_ndarray

    nodes = GraphDef.FromString(path.read_bytes()).node
    return {
        n.name: torch.from_numpy(make_ndarray(n.attr["value"].tensor).copy()).double() for n in nodes if n.op == "Const"
    }


def crops(count, seed, size=32):
    """Crops of real photos, (count, size, size, 3) uint8."""
    rng, photos = np.random.default_rng(seed), load_sample_images().images
    corners = zip(
        rng.integers(2, size=count),
        rng.integers(427 - size, size=count),
        rng.integers(640 - size, size=count),
        strict=True,
    )
    return np.stack([photos[p][y : y + size, x : x + size] for p, y, x in corners])


def evaluate(monkeypatch, capsys, *arguments):
    """Run the command. Returns its exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["evaluator.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        console.run(evaluator.main)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def numbers(output):
    lines = [line.split(": ") for line in output.splitlines() if ": " in line]
    return {name: float(value) for name, value in lines if " to " not in value and "+-" not in value}
