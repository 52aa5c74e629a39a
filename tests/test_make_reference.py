"""Reference batches from folders and tars: the loader's crops, statistics that the evaluator reads."""

import sys
import tarfile

import numpy as np
import pytest
from helpers import crops, needs_tensorflow, small_features
from inception_graphs import write_small_graph
from PIL import Image
from sklearn.datasets import load_sample_images

from evaluations import console, make_reference
from evaluations.npz_reader import NpzImages
from masked_diffusion.image_datasets import center_crop_arr


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder of 12 photos in two subfolders, the same as a tar, and a small graph."""
    folder = tmp_path_factory.mktemp("dataset")
    for i, image in enumerate(crops(12, seed=5, size=70)):
        place = folder / "images" / ("test" if i < 5 else "train")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[: 50 + i]).save(place / f"class_{i:02}.png")
    (folder / "images" / "test" / "notes.txt").write_text("not an image")
    with tarfile.open(folder / "images.tar.gz", "w:gz") as archive:
        archive.add(folder / "images", arcname=".")
        archive.add(folder / "images" / "train", arcname="./train")  # the same names again
    write_small_graph(folder / "small.pb")
    return folder


def make(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_reference.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        console.run(make_reference.main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("size", [20, 64, 299])
def test_crops_are_the_loaders(size):
    for photo in load_sample_images().images:
        image = Image.fromarray(photo)
        np.testing.assert_array_equal(make_reference.center_crop(image, size), center_crop_arr(image, size))


@needs_tensorflow
@pytest.mark.parametrize("source", ["images", "images.tar.gz"])
def test_images_and_statistics_are_the_datasets(dataset, tmp_path, monkeypatch, capsys, source):
    out = tmp_path / "reference.npz"
    flags = ["--image_size=32", "--backend=tensorflow", "--inception", dataset / "small.pb", "--batch_size=5"]
    code, _ = make(monkeypatch, capsys, dataset / source, out, *flags)
    assert code == 0 and [path.name for path in tmp_path.iterdir()] == ["reference.npz"]
    with np.load(out, allow_pickle=False) as arrays:
        paths = sorted((dataset / "images").rglob("*.png"))
        expected = np.stack([center_crop_arr(Image.open(path), 32) for path in paths])
        key = lambda images: sorted(image.tobytes() for image in images)  # noqa: E731
        assert key(arrays["arr_0"]) == key(expected)
        images = NpzImages(out)
        features = small_features(dataset / "small.pb", arrays["arr_0"])
        for name, keys in {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}.items():
            mu, sigma = images.statistics(*keys)
            np.testing.assert_allclose(mu, features[name].mean(0), atol=1e-3)
            assert np.array_equal(mu, mu.astype(np.float32))  # ADM's own references hold float32 means
            np.testing.assert_allclose(sigma, np.cov(features[name].numpy(), rowvar=False), atol=1e-3)
    assert images.description()["settings"]["image_size"] == 32


@needs_tensorflow
def test_a_part_of_the_dataset(dataset, tmp_path, monkeypatch, capsys):
    flags = ["--image_size=32", "--backend=tensorflow", "--inception", dataset / "small.pb"]
    make(monkeypatch, capsys, dataset / "images.tar.gz", tmp_path / "a.npz", *flags, "--below=train", "--num_images=4")
    source = make_reference.open_source(dataset / "images")
    names = make_reference.choose(source, "images", "train", 4, seed=0)
    assert len(names) == 4 and all(name.startswith("train/") for name in names)
    assert make_reference.choose(source, "images", "train", 4, seed=1) != names
    assert len(NpzImages(tmp_path / "a.npz")) == 4


def spoil(dataset, name):
    """A compressed tar that is cut short, or of which some bytes are wrong."""
    with tarfile.open(dataset / name, f"w:{name[-2:]}") as archive:
        archive.add(dataset / "images", arcname=".")
    data = bytearray((dataset / name).read_bytes())
    half = len(data) // 2
    (dataset / name).write_bytes(data[:half] if name.startswith("cut") else data[:half] + b"spoilt" * 9 + data[half:])


def test_links_are_followed_but_not_in_circles(tmp_path):
    root, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for path in (root / "b" / "b_1.png", root / "a_1.png", elsewhere / "c" / "c_1.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (root / "linked").symlink_to(elsewhere)
    (root / "b" / "again").symlink_to(root)
    (elsewhere / "c" / "back").symlink_to(root)
    (root / "nowhere.png").symlink_to(tmp_path / "nowhere")
    names = make_reference.choose(make_reference.open_source(root), root, "", 0, 0)
    assert names == ["a_1.png", "b/b_1.png", "linked/c/c_1.png"]


def test_places_that_cannot_be_written_are_said_first(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_reference, "create_network", None)
    before, network = (dataset / "images.tar.gz").stat(), dataset / "small.pb"
    for out, message in (
        (dataset / "images.tar.gz", "which would replace"),
        (network, "which would replace"),
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "a" / "b.npz", "does not exist: make it first"),
        ("/proc/a.npz", "cannot be written"),
    ):
        code, errors = make(monkeypatch, capsys, dataset / "images.tar.gz", out, "--inception", network)
        assert code == 2 and message in errors and len(errors.splitlines()) == 1
    assert (dataset / "images.tar.gz").stat() == before and list(tmp_path.iterdir()) == []


@needs_tensorflow
@pytest.mark.parametrize(
    "source, flags, message",
    [
        ("nowhere", [], "nowhere does not exist"),
        ("images", ["--below=val"], "holds 0 images below val/: 2 are needed"),
        ("images", ["--num_images=40"], "holds 12 images below .: 40 are needed"),
        ("small.pb", [], "small.pb cannot be read as a tar"),
        ("images", ["--image_size=0"], "image_size is 0"),
        ("broken", [], "b.png cannot be read as an image"),
        ("images", ["--num_images=-5"], "--num_images is -5"),
        ("images", ["--num_images=1"], "--num_images is 1: statistics need at least 2"),
        ("images", ["--seed=-1"], "--seed is -1"),
        ("cut.tar.xz", [], "cut.tar.xz cannot be read as a tar"),
        ("spoilt.tar.xz", [], "spoilt.tar.xz cannot be read as a tar"),
        ("spoilt.tar.gz", [], "spoilt.tar.gz cannot be read as a tar"),
    ],
)
def test_what_cannot_be_read_ends_in_one_sentence(dataset, tmp_path, monkeypatch, capsys, source, flags, message):
    (dataset / "broken").mkdir(exist_ok=True)
    for name in ("a", "b"):
        Image.fromarray(crops(1, 0)[0]).save(dataset / "broken" / f"{name}.png")
    (dataset / "broken" / "b.png").write_bytes((dataset / "broken" / "b.png").read_bytes()[:200])
    if source.startswith(("cut", "spoilt")):
        spoil(dataset, source)
    flags = [*flags, "--backend=tensorflow", "--inception", dataset / "small.pb"]
    code, errors = make(monkeypatch, capsys, dataset / source, tmp_path / "a.npz", *flags)
    assert code == 2 and message in errors.splitlines()[-1] and errors.splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []
