"""The index of a folder: made once, used while it fits, the same batches; no million strings anywhere."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
import tracemalloc
from pathlib import Path

import encode_latents
import image_train
import numpy as np
import pytest
import torch
from helpers import assert_same, pack, run_train, tensors, train_flags, write_images
from PIL import Image

from masked_diffusion import dist_util, find_images, image_index, logger, script_util
from masked_diffusion.image_datasets import (
    ImageDataset,
    data_signature,
    image_classes,
    list_image_files,
    load_data,
    relative_names,
)
from masked_diffusion.image_index import CHECKED_NAME, HEADER_NAME, NAMES_NAME, RECORDS_NAME, ImageIndex
from masked_diffusion.latents.cache import LatentCache
from masked_diffusion.training import preflight
from masked_diffusion.training.data import CachedNames
from masked_diffusion.utils import files, image_headers
from masked_diffusion.utils.errors import UserError

fork_context = multiprocessing.get_context("fork")


@pytest.fixture
def made(monkeypatch):
    """How often an index was made."""
    calls, make = [], image_index.make_index
    monkeypatch.setattr(find_images, "make_index", lambda *args: calls.append(args) or make(*args))
    return calls


def find(folder, place, **options):
    return find_images.find_images(str(folder), place, **options)


# ---------------------------------------------------------------- the same as the list


def test_names_classes_and_signature_are_those_of_the_list(odd_folder, tmp_path):
    for folder in (odd_folder, f"{odd_folder}/"):
        paths, index = list_image_files(folder), find(folder, tmp_path / "index")
        assert list(index) == paths and len(index) == len(paths) == 27
    names = relative_names(paths, odd_folder)
    assert list(relative_names(index, odd_folder)) == names
    some = [20, 3, 9]
    for ours, theirs in ((index, paths), (index[3:20:2], paths[3:20:2]), (index.take(some), [paths[i] for i in some])):
        assert list(ours) == theirs and ours[-1] == theirs[-1]
        assert data_signature(relative_names(ours, odd_folder)) == data_signature(relative_names(theirs, odd_folder))
        (labels, classes), (their_labels, their_classes) = image_classes(ours), image_classes(theirs)
        assert classes == their_classes and labels.dtype == np.int64 and labels.tolist() == their_labels.tolist()
    assert [index.read(i) for i in range(27)] == [Path(path).read_bytes() for path in paths]
    with pytest.raises(IndexError):
        index[27]


def test_the_order_is_adms(tmp_path):
    names = [
        "b_0.JPG",
        "a/c_0.png",
        "a/b/d_0.gif",
        "a.png",
        "e_0.jpeg",
        ".h/i_0.png",
        ".j_0.png",
        "a-_0.png",
        "a0/k_0.png",
    ]
    write_images(tmp_path / "images", names)
    (tmp_path / "images" / "f").symlink_to(tmp_path / "images" / "a")
    (tmp_path / "images" / "g").symlink_to("/nowhere")
    (tmp_path / "images" / "l").symlink_to(tmp_path / "images" / "l")
    (tmp_path / "images" / "m.png").mkdir()  # which ADM takes for an image
    index = find(tmp_path / "images", tmp_path / "index", inspect=False)
    assert list(index.relative()) == adms_order(tmp_path / "images")
    assert list(index.relative())[-3:] == ["f/b/d_0.gif", "f/c_0.png", "m.png"]


def adms_order(folder, prefix=""):
    found = []
    for name in sorted(os.listdir(folder)):
        if name.rpartition(".")[2].lower() in ("jpg", "jpeg", "png", "gif") and "." in name:
            found.append(prefix + name)
        elif os.path.isdir(folder / name):
            found += adms_order(folder / name, f"{prefix}{name}/")
    return found


def test_names_of_any_bytes(tmp_path):
    (tmp_path / "images").mkdir()
    source = write_images(tmp_path, ["a_0.png"])[0]
    for name in (b"\xff_1.png", b"\xc3\xa4_1.png", b"\xf0\x9f\x98\x80_1.png", b"\xee\x80\x80_1.png"):
        shutil.copy(source, os.fsencode(tmp_path / "images") + b"/" + name)
    paths, index = list_image_files(str(tmp_path / "images")), find(tmp_path / "images", tmp_path / "index")
    assert list(index) == paths and image_classes(index)[1] == image_classes(paths)[1]
    assert data_signature(index.relative()) == data_signature(relative_names(paths, str(tmp_path / "images")))
    assert list(find(tmp_path / "images", tmp_path / "index")) == paths
    assert index.read(3) == Path(source).read_bytes()


def test_headers_are_those_that_the_list_finds(odd_folder, tmp_path):
    paths, index = list_image_files(odd_folder), find(odd_folder, tmp_path / "index")
    for size in (8, 40):
        ours, theirs = (preflight.inspect_images(images, size) for images in (index, paths))
        assert ours.bad == theirs.bad == {}
        assert ours.rotated.tolist() == theirs.rotated.tolist() != []
        assert ours.tiny.tolist() == theirs.tiny.tolist() and len(ours.tiny) == {8: 1, 40: 24}[size]


def test_names_without_a_class_are_named(tmp_path):
    write_images(tmp_path / "images", ["a_0.png", "plain.png"])
    index = find(tmp_path / "images", tmp_path / "index")
    with pytest.raises(UserError, match=r"images/plain\.png has no class in its name: .*datasets/class_folders\.py"):
        image_classes(index)
    assert image_classes(index[:1])[1] == ["a"]


def test_other_formats_are_counted_at_every_start(tmp_path, capsys):
    write_images(tmp_path / "images", ["a_0.png", "a_1.webp"])
    for _ in range(2):
        find(tmp_path / "images", tmp_path / "index")
        assert "1 images of other formats (.webp 1) in" in capsys.readouterr().out


# ---------------------------------------------------------------- fit and misfit


def old_folder(tmp_path):
    """Images of a subfolder each, written long ago."""
    paths = write_images(tmp_path / "images", ["a/a_0.png", "a/a_1.png", "b/b_2.png"], size=(8, 8))
    for path in [*paths, tmp_path / "images" / "a", tmp_path / "images" / "b", tmp_path / "images"]:
        os.utime(path, (1e9, 1e9))
    return tmp_path / "images"


def test_an_index_that_fits_is_used(tmp_path, made, monkeypatch, capsys):
    folder = old_folder(tmp_path)
    before = list(find(folder, tmp_path / "index"))
    assert f"{folder} is listed and its images are opened: {tmp_path / 'index'} keeps" in capsys.readouterr().out
    monkeypatch.setattr(os, "scandir", None)
    monkeypatch.setattr(image_headers, "read_header", None)
    assert list(find(f"{folder}/", tmp_path / "index")) == [
        f"{folder}/{path[len(str(folder)) + 1 :]}" for path in before
    ]
    assert len(made) == 1 and f"3 images as listed in {tmp_path / 'index'} on 20" in capsys.readouterr().out


def add(folder):
    write_images(folder, ["b/b_3.png"])


def remove(folder):
    (folder / "a" / "a_1.png").unlink()


def rename(folder):
    (folder / "a" / "a_1.png").rename(folder / "a" / "a_2.png")


def overwrite(folder):
    with (folder / "b" / "b_2.png").open("r+b") as file:
        file.write(b"nothing")


def add_a_folder(folder):
    write_images(folder, ["c/c_3.png"])


def lose_a_folder(folder):
    shutil.rmtree(folder / "b")


@pytest.mark.parametrize("change", [add, remove, rename, overwrite, add_a_folder, lose_a_folder])
def test_a_folder_that_has_changed_is_listed_again(tmp_path, made, capsys, change):
    folder = old_folder(tmp_path)
    find(folder, tmp_path / "index")
    change(folder)
    index = find(folder, tmp_path / "index")
    assert list(index) == list_image_files(str(folder)) and len(made) == 2
    assert f"opened again, since {folder}/" in capsys.readouterr().out.splitlines()[-1]
    assert list(index.bad()) == ([2] if change is overwrite else [])


def test_a_bad_image_may_be_repaired_in_place(tmp_path, monkeypatch, made):
    monkeypatch.setattr(image_index, "SAMPLE", 1)
    folder = old_folder(tmp_path)
    good = (folder / "a" / "a_1.png").read_bytes()
    for path in sorted(folder.rglob("*.png")):
        path.write_bytes(b"nothing")
    assert list(find(folder, tmp_path / "index").bad()) == [0, 1, 2]
    (folder / "a" / "a_1.png").write_bytes(good)
    assert list(find(folder, tmp_path / "index").bad()) == [0, 2]
    find(folder, tmp_path / "index")
    assert len(made) == 2


def test_another_folder(tmp_path, made, capsys):
    folder = old_folder(tmp_path)
    find(folder, tmp_path / "index")
    shutil.copytree(folder, tmp_path / "other")
    assert find(tmp_path / "other", tmp_path / "index")[0].startswith(f"{tmp_path}/other/")
    assert len(made) == 2 and f"opened again, since it is that of {folder}: " in capsys.readouterr().out


def test_reindex(tmp_path, made, capsys):
    folder = old_folder(tmp_path)
    for _ in range(2):
        find(folder, tmp_path / "index", reindex=True)
    assert len(made) == 2 and "again, since --reindex is True" in capsys.readouterr().out


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size - 5)


@pytest.mark.parametrize("damage", [flip_a_byte, cut, Path.unlink])
@pytest.mark.parametrize("name", [NAMES_NAME, RECORDS_NAME, CHECKED_NAME, HEADER_NAME])
def test_a_damaged_index_is_made_again(tmp_path, made, name, damage):
    folder = old_folder(tmp_path)
    before = list(find(folder, tmp_path / "index"))
    damage(tmp_path / "index" / name)
    assert list(find(folder, tmp_path / "index")) == before
    # A byte of the header that has become another may be one that nobody reads.
    assert len(made) == 2 or (name, damage) == (HEADER_NAME, flip_a_byte)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"version": 0}, "its version is 0, this program reads 1"),
        ({"num_images": "3"}, "its 'num_images' is '3'"),
        ({"num_images": 4}, "do not fit together"),
        ({"arrays": {}}, "names.npy cannot be read"),
        ({"classes": "ab"}, "its 'classes' is 'ab'"),
    ],
)
def test_an_index_of_another_version_or_form_is_made_again(tmp_path, made, capsys, changes, reason):
    folder = old_folder(tmp_path)
    find(folder, tmp_path / "index")
    header = tmp_path / "index" / HEADER_NAME
    header.write_text(json.dumps(json.loads(header.read_text()) | changes))
    find(folder, tmp_path / "index")
    assert len(made) == 2 and reason in capsys.readouterr().out


def test_objects_are_never_loaded(tmp_path, made):
    folder = old_folder(tmp_path)
    find(folder, tmp_path / "index")
    path = tmp_path / "index" / RECORDS_NAME
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    header = json.loads((tmp_path / "index" / HEADER_NAME).read_text())
    header["arrays"][RECORDS_NAME] = {"size": path.stat().st_size, "sha256": files.file_hash(path)}
    (tmp_path / "index" / HEADER_NAME).write_text(json.dumps(header))
    find(folder, tmp_path / "index")
    assert len(made) == 2


@pytest.mark.parametrize("write", range(5))
def test_killed_while_writing(tmp_path, write):
    """Over an index of what the folder was before; the fifth write does not come."""
    folder = old_folder(tmp_path)
    find(folder, tmp_path / "index")
    add(folder)

    def child():
        left, replace = [write], os.replace

        def killed(*args):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)

        os.replace = killed
        find(folder, tmp_path / "index")

    process = fork_context.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if write < 4 else 0)
    assert list(find(folder, tmp_path / "index")) == list_image_files(str(folder))
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == sorted(
        [CHECKED_NAME, HEADER_NAME, NAMES_NAME, RECORDS_NAME]
    )


def test_of_two_runs_one_makes_the_index(tmp_path, made, capsys):
    folder = old_folder(tmp_path)
    lock = find_images.FileLock(tmp_path / "index" / find_images.LOCK_NAME, "", "")

    def child():
        time.sleep(0.5)
        image_index.make_index(tmp_path / "index", str(folder), True)
        lock.release()

    process = fork_context.Process(target=child)
    process.start()
    lock._file.close()
    assert len(find(folder, tmp_path / "index")) == 3 and made == []
    process.join()
    assert f"{tmp_path / 'index'} is being made already, by process" in capsys.readouterr().out


def test_an_index_with_names_alone_is_not_enough_for_training(tmp_path, made):
    folder = old_folder(tmp_path)
    find(folder, tmp_path / "index", inspect=False)
    assert find(folder, tmp_path / "index").sizes().tolist() == [[8, 8]] * 3
    find(folder, tmp_path / "index", inspect=False)
    assert len(made) == 2


# ---------------------------------------------------------------- places


def test_unknown_schemes_are_refused_by_name(tmp_path):
    for read in (list_image_files, lambda place: find(place, tmp_path / "index")):
        with pytest.raises(UserError, match=r"^--data_dir s3://a/b: s3:// cannot be read, only gs:// .*az:// .*: copy"):
            read("s3://a/b")
        with pytest.raises(UserError, match="https:// cannot be read"):
            read("https://example.org/images")
    assert not (tmp_path / "index").exists()


def test_places_where_an_index_cannot_be(tmp_path):
    with pytest.raises(UserError, match="--index gs://a is remote: name a local folder"):
        find_images.check_index_place("gs://a", str(tmp_path))
    with pytest.raises(UserError, match=r"--index .*/a/b is in --data_dir: name a folder outside"):
        find_images.check_index_place(str(tmp_path / "a" / "b"), str(tmp_path))
    find_images.check_index_place(str(tmp_path / "index"), str(tmp_path / "images"))
    write_images(tmp_path / "images", ["a_0.png"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be written .*: make room, or choose another --index|could not be"):
        find(tmp_path / "images", tmp_path / "file" / "index")


class Bucket:
    """Stands for blobfile: `gs://bucket` is a local folder."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.real = image_index.bf
        for name in ("image_index", "image_listing", "image_sequence", "image_shards", "image_datasets"):
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
    assert index.sizes()[-1].tolist() == [10, 12] or len(index.sizes()) == 27
    os.utime(images / "a_tiny.png")
    find("gs://bucket", tmp_path / "index")
    assert len(made) == 2


# ---------------------------------------------------------------- memory


def test_no_list_of_names_is_made(tmp_path, monkeypatch):
    count = 200_000
    names = [f"n{i % 1000:08d}_{i}.JPEG" for i in range(count)]
    monkeypatch.setattr(image_index, "list_names", lambda folder, listing, found: iter([("", names)]))
    index = image_index.make_index(tmp_path / "index", str(tmp_path), inspect=False)
    expected = data_signature(names[1:])
    names.clear()
    tracemalloc.start()
    try:
        index = ImageIndex(index.folder, index.sha256, None, index.prefix)
        kept = preflight.check_images(index, 8, "error")
        assert kept is index
        labels, classes = image_classes(index)
        preflight.describe_classes(labels, classes)
        dataset = ImageDataset(8, index, classes=labels)
        part = index.take(np.arange(1, count))
        assert data_signature(relative_names(part, str(tmp_path))) == expected
        assert len(pickle.dumps(dataset.images)) < 500 + len(str(tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16e6  # the names alone would be 14 MB of strings in a list of 1.6 MB; numbers here are 8 bytes each


def test_headers_are_read_by_a_bounded_number_of_tasks(odd_folder, monkeypatch):
    running, most = set(), [0]
    submit = image_headers.ThreadPoolExecutor.submit

    def counted(pool, *args):
        task = submit(pool, *args)
        running.add(task)
        task.add_done_callback(running.discard)
        most[0] = max(most[0], len(running))
        return task

    monkeypatch.setattr(image_headers, "CHUNK", 1)
    monkeypatch.setattr(image_headers.ThreadPoolExecutor, "submit", counted)
    paths, done = list_image_files(odd_folder) * 4, []
    headers = image_headers.read_headers(paths, num_threads=2, progress=done.append)
    assert most[0] <= 4 and sum(done) == len(paths) == 108
    np.testing.assert_array_equal(headers.sizes[:27], headers.sizes[-27:])


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


@pytest.mark.parametrize("visible", [True, False])
def test_rank_0_alone_lists_and_all_have_the_batches_of_the_list(odd_folder, tmp_path, monkeypatch, visible):
    monkeypatch.setattr(find_images.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(find_images, "BLOCK", 100)
    (tmp_path / "temporary").mkdir()
    stale = tmp_path / "temporary" / f"{find_images.COPIES}stale"
    stale.mkdir()
    os.utime(stale, (1, 1))
    for _ in range(2):
        find(odd_folder, tmp_path / "hidden")

    def rank(number):
        dist_util.join_process_group()
        if number:
            monkeypatch.setattr(find_images, "_find", None)
        if not visible:  # each rank is a node of its own, and the second one does not see the index
            monkeypatch.setenv("LOCAL_RANK", "0")
            opened = find_images._open
            monkeypatch.setattr(
                find_images,
                "_open",
                lambda folder, *args: None if number and folder == tmp_path / "index" else opened(folder, *args),
            )
        index = find_images.find_images(odd_folder, tmp_path / "index")
        assert (index.folder == tmp_path / "index") == (visible or number == 0)
        batches = load_data(data_dir=odd_folder, paths=index, batch_size=4, image_size=8, class_cond=True, seed=3)
        torch.save([next(batches) for _ in range(4)], tmp_path / f"rank{number}.pt")
        del batches
        dist_util.cleanup()
        find_images.atexit._run_exitfuncs()  # multiprocessing leaves without them

    assert in_two_ranks(rank) == [0, 0]
    expected = load_data(data_dir=odd_folder, batch_size=8, image_size=8, class_cond=True, seed=3)
    ranks = [torch.load(tmp_path / f"rank{number}.pt", weights_only=True) for number in range(2)]
    for step in range(4):
        pixels, cond = next(expected)
        assert torch.equal(torch.cat([batches[step][0] for batches in ranks]), pixels)
        assert torch.equal(torch.cat([batches[step][1]["y"] for batches in ranks]), cond["y"])
    left = [] if not visible else [stale]  # a copy that nobody uses any more is removed by the next one
    assert list((tmp_path / "temporary").iterdir()) == left


def test_a_copy_that_cannot_be_written_is_one_sentence_on_all_ranks(odd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(find_images.tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    opened = find_images._open

    def rank(number):
        dist_util.join_process_group()
        monkeypatch.setattr(find_images, "_open", lambda *args: None if number else opened(*args))
        with pytest.raises(UserError, match=r"could not be written .*TMPDIR"):
            find_images.find_images(odd_folder, tmp_path / "index")

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


def test_all_kinds_train_encode_and_pack_with_default_flags(tmp_path, monkeypatch, vae_folder, capsys):
    folder = tmp_path / "images"
    names = write_mix(folder)
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
    assert logger.get_dir() is None or not (tmp_path / "images" / "index").exists()
