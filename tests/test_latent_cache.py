"""Cached posteriors: equal to live encoding, resumable, the same on any number of ranks, refused where unfit."""

import copy
import errno
import functools
import hashlib
import itertools
import json
import os
import sys

import encode_latents as script
import numpy as np
import pytest
import torch
from helpers import run_script, write_images

from masked_diffusion import script_util
from masked_diffusion.image_datasets import ImageDataset, data_signature, list_image_files, load_data, relative_names
from masked_diffusion.latents import cache as latent_cache
from masked_diffusion.latents.autoencoder import create_first_stage
from masked_diffusion.latents.cache import LatentCache, LatentDataset, encode_latents, fingerprint, load_latents
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.random_numbers import GlobalBatchRandom

NUM_IMAGES, SIZE = 13, 32


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, [f"{'sub/' * (i % 2)}{'cab'[i % 3]}_{i}.png" for i in range(NUM_IMAGES)], size=(36, 40))
    return str(folder)


@pytest.fixture(scope="module")
def stages(vae_folder):
    return {name: create_first_stage(source) for name, source in (("vae", vae_folder), ("identity", "identity"))}


def encode(images, folder, stage, **options):
    defaults = {"vae": "some", "image_size": SIZE, "batch_size": 3, "shard_size": 5, "class_cond": True}
    defaults |= {"num_workers": 0, "verify": False}
    encode_latents(data_dir=images, latent_dir=str(folder), first_stage=stage, **defaults | options)


@pytest.fixture(scope="module")
def caches(images, stages, tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in stages}
    for name, stage in stages.items():
        encode(images, folders[name], stage)
    return folders


@pytest.fixture
def copied(caches, tmp_path):
    """A cache of the VAE to spoil."""
    for path in caches["vae"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".npy", ".json")}


def rounding(values):
    """How far float16 may lie from float32 values: half a unit in the last place, of subnormals too."""
    return values.abs() * 2**-11 + 2**-25


def another(stage):
    """A VAE with one number changed."""
    other = copy.deepcopy(stage)
    next(other.vae.parameters()).view(-1)[0] += 1e-3
    return other


# ---------------------------------------------------------------- equal to live encoding


@pytest.mark.parametrize("name", ["vae", "identity"])
@pytest.mark.parametrize("flip", [0, 1])
def test_posteriors_are_those_of_live_encoding(images, stages, caches, name, flip):
    cache, live = LatentCache(caches[name]), ImageDataset(SIZE, list_image_files(images), random_flip=False)
    cached = torch.from_numpy(np.concatenate([cache.open(shard)[:, flip] for shard in range(3)])).float()
    pixels = torch.stack([torch.from_numpy(np.flip(live[i][0], 2 if flip else ()).copy()) for i in range(NUM_IMAGES)])
    moments = stages[name].moments(pixels)
    assert ((cached - moments).abs() <= rounding(moments) + 1e-6).all()
    assert cached.shape[1] == (1 if name == "identity" else 2) and (cached[:, 1:] > 0).all()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", ["vae", "identity"])
def test_training_gets_the_latents_of_live_encoding(images, stages, caches, name, num_workers):
    stage, seed, start_step = stages[name], 7, 2
    options = {"batch_size": 4, "image_size": SIZE, "class_cond": True, "seed": seed, "start_step": start_step}
    live = load_data(data_dir=images, num_workers=0, **options)
    cached = load_latents(latent_dir=caches[name], first_stage=stage, num_workers=num_workers, **options)
    for step in range(start_step, start_step + 8):
        (pixels, cond), (moments, cached_cond) = next(live), next(cached)
        assert moments.dtype == torch.float32 and cached_cond["y"].dtype == torch.int64
        assert torch.equal(cond["y"], cached_cond["y"])
        ours, theirs = (GlobalBatchRandom(seed, step, "cpu").randn_like for _ in range(2))
        latents, expected = stage.sample(moments, ours), stage.encode(pixels, theirs)
        noise = GlobalBatchRandom(seed, step, "cpu").randn_like(moments[:, 0])
        bound = rounding(moments[:, 0]) + rounding(moments[:, 1:]).sum(1) * noise.abs() + 1e-6
        assert ((latents - expected).abs() <= bound * stage.scale).all()


def test_flips_follow_the_images(images, stages, caches):
    options = {"batch_size": NUM_IMAGES, "image_size": SIZE, "num_workers": 0}
    plain, flipped = (
        next(load_latents(latent_dir=caches["identity"], first_stage=stages["identity"], random_flip=flip, **options))
        for flip in (False, True)
    )
    mirrored = [torch.equal(a.flip(3), b) for a, b in zip(plain[0], flipped[0], strict=True)]
    assert 0 < sum(mirrored) < NUM_IMAGES and plain[1] == {}
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, plain[0], flipped[0], strict=True))


# ---------------------------------------------------------------- the files


def test_labels_and_names_are_read_without_arrays(images, copied):
    for path in copied.glob("*.npy"):
        path.unlink()
    cache = LatentCache(copied)
    described = [cache.describe(shard) for shard in range(len(cache))]
    files = [name for d in described for name in d["files"]]
    assert [f"{images}/{name}" for name in files] == list_image_files(images)
    names = [cache.header["classes"][label] for d in described for label in d["labels"]]
    assert names == [name.split("/")[-1][0] for name in files] and cache.header["classes"] == ["a", "b", "c"]
    assert [len(d["files"]) for d in described] == [5, 5, 3]


def test_arrays_are_checked_as_memory_maps_once(caches, monkeypatch):
    opened, load = [], np.load
    monkeypatch.setattr(np, "load", lambda *args, **options: opened.append(load(*args, **options)) or opened[-1])
    dataset = LatentDataset(caches["vae"], class_cond=True)
    items = [dataset[i] for i in range(NUM_IMAGES)]
    assert len(opened) == 3 and all(type(array) is np.memmap for array in opened)
    assert {type(moments) for moments, _ in items} == {np.ndarray} and all(m.base is None for m, _ in items)


def test_a_cache_without_labels(images, stages, tmp_path):
    encode(images, tmp_path, stages["identity"], class_cond=False)
    assert LatentCache(tmp_path).describe(0)["labels"] is None and LatentDataset(tmp_path)[0][1] == {}
    with pytest.raises(ValueError, match=r"made with class_cond False .*, now it is True"):
        LatentDataset(tmp_path, class_cond=True)


def test_latents_that_float16_cannot_hold_are_refused(images, tmp_path, stages):
    stage = copy.deepcopy(stages["identity"])
    stage.moments = lambda images: images.unsqueeze(1) * 1e6
    with pytest.raises(ValueError, match=r"a_10\.png to c_0\.png: a latent is infinite or NaN in float16"):
        encode(images, tmp_path, stage)
    assert not list(tmp_path.glob("shard_*"))


# ---------------------------------------------------------------- interrupted runs


@pytest.mark.parametrize("stop_at_call", [1, 5, 8])
def test_a_stopped_run_does_only_what_is_missing(images, stages, caches, tmp_path, stop_at_call):
    stage, calls = copy.copy(stages["vae"]), []

    def moments(batch):
        calls.append(len(batch))
        if len(calls) == stop_at_call:
            raise KeyboardInterrupt
        return stages["vae"].moments(batch)

    stage.moments = moments
    with pytest.raises(KeyboardInterrupt):
        encode(images, tmp_path, stage)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard_*")}
    encode(images, tmp_path, stage)
    # Two calls, plain and mirrored, for each of the two batches of the shards with five images.
    assert len(done) == 2 * ((stop_at_call - 1) // 4)
    assert sum(calls[stop_at_call:]) == 2 * (NUM_IMAGES - 5 * len(done) // 2)
    assert done.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard_*")}.items()
    assert contents(tmp_path) == contents(caches["vae"])


def test_what_a_kill_leaves_is_no_shard(images, stages, caches, copied, capsys):
    whole = contents(copied)
    (copied / "shard_00000.json").unlink()
    (copied / ".shard_00001.npy.123.partial").write_bytes(whole["shard_00001.npy"][:1000])
    (copied / "shard_00002.npy").write_bytes(whole["shard_00002.npy"][:-1])
    untouched = (copied / "shard_00001.npy").stat().st_mtime_ns
    encode(images, copied, stages["vae"])
    assert contents(copied) == whole and not list(copied.glob(".*"))
    assert (copied / "shard_00001.npy").stat().st_mtime_ns == untouched
    output = capsys.readouterr().out
    assert "1 of 3 shards are complete already" in output and "8/8 images" in output


def test_an_old_description_does_not_vouch_for_a_new_array(images, stages, copied, monkeypatch):
    (copied / "shard_00001.npy").write_bytes(b"")

    def stop(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(latent_cache, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        encode(images, copied, stages["vae"])
    cache = LatentCache(copied)
    assert len(cache.open(1)) == 5
    assert [cache.is_complete(shard) for shard in range(3)] == [True, False, True]


def test_verify_finds_and_mends_damage(images, stages, copied, capsys):
    whole = contents(copied)
    damaged = bytearray(whole["shard_00001.npy"])
    damaged[-7] ^= 1
    (copied / "shard_00001.npy").write_bytes(damaged)
    encode(images, copied, stages["vae"])
    assert "3 of 3 shards are complete already" in capsys.readouterr().out and contents(copied) != whole
    encode(images, copied, stages["vae"], verify=True)
    output = capsys.readouterr().out
    assert "shard_00001.npy is damaged" in output and "2 of 3 shards are complete already" in output
    assert contents(copied) == whole


def test_two_ranks_make_the_shards_of_one(images, vae_folder, tmp_path):
    flags = {"data_dir": images, "vae": vae_folder, "image_size": SIZE, "batch_size": 3, "shard_size": 5}
    flags |= {"num_workers": 1}
    for name, launcher in (("one", ()), ("two", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))):
        arguments = [f"--{key}={value}" for key, value in {**flags, "latent_dir": tmp_path / name}.items()]
        output = run_script("encode_latents.py", *arguments, launcher=launcher).stdout
        assert output.count("13/13 images") == 1 and output.count("is complete") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 7


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 64}, r"made with image_size 32 \(--vae some\), now it is 64"),
        ({"shard_size": 4}, r"made with shard_size 5 .*, now it is 4"),
        ({"class_cond": False}, r"made with class_cond True .*, now it is False"),
        ({"fast_decode": True}, r"made with fast_decode False .*, now it is True"),
    ],
)
def test_a_cache_of_other_settings_is_not_continued(images, stages, copied, options, message):
    before = contents(copied)
    with pytest.raises(ValueError, match=message):
        encode(images, copied, stages["vae"], **options)
    assert contents(copied) == before


def test_a_cache_of_other_images_or_another_vae_is_not_continued(images, stages, copied, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_images(other, [f"a_{i}.png" for i in range(NUM_IMAGES)])
    with pytest.raises(ValueError, match=r"made with files_sha256 \w{64} .*, now it is \w{64}"):
        encode(str(other), copied, stages["vae"])
    vae = another(stages["vae"])
    with pytest.raises(ValueError, match=f"vae_fingerprint {fingerprint(stages['vae'])} .* is {fingerprint(vae)}"):
        encode(images, copied, vae)


def test_the_fingerprint_is_of_the_weights(stages, vae_folder):
    assert fingerprint(stages["identity"]) == "identity"
    assert fingerprint(stages["vae"]) == fingerprint(create_first_stage(vae_folder))
    assert len({fingerprint(stages["vae"]), fingerprint(another(stages["vae"]))}) == 2


def load(folder, stage, **options):
    defaults = {"batch_size": 4, "image_size": SIZE, "class_cond": True, "num_workers": 0}
    return load_latents(latent_dir=folder, first_stage=stage, **defaults | options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 64}, r"made with image_size 32 \(--vae some\), now it is 64"),
        ({"random_crop": True}, r"made with crop center .*, now it is random"),
        ({"fast_decode": True}, r"made with fast_decode False .*, now it is True"),
        ({"batch_size": 14}, r"holds 13 images, fewer than one global batch of 14"),
    ],
)
def test_training_refuses_a_cache_that_does_not_fit(stages, caches, options, message):
    with pytest.raises(ValueError, match=message):
        load(caches["vae"], stages["vae"], **options)


def test_training_refuses_a_cache_of_another_vae(stages, caches):
    vae = another(stages["vae"])
    with pytest.raises(ValueError, match=f"vae_fingerprint {fingerprint(stages['vae'])} .* is {fingerprint(vae)}"):
        load(caches["vae"], vae)
    with pytest.raises(ValueError, match=r"made with vae_fingerprint identity .*, now it is \w{64}"):
        load(caches["identity"], vae)


def test_images_are_read_by_position_from_few_open_files(caches, monkeypatch):
    opened, advice = [], []

    class Counted(latent_cache._OpenFile):
        def __init__(self, path):
            super().__init__(path)
            opened.append(self.descriptor)

    monkeypatch.setattr(latent_cache, "_open_file", functools.lru_cache(maxsize=2)(Counted))
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advice.append(arguments[1:]))
    dataset = LatentDataset(caches["vae"], random_flip=True)
    shards = [dataset.cache.open(shard) for shard in range(3)]
    before, flips = len(os.listdir("/proc/self/fd")), set()
    for epoch, index in itertools.product(range(3), np.random.default_rng(0).permutation(NUM_IMAGES).tolist()):
        item, _ = dataset[index, epoch]
        both = np.array(shards[index // 5][index % 5], dtype=np.float32)
        (flip,) = (flip for flip in (0, 1) if np.array_equal(both[flip], item))
        flips.add((index, flip))
        assert item.dtype == np.float32 and item.flags.writeable
    assert len(flips) > NUM_IMAGES and len(opened) > 3
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert set(advice) == {(0, 0, os.POSIX_FADV_RANDOM)}


def test_a_shard_that_is_spoilt_during_training_is_named(copied):
    dataset = LatentDataset(copied)
    with (copied / "shard_00001.npy").open("r+b") as file:
        file.truncate(200)
    (copied / "shard_00002.npy").unlink()
    for index, message in (
        (7, r"shard_00001\.npy cannot be read \(it has been truncated\)"),
        (12, "shard_00002.*No such"),
    ):
        with pytest.raises(UserError, match=f"{message}.*run scripts/encode_latents"):
            dataset[index]


@pytest.mark.parametrize("content", [None, b"", b"no array", 0.5, "shape", "order"], ids=str)
def test_training_names_a_spoilt_shard(stages, copied, content):
    path = copied / "shard_00001.npy"
    if content is None:
        path.unlink()
    elif content == "order":
        np.save(path, np.asfortranarray(np.load(path)))
    elif content == "shape":
        np.save(path, np.zeros((4, 2, 2, 4, 4, 4), np.float16))
    else:
        path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"shard_00001\.npy cannot be read .*run scripts/encode_latents\.py again"):
        load(copied, stages["vae"])


def test_training_names_what_is_not_there_yet(stages, copied, tmp_path_factory):
    (copied / "shard_00002.json").unlink()
    with pytest.raises(ValueError, match=r"shard_00002\.json cannot be read .*run scripts/encode_latents\.py"):
        load(copied, stages["vae"])
    with pytest.raises(ValueError, match=r"latents\.json cannot be read .*run scripts/encode_latents\.py"):
        load(tmp_path_factory.mktemp("empty"), stages["vae"])


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "it holds a list instead of a dictionary"),
        ('{"shards": 3}', "its 'shards' is 3"),
        ('{"shards": [], "version": 1, "image_size": "32"}', "its 'image_size' is '32'"),
    ],
)
def test_a_header_of_another_shape_is_refused(copied, content, message):
    (copied / "latents.json").write_text(content)
    with pytest.raises(UserError, match=rf"latents\.json cannot be read \({message}\): run scripts/encode_latents"):
        LatentCache(copied)


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(images, stages, copied, monkeypatch):
    (copied / "shard_00001.json").unlink()

    def fill_disk(file, array, allow_pickle):
        file.write(array.tobytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", fill_disk)
    with pytest.raises(
        UserError, match=r"shard_00001\.npy could not be written \(No space left on device\): free some disk space"
    ):
        encode(images, copied, stages["vae"])
    monkeypatch.undo()
    assert not list(copied.glob(".*"))
    encode(images, copied, stages["vae"])


def test_images_and_their_cache_have_one_signature(images, caches):
    names = relative_names(list_image_files(images), images)
    assert LatentCache(caches["vae"]).header["files_sha256"] == data_signature(names)
    assert names == relative_names(list_image_files(f"{images}/"), f"{images}/")
    assert data_signature(["a", "b"]) == hashlib.sha256(b'["a", "b"]').hexdigest()  # what older caches hold
    assert len({data_signature(n) for n in (["a", "b"], ["b", "a"], ["ab"], ["a"], [])}) == 5


def test_a_cache_of_a_later_format_is_refused(stages, copied, monkeypatch):
    monkeypatch.setattr(latent_cache, "VERSION", 2)
    with pytest.raises(ValueError, match=r"made with version 1 .*, now it is 2"):
        load(copied, stages["vae"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 30}, "--image_size is 30: it must be a multiple of 8"),
        ({"shard_size": 0}, "--shard_size is 0: it must be at least 1"),
        ({"data_dir": ""}, "--data_dir is missing"),
        ({"latent_dir": ""}, "latent_dir is empty"),
        ({"data_dir": "/nowhere", "vae": "/no/vae"}, "/nowhere is not a folder"),
        ({"vae": "/no/vae"}, "no VAE at '/no/vae'"),
        ({"image_size": 64}, "was made with image_size 32"),
    ],
    ids=str,
)
def test_wrong_flags_end_in_one_sentence(images, vae_folder, copied, options, message, monkeypatch, capsys):
    flags = {"data_dir": images, "latent_dir": copied, "vae": vae_folder, "image_size": SIZE, "shard_size": 5} | options
    monkeypatch.setattr(sys, "argv", ["encode_latents.py", *(f"--{key}={value}" for key, value in flags.items())])
    with pytest.raises(SystemExit) as stop:
        script_util.run(script.main)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and message in error


def test_the_header_says_how_the_cache_was_made(stages, caches):
    header = json.loads((caches["vae"] / "latents.json").read_text())
    expected = {
        "version": 1, "vae": "some", "vae_fingerprint": fingerprint(stages["vae"]), "channels": 4, "latent_size": 4,
        "image_size": SIZE, "crop": "center", "num_images": NUM_IMAGES, "shard_size": 5, "class_cond": True,
        "fast_decode": False,
    }  # fmt: skip
    assert header | expected == header and len(header["shards"]) == 3


def test_a_cache_says_that_its_images_were_decoded_fast(stages, tmp_path):
    images, stage = tmp_path / "images", stages["identity"]
    write_images(images, [f"{'ab'[i % 2]}_{i}.jpg" for i in range(4)], size=(70, 91))
    encode(str(images), tmp_path / "fast", stage, fast_decode=True)
    with pytest.raises(UserError, match=r"made with fast_decode True .*, now it is False"):
        load(tmp_path / "fast", stage)
    data = load_data(
        data_dir=str(images), batch_size=4, image_size=SIZE, class_cond=True, num_workers=0, fast_decode=True
    )
    (pixels, _), (moments, _) = next(data), next(load(tmp_path / "fast", stage, fast_decode=True))
    torch.testing.assert_close(moments[:, 0], pixels, rtol=1e-3, atol=1e-3)


def test_a_cache_that_says_nothing_of_decoding_holds_exact_crops(stages, copied):
    header = json.loads((copied / "latents.json").read_text())
    del header["fast_decode"]
    (copied / "latents.json").write_text(json.dumps(header))
    assert len(next(load(copied, stages["vae"]))[0]) == 4
    with pytest.raises(UserError, match=r"made with fast_decode False"):
        load(copied, stages["vae"], fast_decode=True)
