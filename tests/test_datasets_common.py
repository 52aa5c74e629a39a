"""What the dataset scripts do about damaged sources, full disks and their own faults."""

import bz2
import errno
import io
import tarfile
from functools import partial

import common
import imagenet
import pytest


def sentence(main, capsys):
    """What is printed of an error that the user can mend."""
    with pytest.raises(SystemExit) as stop:
        common.run(main)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_full_disk_names_the_file_and_leaves_no_half(tmp_path, monkeypatch, capsys):
    def fill(read, written):
        written.write(read.read(1))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(common.shutil, "copyfileobj", fill)
    images = [common.File("a_0.jpg", partial(io.BytesIO, b"an image"))]
    write = partial(common.write_images, tmp_path, {"a": "a"}, images)
    assert sentence(write, capsys) == f"error: {tmp_path}/a_0.jpg: No space left on device\n"
    assert [path.name for path in tmp_path.iterdir()] == ["classes.json"]


@pytest.mark.parametrize("fault", [ValueError("a fault of ours"), OSError("of a library"), KeyError("key")], ids=repr)
def test_faults_of_the_scripts_keep_their_traceback(fault):
    def main():
        raise fault

    with pytest.raises(type(fault)) as caught:
        common.run(main)
    assert caught.value is fault


def test_a_damaged_bz2_tar_is_named():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("a/0.jpg")
        info.size = 2000
        tar.addfile(info, io.BytesIO(bytes(range(250)) * 8))
    packed = bytearray(bz2.compress(file.getvalue()))
    packed[len(packed) // 2] ^= 255
    named = pytest.raises(common.UserError, match="photos cannot be read as a tar")
    with named, common.open_tar(io.BytesIO(packed), "photos") as (files, _):
        files[0].open().read()


def test_names_that_are_no_text_are_named(tmp_path, capsys):
    path = tmp_path / "names.txt"
    assert sentence(partial(imagenet.read_names, path), capsys) == f"error: {path}: No such file or directory\n"
    path.write_bytes(b"n01440764 t\xe9nch")
    assert f"error: --names {path} is not a text file in UTF-8" in sentence(partial(imagenet.read_names, path), capsys)
