"""Finding the images of --data_dir: which places, on all ranks, and alike for training, caching and packing."""

import json
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import encode_latents
import image_train
import numpy as np
import pytest
import torch
from helpers import REPO, assert_same, find, pack, run_train, tensors, train_flags, write_images
from PIL import Image

from masked_diffusion import dist_util, script_util
from masked_diffusion.image_datasets import (
    ImageDataset,
    data_signature,
    list_image_files,
    load_data,
    relative_names,
)
from masked_diffusion.images import finding
from masked_diffusion.images import index as image_index
from masked_diffusion.images.index import HEADER_NAME
from masked_diffusion.latents.cache import LatentCache
from masked_diffusion.training.data import CachedNames
from masked_diffusion.utils import image_headers
from masked_diffusion.utils.errors import UserError

fork_context = multiprocessing.get_context("fork")
PHOTOS = REPO.parent / "shared" / "data" / "imagenet_sample_120.tar"


# ---------------------------------------------------------------- places


def test_unknown_schemes_are_refused_by_name(tmp_path):
    for read in (list_image_files, lambda place: find(place, tmp_path / "index")):
        with pytest.raises(UserError, match=r"^--data_dir s3://a/b: s3:// cannot be read, only gs:// .*az:// .*: copy"):
            read("s3://a/b")
        with pytest.raises(UserError, match="https:// cannot be read"):
            read("https://example.org/images")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        find(tmp_path / "nowhere", tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_places_where_an_index_cannot_be(tmp_path):
    with pytest.raises(UserError, match="--index gs://a is remote: name a local folder"):
        finding.check_index_place("gs://a", str(tmp_path))
    with pytest.raises(UserError, match=r"--index .*/a/b is in --data_dir: name a folder outside"):
        finding.check_index_place(str(tmp_path / "a" / "b"), str(tmp_path))
    finding.check_index_place(str(tmp_path / "index"), str(tmp_path / "images"))
    write_images(tmp_path / "images", ["a_0.png"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/index/lock could not be written \(Not a directory\)"):
        find(tmp_path / "images", tmp_path / "file" / "index")


class Bucket:
    """Stands for blobfile: `gs://bucket` is a local folder."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.real = image_index.bf
        for name in ("images.index", "images.listing", "images.sequence", "images.shards", "image_datasets"):
            monkeypatch.setattr(f"masked_diffusion.{name}.bf", self)
        monkeypatch.setattr(image_headers, "bf", self)

    def __getattr__(self, name):
        function = getattr(self.real, name)
        return lambda path, *args, **kwargs: function(path.replace("gs://bucket", str(self.folder)), *args, **kwargs)

    def join(self, *parts):
        return os.path.join(*parts)


def test_a_folder_in_a_bucket(odd_folder, tmp_path, monkeypatch, made):
    images = shutil.copytree(odd_folder, tmp_path / "images")
    Bucket(images, monkeypatch)
    for _ in range(2):
        index = find("gs://bucket", tmp_path / "index")
    assert len(made) == 1 and list(index.relative()) == list(relative_names(list_image_files(odd_folder), odd_folder))
    assert index[0].startswith("gs://bucket/") and index.read(3) == (images / index.relative()[3]).read_bytes()
    assert index.sizes().min() == 3 and len(index.sizes()) == 27
    os.utime(images / "a_tiny.png")
    find("gs://bucket", tmp_path / "index")
    assert len(made) == 2


# ---------------------------------------------------------------- ranks


def in_two_ranks(function, timeout=120):
    """Exit codes of two forked ranks that call a function with their number."""
    with dist_util.socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(number):
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        function(number)

    ranks = [fork_context.Process(target=rank, args=(number,)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
    return [process.exitcode for process in ranks]


@pytest.fixture
def short_folder():
    """For sockets, whose paths have at most 107 characters. A forked rank that ends leaves it alone."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("visible", [True, False])
def test_rank_0_alone_lists_and_all_have_the_batches_of_the_list(
    odd_folder, tmp_path, short_folder, monkeypatch, visible
):
    monkeypatch.setattr(finding.tempfile, "gettempdir", lambda: str(short_folder))
    monkeypatch.setattr(finding, "BLOCK", 100)
    stale = short_folder / f"{finding.COPIES}stale"
    stale.mkdir()
    os.utime(stale, (1, 1))
    for _ in range(2):
        find(odd_folder, tmp_path / "hidden")

    def rank(number):
        dist_util.join_process_group()
        if number:
            monkeypatch.setattr(finding, "_find", None)
        if not visible:  # each rank is a node of its own, and the second one does not see the index
            monkeypatch.setenv("LOCAL_RANK", "0")
            opened = finding._open
            monkeypatch.setattr(
                finding,
                "_open",
                lambda folder, *args: None if number and folder == tmp_path / "index" else opened(folder, *args),
            )
        index = finding.find_images(odd_folder, tmp_path / "index")
        assert (index.folder == tmp_path / "index") == (visible or number == 0)
        batches = load_data(data_dir=odd_folder, paths=index, batch_size=4, image_size=8, class_cond=True, seed=3)
        torch.save([next(batches) for _ in range(4)], tmp_path / f"rank{number}.pt")
        del batches
        dist_util.cleanup()
        finding.atexit._run_exitfuncs()  # multiprocessing leaves without them

    assert in_two_ranks(rank) == [0, 0]
    expected = load_data(data_dir=odd_folder, batch_size=8, image_size=8, class_cond=True, seed=3)
    ranks = [torch.load(tmp_path / f"rank{number}.pt", weights_only=True) for number in range(2)]
    for step in range(4):
        pixels, cond = next(expected)
        assert torch.equal(torch.cat([batches[step][0] for batches in ranks]), pixels)
        assert torch.equal(torch.cat([batches[step][1]["y"] for batches in ranks]), cond["y"])
    left = [] if not visible else [stale]  # a copy that nobody uses any more is removed by the next one
    assert list(short_folder.glob(f"{finding.COPIES}*")) == left


def test_a_copy_that_cannot_be_written_is_one_sentence_on_all_ranks(odd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(finding.tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    opened = finding._open

    def rank(number):
        dist_util.join_process_group()
        monkeypatch.setattr(finding, "_open", lambda *args: None if number else opened(*args))
        with pytest.raises(UserError, match=r"could not be written .*TMPDIR"):
            finding.find_images(odd_folder, tmp_path / "index")

    assert in_two_ranks(rank) == [0, 0]


# ---------------------------------------------------------------- training, caching and packing


def test_a_run_that_began_without_an_index_goes_on(odd_folder, tmp_path, monkeypatch, made):
    """The list as older versions had it, and the index, give one run."""
    options = {"num_workers": 0, "max_steps": 2, "on_bad_image": "skip"}
    with monkeypatch.context() as patch:
        patch.setattr("masked_diffusion.training.data.find_images", lambda folder, *args: list_image_files(folder))
        run_train(patch, train_flags(odd_folder, tmp_path / "old", **options))
    assert made == [] and not (tmp_path / "old" / "data_index").exists()
    run_train(monkeypatch, train_flags(odd_folder, tmp_path / "old", **options | {"max_steps": 4}))
    run_train(monkeypatch, train_flags(odd_folder, tmp_path / "new", **options | {"max_steps": 4}))
    assert_same(tensors(tmp_path / "old", 4), tensors(tmp_path / "new", 4))
    assert len(made) == 2 and (tmp_path / "new" / "data_index" / HEADER_NAME).exists()


def write_mix(folder):
    """Images of all kinds that training reads."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 30, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x112] = 6
    palette = Image.fromarray(pixels[:, :, :3]).quantize(16)
    kinds = {
        "a_tiny.png": (Image.fromarray(pixels[:2, :3, :3]), {}),
        "a_cmyk.jpg": (Image.fromarray(pixels, "CMYK"), {}),
        "b_grey.jpg": (Image.fromarray(pixels[:, :, 0]), {}),
        "b_palette.png": (palette, {"transparency": 3}),
        "b_16bit.png": (Image.fromarray(rng.integers(0, 65536, (33, 35)).astype(np.uint16)), {}),
        "c_rotated.jpg": (Image.fromarray(pixels[:, :, :3]), {"exif": exif}),
        "c_animated.gif": (palette, {"save_all": True, "append_images": [palette]}),
        "c_alpha.png": (Image.fromarray(pixels, "RGBA"), {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    return sorted(kinds)


def encode(monkeypatch, folder, latent_dir, *words):
    words = ["--data_dir", folder, "--latent_dir", latent_dir, "--num_workers", 0, "--shard_size", 3, *words]
    monkeypatch.setattr(sys, "argv", ["encode_latents.py", *map(str, words)])
    script_util.run(encode_latents.main)


@pytest.mark.parametrize("with_photos", [False, True])
def test_all_kinds_train_encode_and_pack_with_default_flags(tmp_path, monkeypatch, vae_folder, capsys, with_photos):
    folder = tmp_path / "images"
    names = write_mix(folder)
    if with_photos:
        if not PHOTOS.exists():
            pytest.skip(f"{PHOTOS.name} is not here")
        with tarfile.open(PHOTOS) as tar:
            for member in [member for member in tar if member.isfile()][::4]:
                names.append(f"photo_{Path(member.name).name}")
                (folder / names[-1]).write_bytes(tar.extractfile(member).read())
        names.sort()
    run_train(monkeypatch, train_flags(folder, tmp_path / "run", max_steps=1, num_workers=0))
    assert "1 images are smaller than half of --image_size 8" in capsys.readouterr().out
    encode(monkeypatch, folder, tmp_path / "latents", "--vae", vae_folder, "--image_size", 16)
    assert CachedNames(LatentCache(tmp_path / "latents"))[len(names) - 1] == names[-1]
    shards = list_image_files(pack(folder, tmp_path / "packed"))
    assert list(shards.relative()) == list(CachedNames(LatentCache(tmp_path / "latents"))) == names


def test_bad_images_are_decided_on_alike(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    write_mix(folder)
    (folder / "a_broken.png").write_bytes(b"no image")
    flags = train_flags(folder, tmp_path / "run", max_steps=1, num_workers=0, batch_size=4)
    for run in (
        lambda: run_train(monkeypatch, flags),
        lambda: encode(monkeypatch, folder, tmp_path / "latents", "--vae", "identity", "--image_size", 8),
    ):
        with pytest.raises(SystemExit):
            run()
        assert "error: 1 images cannot be used, the first:" in capsys.readouterr().err
    assert not (tmp_path / "latents" / "latents.json").exists()
    run_train(monkeypatch, [*flags, "--on_bad_image=skip"])
    words = ["--vae", "identity", "--image_size", 8, "--on_bad_image", "skip"]
    encode(monkeypatch, folder, tmp_path / "latents", *words)
    shards = list_image_files(pack(folder, tmp_path / "packed", on_bad_image="skip"))
    signatures = {
        json.loads((tmp_path / "run" / "config.json").read_text())["data_signature"],
        LatentCache(tmp_path / "latents").header["files_sha256"],
        data_signature(shards.relative()),
    }
    assert len(signatures) == 1 and len(shards) == 8


def test_the_cache_holds_the_next_image_in_the_place_of_a_truncated_one(tmp_path, monkeypatch):
    """As training does, with its label: a header tells nothing of the pixels."""
    folder = tmp_path / "images"
    paths = write_images(folder, ["a_0.jpg", "b_1.jpg", "c_2.jpg", "c_3.jpg"], size=(40, 40))
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:900])
    words = ["--vae", "identity", "--image_size", 8]
    with pytest.raises(SystemExit):
        encode(monkeypatch, folder, tmp_path / "latents", *words)
    encode(monkeypatch, folder, tmp_path / "latents", *words, "--on_bad_image", "skip")
    cache = LatentCache(tmp_path / "latents")
    described = [cache.describe(shard) for shard in range(2)]
    assert [name for shard in described for name in shard["files"]] == ["a_0.jpg", "c_2.jpg", "c_2.jpg", "c_3.jpg"]
    assert [label for shard in described for label in shard["labels"]] == [0, 2, 2, 2]
    live = ImageDataset(8, list_image_files(str(folder)), random_flip=False, on_bad_image="skip")
    np.testing.assert_array_equal(cache.open(0)[1, 0, 0], live[1][0].astype(np.float16))


def test_training_takes_the_index_that_the_flag_names(tmp_path, monkeypatch, made, capsys):
    write_mix(tmp_path / "images")
    flags = train_flags(tmp_path / "images", tmp_path / "a", max_steps=1, num_workers=0, index=tmp_path / "index")
    run_train(monkeypatch, flags)
    encode(monkeypatch, tmp_path / "images", tmp_path / "b", "--vae=identity", f"--index={tmp_path / 'index'}")
    assert len(made) == 1
    monkeypatch.setattr(sys, "argv", ["image_train.py", *flags, f"--index={tmp_path / 'images' / 'index'}"])
    with pytest.raises(SystemExit):
        script_util.run(image_train.main)
    assert "is in --data_dir: name a folder outside" in capsys.readouterr().err
    assert not (tmp_path / "images" / "index").exists()
