"""The dataset scripts, on archives made here and on real images where they lie beside the repository."""

import importlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
import time
import types
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial

import cifar10
import common
import lsun
import numpy as np
import pytest
from helpers import REPO
from PIL import Image
from sklearn.datasets import load_digits

from masked_diffusion.image_datasets import image_classes, list_image_files, read_image
from masked_diffusion.images import listing

PHOTOS = REPO.parent / "shared" / "data" / "imagenet_sample_120.tar"
CIFAR = REPO.parent / "shared" / "data" / "cifar10_jpeg.tar.gz"


def command(script, *args):
    return [sys.executable, str(REPO / "datasets" / f"{script}.py"), *map(str, args)]


def run(script, *args, code=0):
    """What the script's command prints, of which errors are one sentence; in this process, which saves the imports."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", command(script, *args)[1:])
        with pytest.raises(SystemExit) if code else nullcontext() as exit:
            common.run(importlib.import_module(script).main)
    assert not code or exit.value.code == code
    said, silent = (stderr.getvalue(), stdout.getvalue()) if code else (stdout.getvalue(), stderr.getvalue())
    assert (said.count("\n"), silent) == (1, "") and said.startswith("error: ") == bool(code)
    return said


refusal = partial(run, code=2)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "classes.json"}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def classes(out):
    """classes.json, which must agree with what the loader finds."""
    known = json.loads((out / "classes.json").read_text())
    labels, found = image_classes(list_image_files(str(out)))
    assert found == list(known) and set(labels) == set(range(len(known)))
    return known


def encoded(rng, format="jpeg", size=(9, 12)):
    """The bytes of an image of noise."""
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, format=format)
    return file.getvalue()


def write_tree(folder, tree):
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tar_bytes(members, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_tar(path, members, mode="w"):
    path.write_bytes(tar_bytes(members, mode))
    return path


@pytest.fixture(scope="module")
def photos():
    """`{class: {name: JPEG}}` of two ImageNet classes of noise."""
    rng, wnids = np.random.default_rng(0), ("n02099601", "n01440764")
    return {wnid: {f"{wnid}_{i}.JPEG": encoded(rng) for i in range(4)} for wnid in wnids}


def train_tar(path, photos):
    return write_tar(path, {f"{wnid}.tar": tar_bytes(images) for wnid, images in photos.items()})


def test_digits_are_the_real_ones(tmp_path):
    words = command("digits", tmp_path)
    assert subprocess.check_output(words, text=True) == "1437 training and 360 test digits\n"
    splits = [list_image_files(str(tmp_path / split)) for split in ("train", "test")]
    assert [len(paths) for paths in splits] == [1437, 360]
    assert [image_classes(paths)[1] for paths in splits] == [list("0123456789")] * 2
    digits, seen = load_digits(), set()
    for path in splits[0] + splits[1]:
        label, number = path.rsplit("/", 1)[1].removesuffix(".png").split("_")
        pixels = np.asarray(Image.open(path)).astype(float) * 16 / 255
        assert np.abs(pixels - digits.images[int(number)]).max() < 0.04 and int(label) == digits.target[int(number)]
        seen.add(number)
    assert len(seen) == 1797
    before = times(tmp_path / "train"), times(tmp_path / "test")
    subprocess.check_output(words)
    assert before == (times(tmp_path / "train"), times(tmp_path / "test"))


def test_imagenet_from_all_its_forms(photos, tmp_path):
    every = {name: content for images in photos.values() for name, content in images.items()}
    tar = train_tar(tmp_path / "ILSVRC2012_img_train.tar", photos)
    # A folder where the train tar was unpacked, and still lies.
    tars = write_tree(tmp_path / "tars", {f"{wnid}.tar": tar_bytes(images) for wnid, images in photos.items()})
    train_tar(tars / "ILSVRC2012_img_train.tar", photos)
    folders = write_tree(tmp_path / "folders", {f"{name[:9]}/{name}": content for name, content in every.items()})
    for i, source in enumerate((tar, tars, folders)):
        out = tmp_path / f"out{i}"
        assert run("imagenet", source, out) == f"{out}: 2 classes, 8 images written, 0 existed already\n"
        assert contents(out) == every
        assert classes(out) == {"n01440764": "n01440764", "n02099601": "n02099601"}
    names = tmp_path / "LOC_synset_mapping.txt"
    names.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n\n")
    run("imagenet", tar, tmp_path / "named", "--names", names)
    assert classes(tmp_path / "named") == {"n01440764": "tench, Tinca tinca", "n02099601": "n02099601"}


def test_imagenet_of_real_photos(tmp_path):
    if not PHOTOS.exists():
        pytest.skip(f"{PHOTOS.name} is not here")
    with tarfile.open(PHOTOS) as tar:
        real = {m.name.rsplit("/", 1)[-1]: tar.extractfile(m).read() for m in tar.getmembers()[-40:]}
    by_class = {}
    for name, content in real.items():
        by_class.setdefault(name.partition("_")[0], {})[name] = content
    run("imagenet", train_tar(tmp_path / "train.tar", by_class), tmp_path / "out")
    assert contents(tmp_path / "out") == real and list(classes(tmp_path / "out")) == sorted(by_class)


def test_imagenet_refuses_tars_that_are_cut_short(photos, tmp_path):
    whole = train_tar(tmp_path / "train.tar", photos).read_bytes()
    for size in (100, 512, 2000, 15_000, len(whole) // 2, len(whole) // 2 + 700):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        assert "cut.tar cannot be read as a tar" in refusal("imagenet", tmp_path / "cut.tar", tmp_path / "out")
    inner = tar_bytes(photos["n01440764"])
    # In the middle of a photo; in the middle of a header; after a photo, where only the end mark is missing.
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        start = tar.getmembers()[1].offset
    for size in (start + 600, start + 200, start):
        tars = write_tree(tmp_path / "tars", {"n01440764.tar": inner[:size]})
        assert "n01440764.tar cannot be read as a tar" in refusal("imagenet", tars, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


class Python2Pickler(pickle._Pickler):
    """Pickles bytes and arrays as Python 2 and its numpy did, who wrote the real archive."""

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)

    def save_str(self, value):
        self.save_bytes(value.encode())

    def save_global(self, value, name=None):
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())

    dispatch = types.MappingProxyType(
        pickle._Pickler.dispatch
        | {bytes: save_bytes, str: save_str}
        | dict.fromkeys((type, types.BuiltinFunctionType, types.FunctionType), save_global)
    )


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def cifar_batches(images_per_batch):
    """`{file name: pickle}` of a small archive, and its images and labels by batch."""
    rng, batches, arrays = np.random.default_rng(0), {}, {}
    for name in (*cifar10.BATCHES["train"], *cifar10.BATCHES["test"]):
        pixels = rng.integers(0, 256, (images_per_batch, 3072), dtype=np.uint8)
        labels = rng.permutation(np.arange(images_per_batch) % 10).tolist()
        batches[name] = python2_pickle({b"batch_label": name.encode(), b"labels": labels, b"data": pixels})
        arrays[name] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
    return batches, arrays


def cifar_archive(path, batches):
    return write_tar(path, {f"cifar-10-batches-py/{name}": content for name, content in batches.items()}, "w:gz")


def test_cifar10_from_the_python_archive(tmp_path):
    batches, arrays = cifar_batches(20)
    # numpy itself reads the same from the pickles that stand for the real ones.
    batch = pickle.loads(batches["test_batch"], encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), arrays["test_batch"][0])
    archive = cifar_archive(tmp_path / "cifar-10-python.tar.gz", dict(reversed(batches.items())))
    unpacked = write_tree(tmp_path / "cifar-10-batches-py", batches)
    for source, split in ((archive, "train"), (unpacked, "train"), (archive, "test")):
        out = tmp_path / f"{split}-{source.name}"
        run("cifar10", source, out, "--split", split)
        assert classes(out) == {name: name for name in cifar10.CLASSES}
        images = [image for name in cifar10.BATCHES[split] for image in zip(*arrays[name], strict=True)]
        assert len(contents(out)) == len(images)
        for i, (pixels, label) in enumerate(images):
            path = out / f"{cifar10.CLASSES[label]}_{split}-{i:05d}.png"
            np.testing.assert_array_equal(read_image(str(path)), pixels)


HOSTILE = {
    "global": b"cio\nopen\n(V%b\nVw\ntR.",
    "inst": b"(V%b\nVw\niio\nopen\n.",
    "obj": b"(cio\nopen\nV%b\nVw\no.",
    "stack_global": b"Vio\nVopen\n\x93V%b\nVw\n\x86R.",
}


@pytest.mark.parametrize("opcode", HOSTILE)
def test_cifar10_runs_no_code_of_a_pickle(opcode, tmp_path):
    batches, _ = cifar_batches(10)
    mark = tmp_path / "mark"
    batches["data_batch_3"] = HOSTILE[opcode] % str(mark).encode()
    pickle.loads(batches["data_batch_3"]).close()
    mark.unlink()  # the pickle does work, where it may
    sentence = refusal("cifar10", cifar_archive(tmp_path / "evil.tar.gz", batches), tmp_path / "out")
    assert "evil.tar.gz: data_batch_3" in sentence and "which no CIFAR batch does" in sentence
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_cifar10_refuses_what_is_no_batch(tmp_path):
    batches, _ = cifar_batches(10)
    pixels = np.zeros((10, 3072), np.uint8)
    for batch, why in (
        (b"\x80\x02cnumpy\nload\n.", "asks for numpy.load"),
        (b"\x80\x02cnumpy.core.multiarray\nfromfile\n.", "asks for numpy.core.multiarray.fromfile"),
        (b"\x80\x02cbuiltins\ngetattr\n.", "asks for builtins.getattr"),
        (b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.", "cannot be read"),
        (b"", "Ran out of input"),
        (batches["test_batch"][:5000], "truncated"),
        (python2_pickle([1, 2]), "cannot be read"),
        (python2_pickle({b"data": pixels, b"labels": [0, 1]}), "10 images and 2 labels"),
        (python2_pickle({b"data": pixels.astype(np.int16), b"labels": [0] * 10}), "i2"),
        (python2_pickle({b"data": pixels[:, :100], b"labels": [0] * 10}), "cannot be read"),
        (python2_pickle({b"data": pixels, b"labels": [12] * 10}), "cannot be read"),
    ):
        file = common.File("batch", lambda batch=batch: io.BytesIO(batch))
        with pytest.raises(ValueError, match=why):
            cifar10.read_batch(file, "batch")
    del batches["data_batch_2"]
    archive = cifar_archive(tmp_path / "less.tar.gz", batches)
    assert "less.tar.gz lacks data_batch_2" in refusal("cifar10", archive, tmp_path / "out")
    archive.write_bytes(archive.read_bytes()[:-9000])
    assert "less.tar.gz cannot be read as a tar" in refusal("cifar10", archive, tmp_path / "out")


def test_cifar10_from_class_folders_of_real_images(tmp_path):
    if not CIFAR.exists():
        pytest.skip(f"{CIFAR.name} is not here")
    with tarfile.open(CIFAR) as tar:
        real = {m.name: tar.extractfile(m).read() for m in tar if m.isfile() and int(m.name[-8:-4]) < 8}
    assert len(real) == 160
    tar = write_tar(tmp_path / "cifar10.tar.gz", {f"cifar10/{name}": image for name, image in real.items()}, "w:gz")
    folder = write_tree(tmp_path / "folder", real)
    for source, split in ((tar, "train"), (folder, "test"), (folder / "train", "train")):
        out = tmp_path / f"{split}-{source.name}"
        run("cifar10", source, out, "--split", split)
        assert classes(out) == {name: name for name in cifar10.CLASSES}
        paths = {name.split("/", 1)[1]: image for name, image in real.items() if name.startswith(split)}
        assert contents(out) == {path.replace("/", f"_{split}-"): image for path, image in paths.items()}


def write_lmdb(path, values):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=1 << 26) as env, env.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    return path


def test_lsun(tmp_path):
    rng, out = np.random.default_rng(0), tmp_path / "out"
    images = [encoded(rng, format, (256, 300)) for format in ("webp", "jpeg", "png", "gif", "webp")]
    images.append(encoded(rng, "png", (2000, 2000)))  # in all more than the 10 MiB that lmdb maps by itself
    source = write_lmdb(tmp_path / "church_outdoor_train_lmdb", {f"{i:040x}": x for i, x in enumerate(images)})
    command = ("lsun", source, out, "--category", "church_outdoor")
    assert run(*command, "--max_images", "4").endswith("4 images written, 0 existed already\n")
    before = times(out)
    assert run(*command).endswith("2 images written, 4 existed already\n")
    assert before.items() <= times(out).items()
    assert classes(out) == {"church-outdoor": "church_outdoor"}
    written = contents(out)
    for i, extension in enumerate(("png", "jpg", "png", "gif", "png", "png")):
        content = written.pop(f"church-outdoor_{i:07d}.{extension}")
        if i in (0, 4):
            np.testing.assert_array_equal(*(Image.open(io.BytesIO(x)).convert("RGB") for x in (images[i], content)))
        else:
            assert content == images[i]
    assert written == {}
    bedrooms = write_lmdb(tmp_path / "bedroom_val_lmdb", {"a": encoded(rng)})
    run("lsun", bedrooms / "data.mdb", out, "--category", "bedroom")
    assert classes(out) == {"bedroom": "bedroom", "church-outdoor": "church_outdoor"}


def test_lsun_refuses(tmp_path):
    source, empty = write_lmdb(tmp_path / "bad", {"key": b"no image"}), write_lmdb(tmp_path / "empty", {})
    (tmp_path / "file.mdb").write_bytes(bytes(10_000))
    for given, category, flags, sentence in (
        (source, "bedroom", (), "bad: b'key' cannot be read as an image"),
        (empty, "bedroom", (), "empty holds no image"),
        (tmp_path, "bedroom", (), "cannot be read as an lmdb"),
        (tmp_path / "file.mdb", "bedroom", (), "cannot be read as an lmdb"),
        (source, "../up", (), "'../up'"),
        (source, "bedroom", ("--max_images", "0"), "--max_images is 0"),
    ):
        assert sentence in refusal("lsun", given, tmp_path / "out", "--category", category, *flags)
    assert contents(tmp_path / "out") == {}


def test_lsun_says_how_to_get_lmdb(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="pip install lmdb"):
        lsun.import_lmdb()


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        ("cat dog v1.0-b", "cat dog v1.0-b"),
        ("cat polar_bear", "0 1"),
        ("Kätzchen dog", "0 1"),
        ("a_0 a_1 a_2 a_3 a_4 a_5 a_6 a_7 a_8 a_9 b", "00 01 02 03 04 05 06 07 08 09 10"),
        ("0 10 2", "00 10 02"),
        ("01 1", "01 1"),
        ("-x a", "0 1"),
    ],
)
def test_class_ids(names, ids):
    expected = dict(zip(names.split(), ids.split(), strict=True))
    assert common.class_ids(expected) == common.class_ids(reversed(expected)) == expected


def test_class_folders(tmp_path):
    assert common.EXTENSIONS == listing.EXTENSIONS
    paths = ("polar_bear/1.jpg", "polar_bear/den/1.JPG", "cat/_a b.jpeg", "cat/cat_2.png", "dog/x_y.gif")
    tree = {path: path.encode() for path in paths}
    source = write_tree(tmp_path / "photos", tree | {"cat/notes.txt": b"", ".git/a.png": b"", "cat/.hidden.png": b""})
    tar = write_tar(tmp_path / "photos.tar", {f"./{k}": (source / k).read_bytes() for k in (*tree, "cat/.hidden.png")})
    names = ["2_1.jpg", "2_den-1.JPG", "0__a b.jpeg", "0_cat_2.png", "1_x_y.gif"]
    for i, given in enumerate((source, tar)):
        out = tmp_path / f"out{i}"
        run("class_folders", given, out)
        assert classes(out) == {"0": "cat", "1": "dog", "2": "polar_bear"}
        assert contents(out) == dict(zip(names, tree.values(), strict=True))
        found = list_image_files(str(out))
        assert found == sorted(str(out / name) for name in names)
        assert image_classes(found)[0].tolist() == [0, 0, 1, 2, 2]


def test_class_folders_links(tmp_path, monkeypatch):
    tree = {"cat/1.jpg": b"a cat", "dog/1.jpg": b"a dog"}
    source, out = write_tree(tmp_path / "photos", tree), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    run("class_folders", "photos", out, "--link", "True")
    assert contents(out) == {"cat_1.jpg": tree["cat/1.jpg"], "dog_1.jpg": tree["dog/1.jpg"]}
    assert (out / "cat_1.jpg").is_symlink() and list(classes(out)) == ["cat", "dog"]
    # A stale link is no way into the source, for a run that copies.
    (out / "cat_1.jpg").rename(out / "cat_1.jpg.partial")
    before = times(source / "cat")
    assert run("class_folders", "photos", out).endswith("1 images written, 1 existed already\n")
    assert times(source / "cat") == before and not (out / "cat_1.jpg").is_symlink()
    assert (source / "cat" / "1.jpg").read_bytes() == (out / "cat_1.jpg").read_bytes() == tree["cat/1.jpg"]
    # A link that points nowhere any more is made anew.
    (out / "dog_1.jpg").unlink()
    (out / "dog_1.jpg").symlink_to("/nowhere/1.jpg")
    run("class_folders", "photos", out)
    assert contents(out) == {"cat_1.jpg": tree["cat/1.jpg"], "dog_1.jpg": tree["dog/1.jpg"]}


@pytest.mark.parametrize(
    ("script", "names", "sentence"),
    [
        ("class_folders", [], "holds no class folder"),
        ("class_folders", ["cat/1.jpg", "dog/1.txt"], "has no image (jpg, jpeg, png, gif) in dog: fill"),
        ("class_folders", ["cat/1.jpg", "2.jpg"], "holds 2.jpg beside its class folders"),
        ("class_folders", ["cat/a/1.jpg", "cat/a-1.jpg"], "two images that would be named cat_a-1.jpg"),
        ("imagenet", ["n01440764.tar", "n02099601/1.JPEG"], "n02099601/1.JPEG: remove one of the two kinds"),
        ("imagenet", ["n01440764.tar", "more/n01440764.tar"], "more/n01440764.tar: keep one"),
        ("imagenet", ["n01440764.tar"], "n01440764.tar holds no image"),
        ("imagenet", ["tench/1.JPEG"], "tench is not an ImageNet class"),
        ("cifar10", ["boat/1.jpg", *(f"{name}/1.jpg" for name in cifar10.CLASSES)], "differ in class 'boat'"),
        ("cifar10", ["1.jpg"], "differ in class '.'"),
        ("cifar10", ["test/ship/1.jpg"], "the train split of"),
    ],
)
def test_folders_that_are_refused(script, names, sentence, tmp_path):
    (tmp_path / "source").mkdir()
    write_tree(tmp_path / "source", {name: tar_bytes({"README": b""}) for name in names})
    assert sentence in refusal(script, tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == {}


def test_a_folder_is_not_written_into_itself(tmp_path):
    for out in (tmp_path, tmp_path / "cat" / "out", tmp_path.parent):
        assert "one is inside the other" in refusal("class_folders", tmp_path, out)


@pytest.mark.parametrize("name", ["/tmp/cat/1.jpg", "../cat/1.jpg", "cat/../../1.jpg", "cat/..", "./../1.jpg"])
def test_archives_do_not_lead_out_of_their_folder(name, tmp_path):
    tar = write_tar(tmp_path / "evil.tar", {"cat/0.jpg": b"", name: b""})
    for script in ("class_folders", "cifar10", "imagenet"):
        assert f"evil.tar holds {name!r}, which leads out" in refusal(script, tar, tmp_path / "here" / "out")
    assert {path.name for path in tmp_path.rglob("*")} == {"evil.tar"}


def test_links_are_refused_from_and_to_archives(photos, tmp_path):
    tar = train_tar(tmp_path / "train.tar", photos)
    assert "--link True needs images in a folder" in refusal("imagenet", tar, tmp_path / "out", "--link", "True")
    link = tarfile.TarInfo("cat/1.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        tar.addfile(link)
    assert "'cat/1.jpg' as a link: unpack" in refusal("class_folders", tmp_path / "links.tar", tmp_path / "out")


def test_a_second_run_writes_what_is_missing_and_nothing_else(photos, tmp_path):
    every = {f"{name[:9]}/{name}": content for images in photos.values() for name, content in images.items()}
    for script, source in (
        ("imagenet", train_tar(tmp_path / "train.tar", photos)),
        ("cifar10", cifar_archive(tmp_path / "cifar.tar.gz", cifar_batches(10)[0])),
        ("class_folders", write_tree(tmp_path / "tree", every)),
        ("class_folders", write_tar(tmp_path / "tree.tgz", every, "w:gz")),
    ):
        out = tmp_path / f"out-{source.name}"
        run(script, source, out)
        images, before = contents(out), times(out)
        assert run(script, source, out).endswith(f"0 images written, {len(images)} existed already\n")
        assert times(out) == before
        lost = sorted(images)[1::3]
        for name in lost:
            (out / name).unlink()
        (out / f"{lost[0]}.partial").write_bytes(images[lost[0]][:50])
        run(script, source, out)
        assert contents(out) == images
        assert {name for name, time in times(out).items() if time != before[name]} == set(lost)


def test_a_killed_run_leaves_whole_images_and_goes_on(tmp_path):
    source, out = cifar_archive(tmp_path / "cifar.tar.gz", cifar_batches(300)[0]), tmp_path / "out"
    process = subprocess.Popen(command("cifar10", source, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("*.png"))) < 100:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {name: time for name, time in times(out).items() if name.endswith(".png")}
    assert len(before) >= 100
    subprocess.check_output(command("cifar10", source, out))
    run("cifar10", source, tmp_path / "at_once")
    assert contents(out) == contents(tmp_path / "at_once") and len(contents(out)) == 1500
    assert before.items() <= times(out).items()


def test_other_data_in_the_folder_is_not_mixed_in(tmp_path):
    out = tmp_path / "out"
    run("class_folders", write_tree(tmp_path / "a", {"b_c/1.jpg": b"", "d/1.jpg": b""}), out)
    before = times(out)
    renamed = write_tree(tmp_path / "renamed", {"a_c/1.jpg": b"", "e/1.jpg": b""})
    assert f"class 0 is 'b_c' in {out}/classes.json, but 'a_c' in the source" in refusal("class_folders", renamed, out)
    more = write_tree(tmp_path / "more", {"d/1.jpg": b""})
    assert "has 'd' as class 1" in refusal("class_folders", more, out)
    longer = write_tree(tmp_path / "longer", {"b_c/1.jpg": b"more", "d/1.jpg": b""})
    assert "0_1.jpg exists already, with" in refusal("class_folders", longer, out)
    (out / "classes.json").write_text('["b_c", "d"]')
    assert "classes.json is not a JSON dictionary" in refusal("class_folders", tmp_path / "a", out)
    assert {k: v for k, v in times(out).items() if k != "classes.json"}.items() <= before.items()


def test_bad_input_is_one_sentence_and_code_2(tmp_path):
    for script in ("imagenet", "cifar10", "class_folders"):
        result = subprocess.run(command(script, tmp_path / "missing", "out"), capture_output=True, text=True)
        sentence = f"{tmp_path / 'missing'} is neither a folder nor a file: name the data that you have downloaded"
        assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {sentence}\n")
