"""Packed images in a bucket: read by range, tried again, kept on the disk within bounds."""

import io
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from masked_diffusion import image_datasets
from masked_diffusion.image_datasets import (
    list_image_files,
    relative_names,
)
from masked_diffusion.images import shards as image_shards
from masked_diffusion.images.shards import NAMES_NAME, RECORDS_NAME, DamagedShard
from masked_diffusion.utils import remote_files
from masked_diffusion.utils.errors import UserError


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


def test_remote_images_are_read_by_range_and_kept(odd_folder, packed_folder, cache, monkeypatch):
    bucket = Bucket(packed_folder, monkeypatch)
    shards = check_remote(odd_folder)
    records = np.load(Path(packed_folder, RECORDS_NAME))
    wanted = [(f"images-{r['shard']:06d}.tar", r["offset"], r["size"]) for r in records]
    assert [request for request in bucket.requests if request[0].endswith(".tar")] == wanted
    for again in (shards, check_remote(odd_folder), pickle.loads(pickle.dumps(shards))):
        assert again.read(5) == shards.read(5)
    assert bucket.images() == 27  # all others came from the disk
    # What is damaged in the copy is fetched again.
    for path in cache.rglob("*.tar"):
        path.write_bytes(bytes(9000))
    check_remote(odd_folder)
    assert bucket.images() == 54


def test_the_copy_is_bounded(odd_folder, packed_folder, cache, monkeypatch):
    sizes = [path.stat().st_size for path in sorted(Path(packed_folder).glob("*.tar"))]
    monkeypatch.setenv("MASKED_DIFFUSION_CACHE_GIB", str((sum(sizes[:3]) + 5) / 2**30))
    bucket = Bucket(packed_folder, monkeypatch)
    for _ in range(2):
        check_remote(odd_folder)
    assert bucket.images() == 27 + 12
    assert sum(path.stat().st_size for path in cache.rglob("*.tar")) <= sum(sizes[:3])
    monkeypatch.setenv("MASKED_DIFFUSION_CACHE_GIB", "much")
    with pytest.raises(UserError, match="MASKED_DIFFUSION_CACHE_GIB is 'much': it must be a number of GiB"):
        check_remote(odd_folder)


def test_remote_reads_are_tried_again(odd_folder, packed_folder, cache, monkeypatch):
    bucket = Bucket(packed_folder, monkeypatch, fails=lambda request: request > 3 and request % 3)
    check_remote(odd_folder)
    assert bucket.images() > 60
    shutil.rmtree(cache)
    Bucket(packed_folder, monkeypatch, fails=lambda request: request > 5)
    with pytest.raises(
        UserError, match=r"images-000000\.tar cannot be read at byte \d+ \(the line is dead; 6 attempts"
    ):
        check_remote(odd_folder)


def test_remote_damage_and_missing_files(packed_folder, packed_copy, cache, monkeypatch):
    Bucket(packed_copy, monkeypatch)
    shard = packed_copy / "images-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DamagedShard, match="is damaged, its checksum"):
        list_image_files("gs://bucket").read(0)
    (packed_copy / "images-000001.tar").unlink()
    with pytest.raises(UserError, match=r"images-000001\.tar is not there: copy all files of the packed folder"):
        list_image_files("gs://bucket").read(6)
    shutil.rmtree(cache)
    (packed_copy / NAMES_NAME).write_bytes(bytes((packed_copy / NAMES_NAME).stat().st_size))
    with pytest.raises(UserError, match="has another checksum than its folder's index says: copy the packed folder"):
        list_image_files("gs://bucket")
    assert not [path for path in cache.iterdir() if path.name.endswith(NAMES_NAME)]


def test_a_cache_that_cannot_be_written_is_done_without(odd_folder, packed_folder, cache, monkeypatch, capsys):
    Bucket(packed_folder, monkeypatch)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_shards.os, "pwrite", refuse)
    check_remote(odd_folder)
    assert capsys.readouterr().err.count("is read without a local copy") == 6
