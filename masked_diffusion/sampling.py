"""Drawing images: one generator per image, shards on the disk, one npz at the end."""

import io
import json
import shutil
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from . import dist_util, logger
from .checkpoint import atomic_write, write_json
from .precision import autocast
from .random_util import PerSampleRandom, fold_seed

CLASS_RULES = ("random", "balanced")


def choose_labels(indices, class_rule, num_classes, seed):
    """(n,) int64 labels of the images `indices`.

    :param class_rule: `random`, a function of (seed, index); or `balanced`, the index modulo the number of classes.
    """
    if class_rule not in CLASS_RULES:
        raise ValueError(f"class_rule is {class_rule!r}: choose one of {', '.join(CLASS_RULES)}")
    if class_rule == "balanced":
        return torch.tensor([int(i) % max(num_classes, 1) for i in indices])
    return torch.tensor([fold_seed(seed, int(i), 1) % max(num_classes, 1) for i in indices])


def guided(model, cfg_scale=None, diffusion_steps=1000, scale_pow=4.0):
    """A denoiser of n rows that guides a model of 2n rows (`forward_with_cfg`); the model itself without a scale."""
    if cfg_scale is None:
        return model

    def denoise(x, t, y):
        nulls = torch.full_like(y, model.null_label)
        out = model.forward_with_cfg(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nulls]), cfg_scale, diffusion_steps, scale_pow
        )
        return out[: len(x)]

    return denoise


class Sampler:
    """Draws images by index.

    :param model: the denoiser; :param diffusion: a (respaced) diffusion; :param first_stage: decodes its samples.
    :param cfg_scale, scale_pow: guidance; no guidance without a scale.
    :raises ValueError: when guidance is asked of a model without a null class.
    """

    def __init__(
        self,
        model,
        diffusion,
        first_stage,
        *,
        cfg_scale=None,
        scale_pow=4.0,
        use_ddim=False,
        clip_denoised=False,
        precision="fp32",
        seed=0,
    ):
        if cfg_scale is not None and model.null_label is None:
            raise ValueError("guidance needs a null class, which this model was trained without: use --cfg_cond False")
        self.model, self.first_stage, self.seed, self.clip_denoised = model, first_stage, seed, clip_denoised
        self.loop = diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop
        guided_model = guided(model, cfg_scale, diffusion.original_num_steps, scale_pow)
        self.denoise = autocast(guided_model, precision)
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def __call__(self, indices, labels):
        """(n,) indices and (n,) labels -> (n, H, W, 3) uint8 images."""
        random = PerSampleRandom(self.seed, indices, self.device)
        shape = (self.model.in_channels, self.model.input_size, self.model.input_size)
        latents = self.loop(
            self.denoise,
            (len(indices), *shape),
            noise=random.randn(*shape),
            clip_denoised=self.clip_denoised,
            model_kwargs={"y": labels.to(self.device)},
            randn_like=random.randn_like,
        )
        return to_uint8(self.first_stage.decode(latents))


def to_uint8(images):
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8 numpy."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


class ShardStore:
    """Finished images of a run: one npz per batch in a folder, each with the indices it holds.

    :param path: the npz that they will be merged into; the shards lie in a folder beside it. All ranks share it.
    :param settings: what the images are a function of, as JSON values. They go into the npz.
    :raises ValueError: when shards or npz are there and were made with other settings.
    """

    def __init__(self, path, settings):
        self.path, self.settings = Path(path), settings
        self.folder = self.path.with_suffix(".shards")
        described = self.folder / "settings.json"
        if self.finished():
            with np.load(self.path, allow_pickle=False) as arrays:
                self._check(self.path, json.loads(str(arrays["settings"])))
        elif described.exists():
            self._check(self.folder, json.loads(described.read_text()))
        dist_util.barrier()
        if dist_util.is_main() and not self.finished():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(described, settings)
        dist_util.barrier()

    def _check(self, place, found):
        different = [key for key, value in self.settings.items() if found.get(key) != value]
        if different:
            key = different[0]
            raise ValueError(
                f"{place} was made with {key} {found.get(key)}, now it is {self.settings[key]}: "
                "choose another --log_dir, or remove it"
            )

    def finished(self):
        return self.path.exists()

    def shards(self):
        return sorted(self.folder.glob("shard_*.npz"))

    def missing(self, num_samples):
        """The indices below `num_samples` that no shard holds, ascending."""
        held = set()
        for shard in self.shards():
            with np.load(shard, allow_pickle=False) as arrays:
                held.update(arrays["indices"].tolist())
        return [i for i in range(num_samples) if i not in held]

    def write(self, indices, images, labels):
        buffer = io.BytesIO()
        np.savez(buffer, indices=np.asarray(indices), images=images, labels=np.asarray(labels))
        with atomic_write(self.folder / f"shard_{indices[0]:06d}_{indices[-1]:06d}.npz") as file:
            file.write(buffer.getbuffer())

    def merge(self, num_samples):
        """Write the npz: images [0, num_samples) in order as `arr_0`, their labels as `arr_1`, and the settings.

        One shard at a time is in memory; the folder of shards is removed at the end.

        :return: the first images, at most 64.
        """
        labels = np.zeros(num_samples, dtype=np.int64)
        with np.load(self.shards()[0], allow_pickle=False) as arrays:
            shape = (num_samples, *arrays["images"].shape[1:])
        scratch = self.folder / "merged.npy"
        images = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.uint8, shape=shape, version=(1, 0))
        for shard in self.shards():
            with np.load(shard, allow_pickle=False) as arrays:
                images[arrays["indices"]] = arrays["images"]
                labels[arrays["indices"]] = arrays["labels"]
        images.flush()
        first = images[:64].copy()
        with atomic_write(self.path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.write(scratch, "arr_0.npy")
            for name, array in (("arr_1", labels), ("settings", np.array(json.dumps(self.settings)))):
                buffer = io.BytesIO()
                np.save(buffer, array)
                archive.writestr(f"{name}.npy", buffer.getvalue())
        shutil.rmtree(self.folder)
        return first


def draw_samples(sampler, store, num_samples, batch_size, class_rule):
    """Draw what the store lacks of `num_samples` images, shared among the ranks."""
    start = time.perf_counter()
    missing = store.missing(num_samples)
    dist_util.barrier()  # before anyone writes: all ranks share out the same list
    world_size = dist_util.get_world_size()
    if len(missing) < num_samples:
        logger.log(f"{num_samples - len(missing)} of {num_samples} images are there already")
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    own = batches[dist_util.get_rank() :: world_size]
    bar = tqdm(total=len(missing), unit="image", disable=None if dist_util.is_main() else True)
    done, last_log = 0, start
    for batch in own:
        labels = choose_labels(batch, class_rule, sampler.model.num_classes, sampler.seed)
        store.write(batch, sampler(batch, labels), labels)
        done = min(done + len(batch) * world_size, len(missing))
        bar.update(done - bar.n)
        now = time.perf_counter()
        if now - last_log > 10 or done == len(missing):
            speed = done / (now - start)
            eta = timedelta(seconds=round((len(missing) - done) / speed))
            logger.log(f"{done}/{len(missing)} images  {speed:.2f} images/s  ETA {eta}")
            last_log = now
    bar.close()
    dist_util.barrier()


def save_grid(path, images, columns=8, scale=1):
    """Write (N, H, W, 3) uint8 images as one PNG, row by row, each enlarged `scale` times without smoothing.

    :return: the (H, W, 3) uint8 sheet.
    """
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows, columns, height, width, channels), 255, dtype=np.uint8)
    sheet.reshape(-1, height, width, channels)[:n] = images
    pixels = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="png")
    return pixels
