"""Packing makes the same shards, killed or not; what it refuses and what it mends."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
from functools import partial
from pathlib import Path

import pack_images
import pytest
from helpers import contents, pack, write_images

from masked_diffusion import dist_util, script_util
from masked_diffusion.image_datasets import (
    data_signature,
    list_image_files,
    load_data,
    relative_names,
)
from masked_diffusion.images import packing
from masked_diffusion.images import shards as image_shards
from masked_diffusion.images.shards import HEADER_NAME, RECORDS_NAME
from masked_diffusion.training import preflight
from masked_diffusion.utils import files
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.tar_shards import TarWriter

fork_context = multiprocessing.get_context("fork")


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
def test_killed_packing_makes_the_same_shards(odd_folder, packed_folder, tmp_path, owner, name):
    out, kills = tmp_path / "out", 0
    for calls in range(1, 40, 3 if name == "_write" else 1):
        kills += in_child(partial(pack_until_killed, odd_folder, out, owner, name, calls)) == -signal.SIGKILL
    assert kills >= 5
    pack(odd_folder, out)
    assert contents(out) == contents(packed_folder)


def test_processes_and_ranks_make_the_same_shards(odd_folder, packed_folder, tmp_path):
    pack(odd_folder, tmp_path / "workers", num_workers=2)
    assert contents(tmp_path / "workers") == contents(packed_folder)
    with dist_util.socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(number):
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = ["--data_dir", odd_folder, "--out", str(tmp_path / "ranks"), "--shard_size", "5", "--num_workers", "0"]
        sys.argv = ["pack_images.py", *words]
        script_util.run(pack_images.main)

    ranks = [fork_context.Process(target=rank, args=(number,)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert contents(tmp_path / "ranks") == contents(packed_folder)


def test_what_is_there_is_not_packed_again(odd_folder, packed_copy, monkeypatch, capsys):
    monkeypatch.setattr(packing, "write_shard", None)
    pack(odd_folder, packed_copy, verify=True)
    assert "6 of 6 shards are there already" in capsys.readouterr().out
    assert not (packed_copy / packing.UNFINISHED).exists()


def test_other_settings_and_other_images_are_refused(odd_folder, packed_copy, tmp_path):
    with pytest.raises(UserError, match=r"was packed with shard_size 5, now it is 6: repeat its settings, or choose"):
        pack(odd_folder, packed_copy, shard_size=6)
    with pytest.raises(UserError, match="was packed with class_cond True, now it is False"):
        pack(odd_folder, packed_copy, class_cond=False)
    write_images(tmp_path / "others", ["a_1.png"])
    with pytest.raises(UserError, match="packed with another list of 27 images, now --data_dir has 1: repeat"):
        pack(tmp_path / "others", packed_copy)


def test_damaged_files_are_packed_again_with_verify(odd_folder, packed_folder, packed_copy):
    shard = bytearray((packed_copy / "images-000002.tar").read_bytes())
    shard[600] ^= 1
    (packed_copy / "images-000002.tar").write_bytes(shard)
    pack(odd_folder, packed_copy)
    assert contents(packed_copy) != contents(packed_folder)
    pack(odd_folder, packed_copy, verify=True)
    assert contents(packed_copy) == contents(packed_folder)
    (packed_copy / "images-000003.tar").unlink()
    (packed_copy / RECORDS_NAME).write_bytes(b"")
    pack(odd_folder, packed_copy, verify=True)
    assert contents(packed_copy) == contents(packed_folder)


def test_a_shard_of_changed_images_is_refused(odd_folder, packed_folder, packed_copy, tmp_path):
    changed = Path(shutil.copytree(odd_folder, tmp_path / "changed"))
    write_images(changed, ["a_tiny.png"])
    (packed_copy / "images-000000.tar").unlink()
    (packed_copy / "images-000001.tar").unlink()
    with pytest.raises(UserError, match=r"images-00000\d\.tar was packed again and has become another: images of"):
        pack(changed, packed_copy)


def test_shards_can_be_packed_anew_in_another_size(odd_folder, packed_folder, tmp_path):
    ours, theirs = (
        pack(packed_folder, tmp_path / "ours", shard_size=20),
        pack(odd_folder, tmp_path / "theirs", shard_size=20),
    )
    assert contents(ours) == contents(theirs)


def test_bad_images_are_errors_or_left_out(odd_folder, tmp_path, capsys):
    mixed = Path(shutil.copytree(odd_folder, tmp_path / "mixed"))
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
    with pytest.raises(UserError, match="no image of class 'b' can be read: repair or remove them, and choose"):
        pack(tmp_path / "images", tmp_path / "out", on_bad_image="skip")
    (tmp_path / "images" / "a_0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"all 2 images are bad, the first: a_0\.png cannot be read"):
        pack(tmp_path / "images", tmp_path / "other", on_bad_image="skip")


def test_images_without_classes(tmp_path):
    write_images(tmp_path / "images", ["one.png", "two.png"])
    with pytest.raises(UserError, match=r"one\.png has no class in its name"):
        pack(tmp_path / "images", tmp_path / "out")
    out = pack(tmp_path / "images", tmp_path / "out", class_cond=False)
    assert next(load_data(data_dir=out, batch_size=2, image_size=8, num_workers=0))[1] == {}
    with tarfile.open(tmp_path / "out" / "images-000000.tar") as tar:
        assert tar.getnames() == ["one.png", "two.png"]
    with pytest.raises(UserError, match="was packed without classes: pack it with --class_cond True, or train"):
        load_data(data_dir=out, batch_size=2, image_size=8, class_cond=True)


@pytest.mark.parametrize(
    "out, sentence",
    [("", "--out is missing"), ("gs://a/b", "--out gs://a/b is remote"), (".", "--out . is --data_dir")],
)
def test_places_that_cannot_be_packed_into(tmp_path, monkeypatch, capsys, out, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pack_images.py", "--data_dir", str(tmp_path), "--out", out])
    with pytest.raises(SystemExit):
        script_util.run(pack_images.main)
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {sentence}") and len(errors.splitlines()) == 1 and not list(tmp_path.iterdir())
