"""Streams of images out of npz files, whole ones and hostile ones."""

import io
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from helpers import REPO, Trap, write_npz

from evaluations.npz_reader import NpzImages

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 6, 5, 3), dtype=np.uint8)


def npy_header(shape, dtype="|u1"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_are_the_array(tmp_path, save, order):
    save(tmp_path / "a.npz", np.asarray(IMAGES, order=order), np.arange(23))
    images = NpzImages(tmp_path / "a.npz")
    assert len(images) == 23 and images.size == (6, 5) and images.names == ["arr_0", "arr_1"]
    batches = list(images.batches(10))
    assert [len(batch) for batch in batches] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)
    np.testing.assert_array_equal(np.concatenate(list(images.batches(4, start=7, stop=18))), IMAGES[7:18])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_images_are_taken_in_one_passage_in_any_order(tmp_path, monkeypatch, save, order):
    save(tmp_path / "a.npz", np.asarray(IMAGES, order=order))
    images, opened = NpzImages(tmp_path / "a.npz"), []
    archive = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: opened.append(path) or archive(path))
    places = np.array([20, 3, 3, 22, 0])
    np.testing.assert_array_equal(images.take(places), IMAGES[places])
    assert len(opened) == 1


def test_some_images_are_of_all_of_the_file(tmp_path):
    ordered = np.arange(200, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", ordered)
    images = NpzImages(tmp_path / "a.npz")
    some = images.some(60)
    values = np.concatenate(list(some.batches(7)))[:, 0, 0, 0].tolist()
    assert len(some) == 60 and values == some.places == sorted(set(values))
    assert 80 < np.mean(values) < 120 and np.histogram(values, 4, (0, 200))[0].min() > 5
    assert len(images.some(500)) == len(images) == 200 and some.places == images.some(60).places


def test_a_folder_is_said_to_be_one(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder: make an npz of its images with make_reference\.py"):
        NpzImages(tmp_path)


def test_statistics_and_description(tmp_path):
    mu, sigma = np.arange(3.0), np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "a.npz", mu=mu, sigma=sigma, settings=np.array('{"seed": 3}'))
    images = NpzImages(tmp_path / "a.npz")
    assert len(images) == 0 and images.size is None and images.has_statistics("mu", "sigma")
    assert not images.has_statistics("mu", "sigma_s")
    for found, expected in zip(images.statistics("mu", "sigma"), (mu, sigma), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.float64
    assert images.description()["settings"] == {"seed": 3}
    assert images.description()["arrays"]["sigma"] == {"shape": [3, 3], "dtype": "float32"}


def test_pickles_are_never_loaded(tmp_path):
    trap = Trap(tmp_path / "executed")
    pickle.loads(pickle.dumps(trap))
    trap.path.rmdir()  # the trap does work, where it may
    objects = np.array([trap] * 3, dtype=object)
    np.savez(tmp_path / "object.npz", objects)
    np.savez(tmp_path / "beside.npz", IMAGES, settings=objects)
    write_npz(tmp_path / "pickle.npz", {"arr_0": pickle.dumps(trap)})
    for name, message in {"object": "Python objects", "beside": "Python objects", "pickle": "no array"}.items():
        with pytest.raises(ValueError, match=message):
            NpzImages(tmp_path / f"{name}.npz")
    assert not trap.path.exists()


@pytest.mark.parametrize(
    "member, message",
    [
        (IMAGES.astype(np.float32), "arr_0 is float32, not uint8"),
        (IMAGES[..., 0], r"\(23, 6, 5\): images must be"),
        (IMAGES[..., :1], r"\(23, 6, 5, 1\): images must be"),
        (IMAGES[:0], "holds 0 images"),
        (IMAGES[:1], "holds 1 images"),
        (npy_header((10**9, 64, 64, 3)), "needs 12288000000000 bytes, but the file has 0"),
        (npy_header((-1, 64, 64, 3)) + b"x", "needs -12288 bytes"),
        (npy_header((4, -2, -3, 3)) + bytes(72), r"\(4, -2, -3, 3\): images must be"),
        (b"\x93NUMPY\x01\x00\x10\x00__import__('os')", "no array that can be read"),
        (b"\x93NUMPY\x09\x00" + bytes(50), r"version is \(9, 0\)"),
        (b"", "no array that can be read"),
    ],
    ids=range(11),
)
def test_wrong_arrays_are_refused_in_one_sentence(tmp_path, member, message):
    with pytest.raises(ValueError, match=message):
        NpzImages(write_npz(tmp_path / "a.npz", {"arr_0": member}))


@pytest.mark.parametrize(
    "mu, sigma, message",
    [
        (np.zeros(3), np.full((3, 3), np.nan), "sigma holds NaN"),
        (np.zeros(3), np.zeros((3, 2)), r"must be \(d,\) and \(d, d\)"),
        (np.zeros(0), np.zeros((0, 0)), r"must be \(d,\) and \(d, d\)"),
        (np.zeros(3), -np.eye(3), r"a\.npz: sigma: a covariance has no eigenvalue below 0, but one is -1"),
        (np.zeros(3, dtype=int), np.eye(3), "must be floats"),
    ],
)
def test_wrong_statistics_are_refused(tmp_path, mu, sigma, message):
    np.savez(tmp_path / "a.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=message):
        NpzImages(tmp_path / "a.npz").statistics("mu", "sigma")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_refused(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, IMAGES)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short or of another kind"):
        NpzImages(path)
    path.write_bytes(whole[:600] + b"\xff\xfe\xfd\xfc" + whole[604:])
    with pytest.raises(ValueError, match=r"a\.npz cannot be read as an npz"):
        list(NpzImages(path).batches(8))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as an npz"):
        NpzImages(path)
    with pytest.raises(ValueError, match="does not exist"):
        NpzImages(tmp_path / "nowhere.npz")
    np.savez(path, labels=np.arange(3))
    with pytest.raises(ValueError, match="holds neither images"):
        NpzImages(path)


# A child's ru_maxrss begins with its parent's, the tests' own; VmHWM is of its own memory.
READ = """
import sys
from evaluations.npz_reader import NpzImages
from evaluations.metrics import GaussianStatistics
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
base = peak()
images, total = NpzImages(sys.argv[1]), 0
for batch in images.batches(64):
    total += int(batch[:, 0, 0, 0].sum())
print(len(images), total, base, peak())
"""


@pytest.mark.slow
def test_a_gigabyte_of_images_passes_through_few_megabytes(tmp_path):
    """A tenth of 50,000 images of 256 x 256, written in parts and read in a stream."""
    count, image = 5_000, np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        file.write(npy_header((count, 256, 256, 3)))
        for i in range(count):
            file.write((image + np.uint8(i % 256)).tobytes())
    command = [sys.executable, "-c", READ, tmp_path / "a.npz"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    found, total, base, peak = map(int, result.stdout.split())
    assert found == count and total == sum((int(image[0, 0, 0]) + i) % 256 for i in range(count))
    assert peak < base + 100
