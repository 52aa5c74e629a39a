"""Items, order, sharding, classes, bad folders."""

import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPO, break_image, write_images
from PIL import Image
from torch.utils.data import DataLoader

from masked_diffusion import image_datasets
from masked_diffusion.image_datasets import (
    ImageDataset,
    LoaderWorkerDied,
    StreamSampler,
    image_classes,
    list_image_files,
    load_data,
    read_image,
)
from masked_diffusion.utils import loader_processes
from masked_diffusion.utils.errors import UserError
from masked_diffusion.weights.checkpoint import complete_steps

# ---------------------------------------------------------------- the dataset


def test_items_are_adms(tmp_path):
    paths = write_images(tmp_path, ["b_0.png", "a_1.png"], size=(8, 8))
    labels, classes = image_classes(paths)
    dataset = ImageDataset(8, paths, classes=labels, random_flip=False)
    pixels, cond = dataset[0]
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.float32 and cond["y"].dtype == np.int64
    assert (cond["y"], dataset[1][1]["y"], classes) == (1, 0, ["a", "b"])
    raw = np.asarray(Image.open(paths[0])).astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(pixels, raw.transpose(2, 0, 1))
    assert ImageDataset(8, paths)[0][1] == {}


def test_flips_and_crops_depend_on_seed_epoch_and_index_alone(tmp_path):
    paths = write_images(tmp_path, [f"a_{i}.png" for i in range(40)], size=(16, 16))
    dataset = ImageDataset(8, paths, random_crop=True, seed=3)
    first = [dataset[i, 1][0] for i in range(40)]
    assert all(np.array_equal(first[i], dataset[i, 1][0]) for i in reversed(range(40)))
    assert sum(np.array_equal(first[i], dataset[i, 2][0]) for i in range(40)) < 20
    plain = ImageDataset(8, paths, random_flip=False)
    flips = ImageDataset(8, paths, random_flip=True, seed=1)
    flipped = [np.array_equal(flips[i, 0][0], plain[i, 0][0][:, :, ::-1]) for i in range(40)]
    assert all(f or np.array_equal(flips[i, 0][0], plain[i, 0][0]) for i, f in enumerate(flipped))
    assert 8 < sum(flipped) < 32


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_users_own_loader_draws_crops_and_flips_anew_in_every_epoch(tmp_path, num_workers):
    dataset = ImageDataset(8, write_images(tmp_path, [f"a_{i}.png" for i in range(4)], size=(16, 16)), random_crop=True)

    def epochs(count):
        random.seed(7)
        torch.manual_seed(7)
        loader = DataLoader(dataset, batch_size=4, num_workers=num_workers)
        return [next(iter(loader))[0] for _ in range(count)]

    found = epochs(3)
    assert len({batch.numpy().tobytes() for batch in found}) == 3
    assert all(torch.equal(batch, again) for batch, again in zip(found, epochs(3), strict=True))


def test_adms_names_of_what_a_dataset_holds(tmp_path):
    paths = write_images(tmp_path, ["a_0.png", "b_1.png", "c_2.png"])
    shard = ImageDataset(8, paths, [10, 11, 12], shard=1, num_shards=2)
    assert shard.local_images == [paths[1]] and shard.local_classes == [11]


def test_files_are_listed_in_adms_order(tmp_path):
    names = ["b_0.JPG", "a/c_0.png", "a/b/d_0.gif", "a.png", "e_0.jpeg"]
    write_images(tmp_path, names)
    Path(tmp_path, "notes.txt").write_text("no image")
    listed = [str(Path(p).relative_to(tmp_path)) for p in list_image_files(str(tmp_path))]
    assert listed == ["a/b/d_0.gif", "a/c_0.png", "a.png", "b_0.JPG", "e_0.jpeg"]


def test_other_kinds_of_images_are_counted(tmp_path, capsys):
    write_images(tmp_path, ["a_0.png", "a_1.webp", "b/a_2.WEBP", "b/a_3.bmp"])
    Path(tmp_path, "c.webp").mkdir()
    assert len(list_image_files(str(tmp_path))) == 1
    passed = f"3 images of other formats (.webp 2, .bmp 1) in {tmp_path} are ignored: convert them to jpg or png"
    assert capsys.readouterr().out.count(passed) == 1
    Path(tmp_path, "a_0.png").unlink()
    with pytest.raises(UserError, match=r"hold no image .*, but 3 of other formats \(\.webp 2, \.bmp 1\): convert"):
        list_image_files(str(tmp_path))


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write_images(tmp_path, ["a_0.png"])

    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be listed \\(Permission denied\\)"):
        list_image_files(str(tmp_path))


# ---------------------------------------------------------------- order and sharding


def indices(sampler, steps):
    batches = iter(sampler)
    return [next(batches) for _ in range(steps)]


@pytest.mark.parametrize("world_size, batch_size", [(1, 12), (2, 6), (4, 3)])
def test_an_epoch_is_partitioned_among_ranks(world_size, batch_size):
    ranks = [
        indices(StreamSampler(30, batch_size, seed=1, rank=r, world_size=world_size), 10) for r in range(world_size)
    ]
    stream = [key for step in zip(*ranks, strict=True) for batch in step for key in batch]
    assert stream == [
        key for batch in indices(StreamSampler(30, 12, seed=1, rank=0, world_size=1), 10) for key in batch
    ]
    for epoch in range(4):
        assert sorted(i for i, e in stream if e == epoch) == list(range(30))
    assert [i for i, e in stream if e == 0] != [i for i, e in stream if e == 1]


def test_the_stream_goes_on_where_it_is_asked_to():
    whole = indices(StreamSampler(10, 4, seed=2, rank=0, world_size=1), 9)
    assert indices(StreamSampler(10, 4, seed=2, rank=0, world_size=1, start_step=5), 4) == whole[5:]


def test_batches_do_not_depend_on_workers(tmp_path):
    write_images(tmp_path, [f"{'ab'[i % 2]}_{i}.png" for i in range(10)])
    options = {"data_dir": str(tmp_path), "batch_size": 4, "image_size": 8, "class_cond": True, "random_crop": True}
    ours, theirs = load_data(num_workers=0, **options), load_data(num_workers=2, start_step=3, **options)
    steps = [next(ours) for _ in range(6)]
    for batch, cond in steps[3:]:
        other, other_cond = next(theirs)
        assert torch.equal(batch, other) and torch.equal(cond["y"], other_cond["y"])
    assert batch.shape == (4, 3, 8, 8) and batch.dtype == torch.float32 and cond["y"].dtype == torch.int64
    assert batch.min() >= -1 and batch.max() <= 1


def test_deterministic_data_comes_in_sorted_order(tmp_path):
    paths = write_images(tmp_path, [f"a_{i}.png" for i in range(6)], size=(8, 8))
    data = load_data(data_dir=str(tmp_path), batch_size=3, image_size=8, deterministic=True, random_flip=False)
    batch = torch.cat([next(data)[0] for _ in range(2)])
    expected = np.stack([ImageDataset(8, paths, random_flip=False)[i][0] for i in range(6)])
    np.testing.assert_array_equal(batch.numpy(), expected)


# ---------------------------------------------------------------- bad input


def load(folder, **options):
    return load_data(data_dir=str(folder), **{"batch_size": 2, "image_size": 8, "num_workers": 0} | options)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="--data_dir is missing"):
        load("")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")


def test_a_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} and its subfolders hold no image"):
        load(tmp_path)


def test_fewer_images_than_a_batch(tmp_path):
    write_images(tmp_path, ["a_0.png"])
    with pytest.raises(ValueError, match=r"holds 1 images, fewer than one global batch of 2"):
        load(tmp_path)


def test_a_name_without_a_class(tmp_path):
    write_images(tmp_path, ["a_0.png", "plain.png"])
    with pytest.raises(ValueError, match=r"plain\.png has no class in its name: .*datasets/class_folders\.py"):
        load(tmp_path, class_cond=True)
    assert next(load(tmp_path, class_cond=False))[1] == {}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_an_unreadable_image_is_named(tmp_path, content, num_workers):
    good, bad = write_images(tmp_path, ["a_0.jpg", "a_1.jpg"], size=(40, 40))
    Path(bad).write_bytes(Path(good).read_bytes()[:600] if content == "truncated" else content)
    data, start = load(tmp_path, num_workers=num_workers), time.monotonic()
    with pytest.raises(
        UserError, match=rf"^{bad} cannot be read as an image \([^\n]*\): repair or remove it$"
    ) as caught:
        next(data)
    del data, caught
    assert time.monotonic() - start < 4  # torch's own limit is 5 s for each process that does not end


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind, reason", [("bomb", "decompression bomb"), ("dangling link", "No such file")])
def test_bombs_and_broken_links_are_named_and_skipped(tmp_path, monkeypatch, kind, reason, num_workers):
    good, bad = map(Path, write_images(tmp_path, ["a_0.png", "a_1.png"], size=(8, 8)))
    break_image(bad, kind, monkeypatch)
    with pytest.raises(UserError, match=rf"^{bad} cannot be read as an image \(.*{reason}.*\): repair or remove it$"):
        next(load(tmp_path, num_workers=num_workers))
    batch, _ = next(load(tmp_path, num_workers=num_workers, on_bad_image="skip", random_flip=False))
    expected = np.asarray(Image.open(good)).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(batch, np.stack([expected] * 2))


def test_lack_of_memory_is_no_bad_image(tmp_path, monkeypatch):
    (path,) = write_images(tmp_path, ["a_0.png"])

    def run_out(file):
        raise MemoryError

    monkeypatch.setattr(image_datasets.Image, "open", run_out)
    with pytest.raises(MemoryError):
        read_image(path)


# ---------------------------------------------------------------- data loading processes


def start_loading(tmp_path):
    """A running loader of two processes, and these."""
    write_images(tmp_path, [f"a_{i}.png" for i in range(8)])
    data = load(tmp_path, num_workers=2)
    next(data)
    return data, data._batches._workers


def test_loader_processes_obey_their_own_training_process_alone(tmp_path):
    data, processes = start_loading(tmp_path)
    for process in processes:
        numbers = [str(int(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
        send = "import os, sys; [os.kill(int(sys.argv[1]), int(number)) for number in sys.argv[2:]]"
        subprocess.run([sys.executable, "-c", send, str(process.pid), *numbers], check=True)
    for _ in range(20):
        next(data)
    assert all(process.is_alive() for process in processes)
    start = time.monotonic()
    processes[0].terminate()
    processes[0].join(4)
    assert processes[0].exitcode == 0
    del data, processes
    assert time.monotonic() - start < 4  # torch's own limit is 5 s for each process that does not end


def test_a_killed_loader_process_is_heard_of_at_the_next_batch(tmp_path):
    data, processes = start_loading(tmp_path)
    pid = processes[1].pid
    assert data._batches._workers_done_event._cond.acquire(timeout=4)  # as if that process held it when it was killed
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    time.sleep(0.05)  # torch by itself raises here, wherever the training step is
    start = time.monotonic()
    with pytest.raises(
        LoaderWorkerDied, match=rf"^data loading process {pid} was killed by a signal \(Killed\): most likely"
    ):
        next(data)
    del data
    gc.collect()
    assert time.monotonic() - start < 4
    processes[0].join(4)
    assert processes[0].exitcode == -signal.SIGKILL, "its memory is needed no longer"


def test_what_killed_a_loader_process_is_told():
    explain = loader_processes._explain_death
    for message, expected in (
        (
            "DataLoader worker (pid 12) is killed by signal: Killed. ",
            "process 12 was killed by a signal (Killed): most",
        ),
        ("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible ...", "/dev/shm"),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "process 12, 13 ended: run with --num_workers 0"),
        ("DataLoader worker (pid 12) exited unexpectedly with exit code 7. Details", "12 ended with exit code 7: run"),
    ):
        assert expected in explain(message)
    assert explain("CUDA error: DataLoader") is None


def test_a_signal_to_the_process_group_saves(tmp_path):
    write_images(tmp_path / "images", [f"{'ab'[i % 2]}_{i}.png" for i in range(8)], size=(8, 8))
    flags = {"data_dir": tmp_path / "images", "log_dir": tmp_path, "model": "MDTv2_Nano_2", "image_size": 8}
    flags |= {"vae": "identity", "batch_size": 4, "num_workers": 2, "log_interval": 1}
    command = [
        sys.executable,
        REPO / "scripts" / "image_train.py",
        *(f"--{key}={value}" for key, value in flags.items()),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "progress.jsonl").exists():
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by a signal" in out
    assert len(complete_steps(tmp_path)) == 1
