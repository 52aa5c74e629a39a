"""Packed images give the batches of their folder; shards that do not fit are refused."""

import json
import os
import pickle
import re
import shutil
import sys
import tarfile
from pathlib import Path

import encode_latents
import numpy as np
import pytest
import torch
from helpers import REPO, assert_same, contents, pack, run_train, tensors, train_flags, write_images

from masked_diffusion import dist_util, script_util
from masked_diffusion.image_datasets import (
    ImageDataset,
    StreamSampler,
    data_signature,
    image_classes,
    list_image_files,
    load_data,
    relative_names,
)
from masked_diffusion.images import shards as image_shards
from masked_diffusion.images.shards import HEADER_NAME, NAMES_NAME, RECORDS_NAME, DamagedShard, ImageShards
from masked_diffusion.training import preflight
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.tar_shards import find_shared_stems, member_name

PHOTOS = REPO.parent / "shared" / "data" / "imagenet_sample_120.tar"


# ---------------------------------------------------------------- the layout


def webdataset_samples(tar):
    """`[(key, {extension: bytes})]` by WebDataset's rule: the key ends at the first dot of the file name."""
    samples = []
    for member in tar:
        key, extension = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name, re.DOTALL).groups()
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        assert extension.lower() not in samples[-1][1]
        samples[-1][1][extension.lower()] = tar.extractfile(member).read()
    return samples


def test_shards_are_tars_in_webdatasets_layout(odd_folder, packed_folder):
    paths = list_image_files(odd_folder)
    labels, _ = image_classes(paths)
    shards = sorted(Path(packed_folder).glob("*.tar"))
    assert [path.name for path in shards] == [f"images-{i:06d}.tar" for i in range(6)]
    samples = []
    for path in shards:
        with tarfile.open(path) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
            samples += webdataset_samples(tar)
    assert len({key for key, _ in samples}) == len(samples) == len(paths) == 27
    for (key, sample), path, label in zip(samples, paths, labels, strict=True):
        extension = path.rpartition(".")[2].lower()
        assert sample == {extension: Path(path).read_bytes(), "cls": str(label).encode()}
        assert os.path.basename(path).partition("_")[0].replace(".", "%2E") == os.path.basename(key).partition("_")[0]


def test_keys_are_those_of_the_files_where_nothing_is_in_the_way():
    assert member_name("n01440764_10026.JPEG", False) == "n01440764_10026.JPEG"
    assert member_name("a/b.c/d_1.5.png", False) == "a/b.c/d_1%2E5.png"
    assert find_shared_stems(["a/b_1.png", "b_1.png", "b_1.jpg", "b_1.x.jpg"]).tolist() == [False, True, True, False]


def test_the_webdataset_package_reads_the_shards(odd_folder, packed_folder):
    webdataset = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(Path(packed_folder).glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    paths = list_image_files(odd_folder)
    assert [int(sample["cls"]) for sample in samples] == image_classes(paths)[0].tolist()
    for sample, path in zip(samples, paths, strict=True):
        assert sample[path.rpartition(".")[2].lower()] == Path(path).read_bytes()


# ---------------------------------------------------------------- the same as the folder


def test_names_bytes_classes_and_signature_are_the_folders(odd_folder, packed_folder):
    paths, shards = list_image_files(odd_folder), list_image_files(f"{packed_folder}/")
    names = relative_names(paths, odd_folder)
    assert (
        [path.removeprefix(f"{packed_folder}/") for path in shards]
        == names
        == list(relative_names(shards, packed_folder))
    )
    assert data_signature(relative_names(shards, packed_folder)) == data_signature(names)
    assert [shards.read(i) for i in range(len(shards))] == [Path(path).read_bytes() for path in paths]
    part, part_names = shards[3:20:2], names[3:20:2]
    assert list(relative_names(part, packed_folder)) == part_names
    assert data_signature(relative_names(part, packed_folder)) == data_signature(part_names)
    assert part[-1] == shards[19] and part.take([1, 0])[0] == shards[5]
    for ours, theirs in ((shards, paths), (part, paths[3:20:2])):
        (labels, classes), (their_labels, their_classes) = image_classes(ours), image_classes(theirs)
        assert classes == their_classes and labels.dtype == np.int64
        np.testing.assert_array_equal(labels, their_labels)
    with pytest.raises(IndexError):
        shards[27]


def test_preflight_takes_from_the_index_what_it_reads_from_the_files(odd_folder, packed_folder):
    for size in (8, 40):
        found = []
        for place in (odd_folder, packed_folder):
            bad, rotated, tiny = preflight.inspect_images(list_image_files(place), size)
            kept = preflight.check_images(list_image_files(place), size, "error", place)
            names = list(relative_names(kept, place))
            found.append((bad, rotated.tolist(), tiny.tolist(), names, image_classes(kept)[1]))
        assert found[0] == found[1] and found[0][0] == {} and found[0][1]
        assert len(found[0][2]) == {8: 1, 40: 24}[size] and len(found[0][3]) == 27


def load_as(monkeypatch, rank, world_size, **options):
    monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: world_size)
    return load_data(batch_size=8 // world_size, image_size=8, class_cond=True, seed=5, **options)


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (2, 0), (4, 0), (1, 3), (2, 3), (4, 3)])
def test_batches_are_the_folders(odd_folder, packed_folder, monkeypatch, world_size, num_workers):
    options = {"random_crop": True, "num_workers": num_workers}
    for rank in range(world_size):
        theirs = load_as(monkeypatch, rank, world_size, data_dir=odd_folder, **options | {"num_workers": 0})
        ours = load_as(monkeypatch, rank, world_size, data_dir=packed_folder, **options)
        later = load_as(monkeypatch, rank, world_size, data_dir=packed_folder, start_step=5, **options)
        for step in range(8):  # 64 of 27 images: two epochs
            (pixels, cond), expected = next(ours), next(theirs)
            assert torch.equal(pixels, expected[0]) and torch.equal(cond["y"], expected[1]["y"])
            if step >= 5:
                pixels, cond = next(later)
                assert torch.equal(pixels, expected[0]) and torch.equal(cond["y"], expected[1]["y"])


def test_what_a_loader_process_is_sent_does_not_grow_with_the_images(packed_folder):
    shards = list_image_files(packed_folder)
    sent = pickle.dumps(shards)
    assert len(sent) < 200 + len(packed_folder)
    again = pickle.loads(sent)
    assert list(again) == list(shards) and again.read(7) == shards.read(7)
    assert list(pickle.loads(pickle.dumps(shards[2:5]))) == list(shards[2:5])


def test_more_shards_than_may_be_open(odd_folder, packed_folder, monkeypatch):
    monkeypatch.setattr(image_shards, "OPEN_SHARDS", 2)
    shards, before = ImageShards(packed_folder), len(os.listdir("/dev/fd"))
    expected = [Path(path).read_bytes() for path in list_image_files(odd_folder)]
    assert [shards.read(i) for i in (0, 26, 13, 7, 0, 20)] == [expected[i] for i in (0, 26, 13, 7, 0, 20)]
    assert len(os.listdir("/dev/fd")) == before + 2


def test_training_is_that_on_the_folder(odd_folder, packed_folder, tmp_path, monkeypatch):
    for name, place in (("ours", packed_folder), ("theirs", odd_folder)):
        options = {"on_bad_image": "skip", "random_crop": True, "max_steps": 2, "optimizer": "adamw", "num_workers": 0}
        run_train(monkeypatch, train_flags(place, tmp_path / name, **options))
    assert_same(tensors(tmp_path / "ours", 2), tensors(tmp_path / "theirs", 2))
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert ours["classes"] == theirs["classes"] and ours["data_signature"] == theirs["data_signature"]
    # The one goes on where the other stopped.
    run_train(monkeypatch, train_flags(odd_folder, tmp_path / "ours", **options | {"max_steps": 3}))


def test_latents_are_those_of_the_folder(odd_folder, packed_folder, tmp_path, monkeypatch):
    for name, place in (("ours", packed_folder), ("theirs", odd_folder)):
        words = ["--data_dir", place, "--latent_dir", tmp_path / name, "--vae", "identity", "--image_size", "8"]
        words += ["--num_workers", "0", "--shard_size", "10"]
        monkeypatch.setattr(sys, "argv", ["encode_latents.py", *map(str, words)])
        script_util.run(encode_latents.main)
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours == theirs and len(ours) == 7


def test_photos(tmp_path, monkeypatch):
    if not PHOTOS.exists():
        pytest.skip(f"{PHOTOS.name} is not here")
    with tarfile.open(PHOTOS) as tar:
        tar.extractall(tmp_path / "photos", filter="data")
    out = pack(tmp_path / "photos", tmp_path / "out", shard_size=50)
    ours, theirs = (ImageDataset(64, list_image_files(str(place)), seed=2) for place in (out, tmp_path / "photos"))
    for key in StreamSampler(120, 12, seed=3, rank=0, world_size=1).batch(4):
        np.testing.assert_array_equal(ours[key][0], theirs[key][0])


# ---------------------------------------------------------------- shards that do not fit


def change_header(copy, **changes):
    header = json.loads((copy / HEADER_NAME).read_text())
    (copy / HEADER_NAME).write_text(json.dumps(header | changes))


def test_a_shard_that_is_cut_short_or_missing(packed_copy):
    shard, good = packed_copy / "images-000001.tar", list_image_files(str(packed_copy))
    os.truncate(shard, 3000)
    with pytest.raises(
        DamagedShard, match=rf"^{shard} has 3000 bytes, the index says \d+: it is cut short or of .*--verify True.*$"
    ):
        list_image_files(str(packed_copy))
    dataset = ImageDataset(8, good, on_bad_image="skip")
    with pytest.raises(DamagedShard, match=r"\(in images-000001\.tar\) is damaged, its checksum is not that of the"):
        dataset[9]
    shard.unlink()
    with pytest.raises(DamagedShard, match=rf"^{shard} cannot be read \(No such file or directory\): run"):
        list_image_files(str(packed_copy))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_wrong_checksum(packed_copy, num_workers):
    shards = list_image_files(str(packed_copy))
    offset = int(np.load(packed_copy / RECORDS_NAME)["offset"][8])
    data = bytearray((packed_copy / "images-000001.tar").read_bytes())
    data[offset + 20] ^= 1
    (packed_copy / "images-000001.tar").write_bytes(data)
    loaded = load_data(
        data_dir=str(packed_copy),
        batch_size=9,
        image_size=8,
        deterministic=True,
        num_workers=num_workers,
        on_bad_image="skip",
    )
    with pytest.raises(UserError, match=rf"^{shards[8]} \(in images-000001\.tar\) is damaged, its checksum [^\n]*$"):
        next(loaded)


def test_a_missing_index(packed_copy):
    (packed_copy / HEADER_NAME).unlink()
    with pytest.raises(
        UserError, match=rf"^{packed_copy} has been packed in part, .* run scripts/pack_images\.py again, or copy"
    ):
        list_image_files(str(packed_copy))


def test_an_index_of_another_folder(odd_folder, packed_copy, tmp_path):
    other = Path(pack(odd_folder, tmp_path / "other", shard_size=4))
    for name in (HEADER_NAME, RECORDS_NAME, NAMES_NAME):
        shutil.copy(other / name, packed_copy / name)
    with pytest.raises(
        DamagedShard, match=r"images-00000\d\.tar has \d+ bytes, the index says \d+: it is cut short or of"
    ):
        list_image_files(str(packed_copy))
    write_images(tmp_path / "few", ["a_0.png"])
    shutil.copy(Path(pack(tmp_path / "few", tmp_path / "few_out")) / RECORDS_NAME, packed_copy / RECORDS_NAME)
    with pytest.raises(DamagedShard, match=r"image_shards\.npy holds \(1,\) instead of 27 images: run"):
        list_image_files(str(packed_copy))


@pytest.mark.parametrize("name", [RECORDS_NAME, NAMES_NAME])
def test_an_index_that_is_cut_short(packed_copy, name):
    os.truncate(packed_copy / name, 300)
    with pytest.raises(DamagedShard, match=rf"{name} cannot be read \(.*\): run"):
        list_image_files(str(packed_copy))


def test_names_of_another_folder(packed_copy):
    np.save(packed_copy / NAMES_NAME, np.zeros(9, dtype=np.uint8))
    with pytest.raises(DamagedShard, match=r"image_shards\.npy and image_shards_names\.npy are not of one folder"):
        list_image_files(str(packed_copy))


def test_hostile_indices(packed_copy):
    shards = json.loads((packed_copy / HEADER_NAME).read_text())["shards"]
    np.save(packed_copy / RECORDS_NAME, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DamagedShard, match="cannot be read"):
        list_image_files(str(packed_copy))
    for changes, reason in (
        ({"shards": [{"name": "../images-000000.tar", "bytes": 1}]}, r"its shard 0 is \{'name': '\.\./images"),
        ({"shards": [shards[0] | {"bytes": "1"}]}, "its shard 0 is"),
        ({"shards": shards, "version": 2}, "its version is 2, this program reads 1"),
        ({"version": 1, "num_images": "many"}, "its 'num_images' is 'many'"),
    ):
        change_header(packed_copy, **changes)
        with pytest.raises(UserError, match=rf"image_shards\.json cannot be read \({reason}.*\): run"):
            list_image_files(str(packed_copy))
    (packed_copy / HEADER_NAME).write_text("[")
    with pytest.raises(UserError, match=r"image_shards\.json cannot be read \(.*\): run scripts/pack_images\.py again"):
        list_image_files(str(packed_copy))


def test_records_that_lead_out_of_the_shards(packed_copy):
    records = np.load(packed_copy / RECORDS_NAME)
    records["shard"][0], records["offset"][1], records["label"][2] = 99, 1 << 62, 50
    np.save(packed_copy / RECORDS_NAME, records)
    shards = ImageShards(str(packed_copy))
    for index, sentence in ((0, "has no shard 99, which its index names"), (1, "is damaged")):
        with pytest.raises(DamagedShard, match=sentence):
            shards.read(index)
    with pytest.raises(DamagedShard, match="a label is 50, of 6 classes"):
        shards.classes()
