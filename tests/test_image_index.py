"""The index of a folder: made once, used while it fits, and no million strings."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import find, write_images

from masked_diffusion.image_datasets import (
    ImageDataset,
    data_signature,
    image_classes,
    list_image_files,
    relative_names,
)
from masked_diffusion.images import finding
from masked_diffusion.images import index as image_index
from masked_diffusion.images.index import CHECKED_NAME, HEADER_NAME, NAMES_NAME, RECORDS_NAME, ImageIndex
from masked_diffusion.training import preflight
from masked_diffusion.utils import files, image_headers
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.progress import Progress

fork_context = multiprocessing.get_context("fork")


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


def test_a_million_classes_are_refused_only_when_they_are_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(image_index, "MAX_CLASSES", 2)
    write_images(tmp_path / "images", ["a_0.png", "b_0.png", "c_0.png", "d_0.png"])
    index = find(tmp_path / "images", tmp_path / "index")
    assert len(index) == 4 and index.header["classes"] is None
    with pytest.raises(UserError, match="has more than 2 classes: the class is the file name up to"):
        image_classes(index)
    (tmp_path / "images" / "d_0.png").rename(tmp_path / "images" / "b_1.png")
    (tmp_path / "images" / "c_0.png").unlink()
    assert image_classes(find(tmp_path / "images", tmp_path / "index"))[1] == ["a", "b"]


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
    assert list(find(folder, tmp_path / "index")) == before and len(made) == 2


def change_header(index, **changes):
    header = json.loads((index / HEADER_NAME).read_text()) | changes
    header["checksum"] = changes.get("checksum", image_index.checksum(header))
    (index / HEADER_NAME).write_text(json.dumps(header))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"version": 0}, "its version is 0, this program reads 1"),
        ({"num_images": "3"}, "its 'num_images' is '3'"),
        ({"num_images": 4}, "do not fit together"),
        ({"arrays": {}}, "names.npy cannot be read"),
        ({"classes": "ab"}, "its 'classes' is 'ab'"),
        ({"files_sha256": "0" * 64, "checksum": "1"}, "its checksum is another"),
    ],
)
def test_an_index_of_another_version_or_form_is_made_again(tmp_path, made, capsys, changes, reason):
    folder = old_folder(tmp_path)
    find(folder, tmp_path / "index")
    change_header(tmp_path / "index", **changes)
    find(folder, tmp_path / "index")
    assert len(made) == 2 and reason in capsys.readouterr().out


def test_objects_are_never_loaded(tmp_path, made):
    folder = old_folder(tmp_path)
    find(folder, tmp_path / "index")
    path = tmp_path / "index" / RECORDS_NAME
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    arrays = json.loads((tmp_path / "index" / HEADER_NAME).read_text())["arrays"]
    described = {"size": path.stat().st_size, "sha256": files.file_hash(path)}
    change_header(tmp_path / "index", arrays=arrays | {RECORDS_NAME: described})
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
    lock = finding.FileLock(tmp_path / "index" / finding.LOCK_NAME, "", "")

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


# ---------------------------------------------------------------- memory


def test_no_list_of_names_is_made(tmp_path, monkeypatch):
    count = 200_000
    names = [f"n{i % 1000:08d}_{i}.JPEG" for i in range(count)]
    monkeypatch.setattr(image_index, "list_names", lambda folder, listing, found: iter([("", names)]))
    index = image_index.make_index(tmp_path / "index", str(tmp_path), inspect=False)
    expected = data_signature(names[1::4])
    names.clear()
    tracemalloc.start()
    try:
        index = ImageIndex(index.folder, index.sha256, None, index.prefix)
        kept = preflight.check_images(index, 8, "error")
        assert kept is index
        labels, classes = image_classes(index)
        preflight.describe_classes(labels, classes)
        dataset = ImageDataset(8, index, classes=labels)
        part = index.take(np.arange(1, count, 4))
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


def test_progress_tells_how_far_and_how_long(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("masked_diffusion.utils.progress.time.monotonic", lambda: now[0])
    for total, line in ((1000, "250/1000 image headers  5/s  ETA 0:02:30"), (None, "250 image headers  5/s")):
        with Progress(total, "image headers") as progress:
            for seconds in (5, 45, 1):
                now[0] += seconds
                progress.add(125 if seconds > 1 else 1)
        assert [found for found in capsys.readouterr().out.splitlines() if found] == [line]
