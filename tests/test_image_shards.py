"""Packed images give the batches of their folder; killed packing goes on; shards that do not fit are refused."""

import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
from functools import partial
from pathlib import Path

import encode_latents
import numpy as np
import pack_images
import pytest
import torch
from helpers import REPO, assert_same, run_train, tensors, train_flags, write_images
from PIL import Image

from masked_diffusion import dist_util, image_datasets, image_packing, image_shards, script_util
from masked_diffusion.image_datasets import (
    ImageDataset,
    StreamSampler,
    data_signature,
    image_classes,
    list_image_files,
    load_data,
    relative_names,
)
from masked_diffusion.image_shards import HEADER_NAME, NAMES_NAME, RECORDS_NAME, DamagedShard, ImageShards
from masked_diffusion.training import preflight
from masked_diffusion.utils import files, remote_files
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.tar_shards import TarWriter, find_shared_stems, member_name

PHOTOS = REPO.parent / "shared" / "data" / "imagenet_sample_120.tar"
fork_context = multiprocessing.get_context("fork")

ODD_NAMES = [
    "b_0.png", "b_0.jpg", "b_0.PNG", "b_0%png.png", "b_0.png.png", "b_0%2Epng.png", "b_1.5_x.png", ".c_2.png",
    "c/b_0.png", "c/b_0.gif", "c.d/b_0.png", "c/d/b_0.png", "ä_ö.png", f"{'long/' * 15}a_{'x' * 120}.png",
    "c_3..png", "c 4_(1).JPEG",
]  # fmt: skip


def pack(folder, out, **options):
    options = {
        "shard_size": 5,
        "class_cond": True,
        "on_bad_image": "error",
        "num_workers": 0,
        "verify": False,
    } | options
    image_packing.pack_images(data_dir=str(folder), out=str(out), **options)
    return str(out)


def contents(out):
    """Every file that packing makes, by name."""
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.name != "log.txt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of odd names, sizes and kinds; one asks for a rotation, one is tiny."""
    folder = tmp_path_factory.mktemp("folder")
    write_images(folder, ODD_NAMES, size=(20, 17))
    write_images(folder, [f"{'abc'[i % 3]}_1{i}.jpg" for i in range(7)], size=(17, 33))
    pixels = np.random.default_rng(1).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    Image.fromarray(pixels, "CMYK").save(folder / "a_cmyk.jpg")
    Image.fromarray(pixels[:, :, 0]).save(folder / "a_grey.jpg")
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels[:, :, :3]).save(folder / "a_rotated.jpg", exif=exif)
    Image.fromarray(pixels[:3, :3, :3]).save(folder / "a_tiny.png")
    return str(folder)


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    return pack(folder, tmp_path_factory.mktemp("packed") / "out")


@pytest.fixture
def copy(packed, tmp_path):
    """A copy of the packed folder, to damage."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


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


def test_shards_are_tars_in_webdatasets_layout(folder, packed):
    paths = list_image_files(folder)
    labels, _ = image_classes(paths)
    shards = sorted(Path(packed).glob("*.tar"))
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


def test_the_webdataset_package_reads_the_shards(folder, packed):
    webdataset = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(Path(packed).glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    paths = list_image_files(folder)
    assert [int(sample["cls"]) for sample in samples] == image_classes(paths)[0].tolist()
    for sample, path in zip(samples, paths, strict=True):
        assert sample[path.rpartition(".")[2].lower()] == Path(path).read_bytes()


# ---------------------------------------------------------------- the same as the folder


def test_names_bytes_classes_and_signature_are_the_folders(folder, packed):
    paths, shards = list_image_files(folder), list_image_files(f"{packed}/")
    names = relative_names(paths, folder)
    assert [path.removeprefix(f"{packed}/") for path in shards] == names == list(relative_names(shards, packed))
    assert data_signature(relative_names(shards, packed)) == data_signature(names)
    assert [shards.read(i) for i in range(len(shards))] == [Path(path).read_bytes() for path in paths]
    part, part_names = shards[3:20:2], names[3:20:2]
    assert list(relative_names(part, packed)) == part_names
    assert data_signature(relative_names(part, packed)) == data_signature(part_names)
    assert part[-1] == shards[19] and part.take([1, 0])[0] == shards[5]
    for ours, theirs in ((shards, paths), (part, paths[3:20:2])):
        (labels, classes), (their_labels, their_classes) = image_classes(ours), image_classes(theirs)
        assert classes == their_classes and labels.dtype == np.int64
        np.testing.assert_array_equal(labels, their_labels)
    with pytest.raises(IndexError):
        shards[27]


def test_preflight_takes_from_the_index_what_it_reads_from_the_files(folder, packed):
    for size in (8, 40):
        found = []
        for place in (folder, packed):
            bad, rotated = preflight.inspect_images(list_image_files(place), size)
            kept = preflight.check_images(list_image_files(place), size, "skip", place)
            bad, rotated = [(path[len(place) :], why) for path, why in bad], [path[len(place) :] for path in rotated]
            found.append((bad, rotated, list(relative_names(kept, place)), image_classes(kept)[1]))
        assert found[0] == found[1] and len(found[0][0]) == {8: 1, 40: 24}[size] and found[0][1]


def load_as(monkeypatch, rank, world_size, **options):
    monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: world_size)
    return load_data(batch_size=8 // world_size, image_size=8, class_cond=True, seed=5, **options)


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (2, 0), (4, 0), (1, 2), (4, 2)])
def test_batches_are_the_folders(folder, packed, monkeypatch, world_size, num_workers):
    options = {"random_crop": True, "num_workers": num_workers}
    for rank in range(world_size):
        theirs = load_as(monkeypatch, rank, world_size, data_dir=folder, **options | {"num_workers": 0})
        ours = load_as(monkeypatch, rank, world_size, data_dir=packed, **options)
        later = load_as(monkeypatch, rank, world_size, data_dir=packed, start_step=5, **options)
        for step in range(8):  # 64 of 27 images: two epochs
            (pixels, cond), expected = next(ours), next(theirs)
            assert torch.equal(pixels, expected[0]) and torch.equal(cond["y"], expected[1]["y"])
            if step >= 5:
                pixels, cond = next(later)
                assert torch.equal(pixels, expected[0]) and torch.equal(cond["y"], expected[1]["y"])


def test_what_a_loader_process_is_sent_does_not_grow_with_the_images(packed):
    shards = list_image_files(packed)
    sent = pickle.dumps(shards)
    assert len(sent) < 200 + len(packed)
    again = pickle.loads(sent)
    assert list(again) == list(shards) and again.read(7) == shards.read(7)
    assert list(pickle.loads(pickle.dumps(shards[2:5]))) == list(shards[2:5])


def test_more_shards_than_may_be_open(folder, packed, monkeypatch):
    monkeypatch.setattr(image_shards, "OPEN_SHARDS", 2)
    shards, before = ImageShards(packed), len(os.listdir("/dev/fd"))
    expected = [Path(path).read_bytes() for path in list_image_files(folder)]
    assert [shards.read(i) for i in (0, 26, 13, 7, 0, 20)] == [expected[i] for i in (0, 26, 13, 7, 0, 20)]
    assert len(os.listdir("/dev/fd")) == before + 2


def test_training_is_that_on_the_folder(folder, packed, tmp_path, monkeypatch):
    for name, place in (("ours", packed), ("theirs", folder)):
        options = {"on_bad_image": "skip", "random_crop": True, "max_steps": 2, "optimizer": "adamw", "num_workers": 0}
        run_train(monkeypatch, train_flags(place, tmp_path / name, **options))
    assert_same(tensors(tmp_path / "ours", 2), tensors(tmp_path / "theirs", 2))
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert ours["classes"] == theirs["classes"] and ours["data_signature"] == theirs["data_signature"]
    # The one goes on where the other stopped.
    run_train(monkeypatch, train_flags(folder, tmp_path / "ours", **options | {"max_steps": 3}))


def test_latents_are_those_of_the_folder(folder, packed, tmp_path, monkeypatch):
    for name, place in (("ours", packed), ("theirs", folder)):
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


# ---------------------------------------------------------------- packing


def in_child(function):
    """Run in a forked process; its exit code."""
    child = fork_context.Process(target=function)
    child.start()
    child.join(60)
    return child.exitcode


def pack_until_killed(folder, out, owner, name, calls):
    """Pack, and be killed after so many calls of a function."""
    function, left = getattr(owner, name), [calls]

    def counted(*args):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(owner, name, counted)
    pack(folder, out)


@pytest.mark.parametrize("owner, name", [(TarWriter, "_write"), (files.os, "replace")])
def test_killed_packing_makes_the_same_shards(folder, packed, tmp_path, owner, name):
    out, kills = tmp_path / "out", 0
    for calls in range(1, 40, 3 if name == "_write" else 1):
        kills += in_child(partial(pack_until_killed, folder, out, owner, name, calls)) == -signal.SIGKILL
    assert kills >= 5
    pack(folder, out)
    assert contents(out) == contents(packed)


def test_processes_and_ranks_make_the_same_shards(folder, packed, tmp_path):
    pack(folder, tmp_path / "workers", num_workers=2)
    assert contents(tmp_path / "workers") == contents(packed)
    with dist_util.socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(number):
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = ["--data_dir", folder, "--out", str(tmp_path / "ranks"), "--shard_size", "5", "--num_workers", "0"]
        sys.argv = ["pack_images.py", *words]
        script_util.run(pack_images.main)

    ranks = [fork_context.Process(target=rank, args=(number,)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert contents(tmp_path / "ranks") == contents(packed)


def test_what_is_there_is_not_packed_again(folder, copy, monkeypatch, capsys):
    monkeypatch.setattr(image_packing, "write_shard", None)
    pack(folder, copy, verify=True)
    assert "6 of 6 shards are there already" in capsys.readouterr().out
    assert not (copy / image_packing.UNFINISHED).exists()


def test_other_settings_and_other_images_are_refused(folder, copy, tmp_path):
    with pytest.raises(UserError, match=r"was packed with shard_size 5, now it is 6: repeat its settings, or choose"):
        pack(folder, copy, shard_size=6)
    with pytest.raises(UserError, match="was packed with class_cond True, now it is False"):
        pack(folder, copy, class_cond=False)
    write_images(tmp_path / "others", ["a_1.png"])
    with pytest.raises(UserError, match="packed with another list of 27 images, now --data_dir has 1: repeat"):
        pack(tmp_path / "others", copy)


def test_damaged_files_are_packed_again_with_verify(folder, packed, copy):
    shard = bytearray((copy / "images-000002.tar").read_bytes())
    shard[600] ^= 1
    (copy / "images-000002.tar").write_bytes(shard)
    pack(folder, copy)
    assert contents(copy) != contents(packed)
    pack(folder, copy, verify=True)
    assert contents(copy) == contents(packed)
    (copy / "images-000003.tar").unlink()
    (copy / RECORDS_NAME).write_bytes(b"")
    pack(folder, copy, verify=True)
    assert contents(copy) == contents(packed)


def test_a_shard_of_changed_images_is_refused(folder, packed, copy, tmp_path):
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    write_images(changed, ["a_tiny.png"])
    (copy / "images-000000.tar").unlink()
    (copy / "images-000001.tar").unlink()
    with pytest.raises(UserError, match=r"images-00000\d\.tar was packed again and has become another: images of"):
        pack(changed, copy)


def test_shards_can_be_packed_anew_in_another_size(folder, packed, tmp_path):
    ours, theirs = pack(packed, tmp_path / "ours", shard_size=20), pack(folder, tmp_path / "theirs", shard_size=20)
    assert contents(ours) == contents(theirs)


def test_bad_images_are_errors_or_left_out(folder, tmp_path, capsys):
    mixed = Path(shutil.copytree(folder, tmp_path / "mixed"))
    good = (mixed / "a_cmyk.jpg").read_bytes()
    (mixed / "a_cmyk.jpg").write_bytes(b"no image")
    (mixed / "c" / "b_9.png").symlink_to("/nowhere/b_9.png")
    with pytest.raises(UserError, match=r"^2 bad images, the first: a_cmyk\.jpg cannot be read: .*--on_bad_image skip"):
        pack(mixed, tmp_path / "out")
    assert "c/b_9.png cannot be read: [Errno 2]" in capsys.readouterr().out
    assert not image_shards.is_packed(str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"has been packed in part, image_shards\.json is missing, which is"):
        list_image_files(str(tmp_path / "out"))

    out = pack(mixed, tmp_path / "out", on_bad_image="skip")
    shards, kept = list_image_files(out), preflight.check_images(list_image_files(str(mixed)), 2, "skip")
    assert list(relative_names(shards, out)) == relative_names(kept, str(mixed)) and len(shards) == 26
    assert data_signature(relative_names(shards, out)) == data_signature(relative_names(kept, str(mixed)))
    assert [shards.read(i) for i in range(26)] == [Path(path).read_bytes() for path in kept]
    skipped = json.loads((tmp_path / "out" / HEADER_NAME).read_text())["skipped"]
    assert [name for name, _ in skipped] == ["a_cmyk.jpg", "c/b_9.png"]

    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="2 bad images"):
        pack(mixed, tmp_path / "out")
    (mixed / "a_cmyk.jpg").write_bytes(good)
    pack(mixed, tmp_path / "out", on_bad_image="skip")
    assert len(list_image_files(out)) == 27


def test_a_class_that_is_lost_is_named(tmp_path):
    write_images(tmp_path / "images", ["a_0.png", "b_0.png"])
    (tmp_path / "images" / "b_0.png").write_bytes(b"")
    with pytest.raises(UserError, match="no image of class 'b' can be read: mend or remove them, and choose"):
        pack(tmp_path / "images", tmp_path / "out", on_bad_image="skip")
    (tmp_path / "images" / "a_0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"all 2 images are bad, the first: a_0\.png cannot be read"):
        pack(tmp_path / "images", tmp_path / "other", on_bad_image="skip")


def test_images_without_classes(tmp_path):
    write_images(tmp_path / "images", ["one.png", "two.png"])
    with pytest.raises(UserError, match=r"one\.png carries no class"):
        pack(tmp_path / "images", tmp_path / "out")
    out = pack(tmp_path / "images", tmp_path / "out", class_cond=False)
    assert next(load_data(data_dir=out, batch_size=2, image_size=8, num_workers=0))[1] == {}
    with tarfile.open(tmp_path / "out" / "images-000000.tar") as tar:
        assert tar.getnames() == ["one.png", "two.png"]
    with pytest.raises(UserError, match="was packed without classes: pack it with --class_cond True, or train"):
        load_data(data_dir=out, batch_size=2, image_size=8, class_cond=True)


@pytest.mark.parametrize(
    "out, sentence", [("", "out is empty"), ("gs://a/b", "--out gs://a/b is remote"), (".", "--out . is --data_dir")]
)
def test_places_that_cannot_be_packed_into(tmp_path, monkeypatch, capsys, out, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pack_images.py", "--data_dir", str(tmp_path), "--out", out])
    with pytest.raises(SystemExit):
        script_util.run(pack_images.main)
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {sentence}") and len(errors.splitlines()) == 1 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- shards that do not fit


def change_header(copy, **changes):
    header = json.loads((copy / HEADER_NAME).read_text())
    (copy / HEADER_NAME).write_text(json.dumps(header | changes))


def test_a_shard_that_is_cut_short_or_missing(copy):
    shard, good = copy / "images-000001.tar", list_image_files(str(copy))
    os.truncate(shard, 3000)
    with pytest.raises(
        DamagedShard, match=rf"^{shard} has 3000 bytes, the index says \d+: it is cut short or of .*--verify True.*$"
    ):
        list_image_files(str(copy))
    dataset = ImageDataset(8, good, on_bad_image="skip")
    with pytest.raises(DamagedShard, match=r"\(in images-000001\.tar\) is damaged, its checksum is not that of the"):
        dataset[9]
    shard.unlink()
    with pytest.raises(DamagedShard, match=rf"^{shard} cannot be read \(No such file or directory\): run"):
        list_image_files(str(copy))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_wrong_checksum(copy, num_workers):
    shards = list_image_files(str(copy))
    offset = int(np.load(copy / RECORDS_NAME)["offset"][8])
    data = bytearray((copy / "images-000001.tar").read_bytes())
    data[offset + 20] ^= 1
    (copy / "images-000001.tar").write_bytes(data)
    loaded = load_data(
        data_dir=str(copy), batch_size=9, image_size=8, deterministic=True, num_workers=num_workers, on_bad_image="skip"
    )
    with pytest.raises(UserError, match=rf"^{shards[8]} \(in images-000001\.tar\) is damaged, its checksum [^\n]*$"):
        next(loaded)


def test_a_missing_index(copy):
    (copy / HEADER_NAME).unlink()
    with pytest.raises(
        UserError, match=rf"^{copy} has been packed in part, .* run scripts/pack_images\.py again, or copy"
    ):
        list_image_files(str(copy))


def test_an_index_of_another_folder(folder, copy, tmp_path):
    other = Path(pack(folder, tmp_path / "other", shard_size=4))
    for name in (HEADER_NAME, RECORDS_NAME, NAMES_NAME):
        shutil.copy(other / name, copy / name)
    with pytest.raises(
        DamagedShard, match=r"images-00000\d\.tar has \d+ bytes, the index says \d+: it is cut short or of"
    ):
        list_image_files(str(copy))
    write_images(tmp_path / "few", ["a_0.png"])
    shutil.copy(Path(pack(tmp_path / "few", tmp_path / "few_out")) / RECORDS_NAME, copy / RECORDS_NAME)
    with pytest.raises(DamagedShard, match=r"image_shards\.npy holds \(1,\) instead of 27 images: run"):
        list_image_files(str(copy))


@pytest.mark.parametrize("name", [RECORDS_NAME, NAMES_NAME])
def test_an_index_that_is_cut_short(copy, name):
    os.truncate(copy / name, 300)
    with pytest.raises(DamagedShard, match=rf"{name} cannot be read \(.*\): run"):
        list_image_files(str(copy))


def test_names_of_another_folder(copy):
    np.save(copy / NAMES_NAME, np.zeros(9, dtype=np.uint8))
    with pytest.raises(DamagedShard, match=r"image_shards\.npy and image_shards_names\.npy are not of one folder"):
        list_image_files(str(copy))


def test_hostile_indices(copy):
    shards = json.loads((copy / HEADER_NAME).read_text())["shards"]
    np.save(copy / RECORDS_NAME, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DamagedShard, match="cannot be read"):
        list_image_files(str(copy))
    for changes, reason in (
        ({"shards": [{"name": "../images-000000.tar", "bytes": 1}]}, r"its shard 0 is \{'name': '\.\./images"),
        ({"shards": [shards[0] | {"bytes": "1"}]}, "its shard 0 is"),
        ({"shards": shards, "version": 2}, "its version is 2, this program reads 1"),
        ({"version": 1, "num_images": "many"}, "its 'num_images' is 'many'"),
    ):
        change_header(copy, **changes)
        with pytest.raises(UserError, match=rf"image_shards\.json cannot be read \({reason}.*\): run"):
            list_image_files(str(copy))
    (copy / HEADER_NAME).write_text("[")
    with pytest.raises(UserError, match=r"image_shards\.json cannot be read \(.*\): run scripts/pack_images\.py again"):
        list_image_files(str(copy))


def test_records_that_lead_out_of_the_shards(copy):
    records = np.load(copy / RECORDS_NAME)
    records["shard"][0], records["offset"][1], records["label"][2] = 99, 1 << 62, 50
    np.save(copy / RECORDS_NAME, records)
    shards = ImageShards(str(copy))
    for index, sentence in ((0, "has no shard 99, which its index names"), (1, "is damaged")):
        with pytest.raises(DamagedShard, match=sentence):
            shards.read(index)
    with pytest.raises(DamagedShard, match="a label is 50, of 6 classes"):
        shards.classes()


# ---------------------------------------------------------------- remote folders


class Bucket:
    """Stands for blobfile: `gs://bucket` is a local folder, and every so many requests fail."""

    def __init__(self, folder, monkeypatch, fails=lambda request: False):
        self.folder, self.fails, self.requests = folder, fails, []
        for module in (image_shards, remote_files):
            monkeypatch.setattr(module, "bf", self)

    def __getattr__(self, name):
        return getattr(image_datasets.bf, name)

    def local(self, path):
        return path.replace("gs://bucket", str(self.folder))

    def exists(self, path):
        return os.path.exists(self.local(path))

    def BlobFile(self, path, mode, streaming=None, buffer_size=None, file_size=None):
        bucket = self
        assert mode == "rb"
        if not path.startswith("gs://"):
            return open(path, "rb")

        class Ranged(io.BytesIO):
            def read(self, size=-1):
                bucket.requests.append((os.path.basename(path), self.tell(), size))
                if bucket.fails(len(bucket.requests)):
                    raise ConnectionError("the line is dead")
                return super().read(size)

        data = Path(self.local(path)).read_bytes()
        assert file_size in (None, len(data))
        return Ranged(data)

    def images(self):
        """How often images were asked for."""
        return sum(name.endswith(".tar") for name, *_ in self.requests)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_files.time, "sleep", lambda seconds: None)
    return tmp_path / "cache"


def check_remote(folder):
    shards, paths = list_image_files("gs://bucket"), list_image_files(folder)
    assert shards[3] == f"gs://bucket/{relative_names(paths, folder)[3]}"
    assert [shards.read(i) for i in range(27)] == [Path(path).read_bytes() for path in paths]
    return shards


def test_remote_images_are_read_by_range_and_kept(folder, packed, cache, monkeypatch):
    bucket = Bucket(packed, monkeypatch)
    shards = check_remote(folder)
    records = np.load(Path(packed, RECORDS_NAME))
    wanted = [(f"images-{r['shard']:06d}.tar", r["offset"], r["size"]) for r in records]
    assert [request for request in bucket.requests if request[0].endswith(".tar")] == wanted
    for again in (shards, check_remote(folder), pickle.loads(pickle.dumps(shards))):
        assert again.read(5) == shards.read(5)
    assert bucket.images() == 27  # all others came from the disk
    # What is damaged in the copy is fetched again.
    for path in cache.rglob("*.tar"):
        path.write_bytes(bytes(9000))
    check_remote(folder)
    assert bucket.images() == 54


def test_the_copy_is_bounded(folder, packed, cache, monkeypatch):
    sizes = [path.stat().st_size for path in sorted(Path(packed).glob("*.tar"))]
    monkeypatch.setenv("MASKED_DIFFUSION_CACHE_GIB", str((sum(sizes[:3]) + 5) / 2**30))
    bucket = Bucket(packed, monkeypatch)
    for _ in range(2):
        check_remote(folder)
    assert bucket.images() == 27 + 12
    assert sum(path.stat().st_size for path in cache.rglob("*.tar")) <= sum(sizes[:3])
    monkeypatch.setenv("MASKED_DIFFUSION_CACHE_GIB", "much")
    with pytest.raises(UserError, match="MASKED_DIFFUSION_CACHE_GIB is 'much': it must be a number of GiB"):
        check_remote(folder)


def test_remote_reads_are_tried_again(folder, packed, cache, monkeypatch):
    bucket = Bucket(packed, monkeypatch, fails=lambda request: request > 3 and request % 3)
    check_remote(folder)
    assert bucket.images() > 60
    shutil.rmtree(cache)
    Bucket(packed, monkeypatch, fails=lambda request: request > 5)
    with pytest.raises(
        UserError, match=r"images-000000\.tar cannot be read at byte \d+ \(the line is dead; 6 attempts"
    ):
        check_remote(folder)


def test_remote_damage_and_missing_files(packed, copy, cache, monkeypatch):
    Bucket(copy, monkeypatch)
    shard = copy / "images-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DamagedShard, match="is damaged, its checksum"):
        list_image_files("gs://bucket").read(0)
    (copy / "images-000001.tar").unlink()
    with pytest.raises(UserError, match=r"images-000001\.tar is not there: copy all files of the packed folder"):
        list_image_files("gs://bucket").read(6)
    shutil.rmtree(cache)
    (copy / NAMES_NAME).write_bytes(bytes((copy / NAMES_NAME).stat().st_size))
    with pytest.raises(UserError, match="has another checksum than its folder's index says: copy the packed folder"):
        list_image_files("gs://bucket")
    assert not [path for path in cache.iterdir() if path.name.endswith(NAMES_NAME)]


def test_a_cache_that_cannot_be_written_is_done_without(folder, packed, cache, monkeypatch, capsys):
    Bucket(packed, monkeypatch)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_shards.os, "pwrite", refuse)
    check_remote(folder)
    assert capsys.readouterr().err.count("is read without a local copy") == 6
