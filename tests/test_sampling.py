"""An image is a function of (seed, index); shards, merging, the script."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from fill import fill
from helpers import REPO, make_image_sampler, read, run_sample, run_script, sample_flags, small_model
from PIL import Image

from masked_diffusion import create_model
from masked_diffusion.config import RunConfig
from masked_diffusion.guidance import Guidance
from masked_diffusion.latents.autoencoder import IdentityFirstStage
from masked_diffusion.sample_config import SOLVERS, SampleConfig, WeightsConfig
from masked_diffusion.sampling.build import describe, load_image_sampler
from masked_diffusion.sampling.during_training import Evaluation, SampleGrid
from masked_diffusion.sampling.image_sampler import ImageSampler, choose_labels, last_sample, to_uint8
from masked_diffusion.sampling.shards import ShardStore, draw_samples
from masked_diffusion.utils import precision
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import file_hash

# ---------------------------------------------------------------- images by index


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_does_not_depend_on_its_batch(solver):
    image_sampler, labels = make_image_sampler(solver=solver), choose_labels(range(6), "random", 10, seed=4)
    whole = image_sampler(range(6), labels).astype(int)
    parts = np.concatenate([image_sampler([5, 0], labels[[5, 0]]), image_sampler([3], labels[[3]])]).astype(int)
    assert np.abs(whole[[5, 0, 3]] - parts).max() <= 1
    assert np.abs(whole[0] - whole[1]).max() > 10
    assert np.abs(make_image_sampler(solver=solver, seed=5)(range(6), labels) - whole).max() > 10
    padded = make_image_sampler(solver=solver, batch_size=4, decode_batch=1)([5], labels[[5]]).astype(int)
    assert padded.shape == (1, 8, 8, 3) and np.abs(whole[[5]] - padded).max() <= 1


def test_leaving_out_the_guiding_half_changes_no_pixel():
    labels = choose_labels(range(6), "random", 10, seed=4)
    never, exact = (
        make_image_sampler(guidance=Guidance("power-cosine", 3.8, 4.0, skip_below=skip))(range(6), labels)
        for skip in (-1, 0)
    )
    assert np.array_equal(never, exact)


def test_labels_follow_the_rule():
    assert choose_labels([0, 9, 10, 23], "balanced", 10, seed=0).tolist() == [0, 9, 0, 3]
    labels = choose_labels(range(5000), "random", 10, seed=0)
    assert torch.equal(labels[7:9], choose_labels([7, 8], "random", 10, seed=0))
    assert np.abs(np.bincount(labels, minlength=10) - 500).max() < 5 * 500**0.5
    assert choose_labels(range(3), "random", 0, seed=0).tolist() == [0, 0, 0]
    assert choose_labels([0, 1, 2, 7], "list", 10, seed=0, classes=[5, 3]).tolist() == [5, 3, 5, 3]
    for rule, classes in (("sorted", []), ("list", []), ("random", [1])):
        with pytest.raises(ValueError, match=f"--class_rule is '{rule}'"):
            choose_labels([0], rule, 10, seed=0, classes=classes)


def test_rounds_of_any_size_are_merged_in_order(tmp_path):
    store, rng = ShardStore(tmp_path / "samples.npz", {}), np.random.default_rng(0)
    images, order = rng.integers(0, 256, (60, 4, 4, 3), dtype=np.uint8), rng.permutation(60)
    for indices in np.split(order, [1, 8, 9, 30, 31, 45]):
        store.write(indices, images[indices], indices)
    np.testing.assert_array_equal(store.merge(60), images)
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((60, 4, 4, 3), False, np.dtype(np.uint8))
        assert file.read() == images.tobytes()


def test_a_broken_shard_is_named(tmp_path):
    store = ShardStore(tmp_path / "samples.npz", {})
    store.write([0, 1], np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2))
    (shard,) = store.shards()
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(
        ValueError, match=r"shard_000000_x2\.npz cannot be read .*: remove it, and its images are drawn again"
    ):
        store.missing(4)


def test_merging_holds_few_images_at_a_time(tmp_path):
    store = ShardStore(tmp_path / "samples.npz", {})
    for first in range(0, 960, 32):
        images = np.full((32, 128, 128, 3), first % 251, dtype=np.uint8)
        store.write(list(range(first, first + 32)), images, np.arange(first, first + 32))
    tracemalloc.start()
    store.merge(960)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.35 * (tmp_path / "samples.npz").stat().st_size
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as arrays:
        assert (arrays["arr_0"][:, 0, 0, 0] == np.arange(960) // 32 * 32 % 251).all()


def test_pixels_are_rounded_or_truncated_and_clipped():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5 / 127.5, 0.999]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 128, 255]
    published = ((values + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert np.array_equal(to_uint8(values, "truncate"), published) and published[0, 0, 2, 0] == 127
    with pytest.raises(ValueError, match="--quantize is 'up': choose one of truncate, round"):
        to_uint8(values, "up")


def test_an_image_that_is_not_finite_is_named():
    image_sampler, latents = make_image_sampler(decode_batch=2), torch.zeros(5, 3, 8, 8)
    latents[3, 1, 2, 2] = float("inf")
    with pytest.raises(ValueError, match=r"image 17 has pixels that are NaN or infinite \(1 of 2 images .* diverged"):
        image_sampler.decode(latents, range(14, 19))
    with pytest.raises(ValueError, match=r"image 3 has .* use --precision bf16 or fp32"):
        make_image_sampler(precision="fp16").decode(latents)
    assert make_image_sampler(check_finite=False).decode(latents).shape == (5, 8, 8, 3)


# ---------------------------------------------------------------- shards


def test_shards_are_merged_by_index(tmp_path):
    store, rng = ShardStore(tmp_path / "samples.npz", {"seed": 3}), np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (70, 4, 4, 3), dtype=np.uint8), np.arange(70)
    for indices in ([69, 3], list(range(10, 69)), [0, 1, 2, *range(4, 10)]):
        store.write(indices, images[indices], labels[indices])
    assert store.missing(72) == [70, 71] and not store.finished()
    with pytest.raises(ValueError, match=r"samples\.shards was made with seed 3, now it is 4"):
        ShardStore(tmp_path / "samples.npz", {"seed": 4})
    first = store.merge(70)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], images)
        np.testing.assert_array_equal(arrays["arr_1"], labels)
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].dtype == np.int64
    np.testing.assert_array_equal(first, images[:64])
    assert store.finished() and [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    with pytest.raises(ValueError, match=r"samples\.npz was made with seed 3, now it is 4"):
        ShardStore(tmp_path / "samples.npz", {"seed": 4})


def test_shards_of_several_runs_are_read_once_each(tmp_path, monkeypatch):
    store, rng = ShardStore(tmp_path / "samples.npz", {}), np.random.default_rng(0)
    images, held = rng.integers(0, 256, (90, 4, 4, 3), dtype=np.uint8), set()
    for size, kept in ((7, 3), (5, 2), (20, 1)):  # each run has other batches, of which a kill leaves some
        missing = store.missing(90)
        for first in range(0, len(missing), size * kept):
            batch = missing[first : first + size]
            store.write(batch, images[batch], np.asarray(batch))
            held |= set(batch)
        assert set(range(90)) - set(store.missing(90)) == held
    assert any(np.any(np.diff(np.load(shard)["indices"]) > 1) for shard in store.shards())
    read, load = [], np.load
    monkeypatch.setattr(np, "load", lambda path, **options: read.append(path) or load(path, **options))
    shards = store.shards()
    assert np.array_equal(store.merge(90), images[:64])
    assert read == shards
    with load(tmp_path / "samples.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], images) and np.array_equal(arrays["arr_1"], np.arange(90))


def test_merging_names_an_image_that_is_not_there(tmp_path):
    store = ShardStore(tmp_path / "samples.npz", {})
    store.write([0, 1, 3], np.zeros((3, 4, 4, 3), np.uint8), np.zeros(3))
    with pytest.raises(UserError, match=r"samples\.shards lacks image 2: run the same command again"):
        store.merge(4)
    assert not store.finished() and len(store.shards()) == 1


def test_shards_are_in_the_order_of_their_images_beyond_a_million(tmp_path):
    store = ShardStore(tmp_path / "samples.npz", {})
    for first in (1_000_000, 999_990, 8):
        store.write([first], np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1))
    assert [shard.name for shard in store.shards()] == [
        f"shard_{first}_x1.npz" for first in ("000008", "999990", "1000000")
    ]


def test_the_folder_is_listed_once_however_many_batches(tmp_path, monkeypatch, capsys):
    store, listed, list_shards = ShardStore(tmp_path / "samples.npz", {}), [], ShardStore.shards
    monkeypatch.setattr(ShardStore, "shards", lambda self: listed.append(1) or list_shards(self))
    for total in (60, 64):  # the second call counts from where it starts
        draw_samples(lambda indices, labels: np.zeros((len(indices), 2, 2, 3), np.uint8), store, total, 2, torch.tensor)
    assert len(listed) == 2
    output = capsys.readouterr().out
    assert "60/60 images" in output and "60 of 64 images are there already" in output and "4/4 images" in output


def test_shards_that_a_kill_left_beside_the_npz_are_removed(tmp_path, monkeypatch):
    with ShardStore(tmp_path / "samples.npz", {}) as store, monkeypatch.context() as patch:
        store.write([0], np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1))
        patch.setattr("shutil.rmtree", lambda *_: None)
        store.merge(1)
    assert store.folder.exists()
    assert ShardStore(tmp_path / "samples.npz", {}).finished()
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_a_second_sampler_is_refused_until_the_first_ends(checkpoint, tmp_path, monkeypatch, capsys):
    name = "samples_11x8x8x3"
    with ShardStore(tmp_path / f"{name}.npz", {}) as store:
        (store.folder / "settings.json").unlink()  # as if the first one had not come so far yet
        with pytest.raises(SystemExit) as stop:
            run_sample(monkeypatch, sample_flags(checkpoint, tmp_path))
        assert stop.value.code == 2 and store.folder.exists()
        holder = f"process {os.getpid()} on host {socket.gethostname()}"
        assert f"{name}.npz is being drawn already, by {holder}: wait for it" in capsys.readouterr().err
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} >= {f"{name}.npz", f"{name}.png"}
    assert not (tmp_path / f"{name}.lock").exists()


# ---------------------------------------------------------------- the script


def test_one_and_two_processes_draw_the_same_images(checkpoint, tmp_path):
    run_script("image_sample.py", *sample_flags(checkpoint, tmp_path / "one"))
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    two = run_script("image_sample.py", *sample_flags(checkpoint, tmp_path / "two", batch_size=3), launcher=launch)
    assert two.stdout.count("11/11 images") == 1  # of both ranks
    name = "samples_11x8x8x3.npz"
    (images, labels), (other, other_labels) = read(tmp_path / "one" / name), read(tmp_path / "two" / name)
    assert images.shape == (11, 8, 8, 3) and labels.shape == (11,) and set(labels) <= {0, 1, 2}
    assert np.abs(images - other).max() <= 1 and np.array_equal(labels, other_labels)
    assert Image.open(tmp_path / "one" / name.replace("npz", "png")).size == (64, 16)


def test_the_compiled_model_is_the_one_that_draws(checkpoint, tmp_path, monkeypatch):
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "eager"))
    compile_module, rows = torch.nn.Module.compile, set()

    def backend(graph, inputs):
        def run(*args):
            rows.update(arg.shape[0] for arg in args if isinstance(arg, torch.Tensor) and arg.ndim == 3)
            return graph.forward(*args)

        return run

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend=backend, **kw))
    torch._dynamo.reset()
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "compiled", compile=True))
    images, compiled = (read(tmp_path / folder / "samples_11x8x8x3.npz")[0] for folder in ("eager", "compiled"))
    assert np.abs(images - compiled).max() <= 1
    assert rows - {1} == {4, 8}  # without and with guidance; the last three images are filled up to a batch


def test_a_weaker_checkpoint_guides(checkpoint, tmp_path, monkeypatch, capsys):
    weak = fill(create_model("MDTv2_Nano_2", input_size=8, in_channels=3, num_classes=3, depth=2, decode_layer=0))
    torch.save(weak.state_dict(), tmp_path / "weak.pt")
    for name, flags in (("own", {}), ("guided", {"guide_path": tmp_path / "weak.pt"})):
        run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / name, cfg_cond=False, **flags))
    path = tmp_path / "guided" / "samples_11x8x8x3.npz"
    assert np.abs(read(path)[0] - read(tmp_path / "own" / path.name)[0]).max() > 10
    with np.load(path, allow_pickle=False) as arrays:
        settings = json.loads(str(arrays["settings"]))
    assert settings["guide"] == file_hash(tmp_path / "weak.pt") and settings["guidance"]["rule"] == "constant"
    torch.save(create_model("DiT_Nano_2", input_size=8).state_dict(), tmp_path / "other.pt")
    with pytest.raises(SystemExit):
        run_sample(monkeypatch, sample_flags(checkpoint, tmp_path, guide_path=tmp_path / "other.pt"))
    assert "has in_channels 4, but the model has 3" in capsys.readouterr().err


def test_a_stopped_run_draws_only_what_is_missing(checkpoint, tmp_path, monkeypatch, capsys):
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "whole"))
    images, _ = read(tmp_path / "whole" / "samples_11x8x8x3.npz")
    calls = []

    def stop_at_the_third(self, indices, labels, draw=ImageSampler.__call__):
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, indices, labels)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(ImageSampler, "__call__", stop_at_the_third)
        run_sample(patch, sample_flags(checkpoint, tmp_path / "parts"))
    assert stop.value.code == 130  # as for every program that Ctrl-C ends
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "parts", batch_size=2))
    assert "8 of 11 images are there already" in capsys.readouterr().out
    assert np.abs(read(tmp_path / "parts" / "samples_11x8x8x3.npz")[0] - images).max() <= 1
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "parts", batch_size=2))
    assert "nothing to draw" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "parts", seed=1))
    assert "was made with seed 0, now it is 1" in capsys.readouterr().err


def test_the_npz_is_truncated_and_says_so(checkpoint, tmp_path, monkeypatch, capsys):
    name, words = "samples_5x8x8x3.npz", {"num_samples": 5}
    for quantize, flags in (("truncate", words), ("round", words | {"quantize": "round"})):
        run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / quantize, **flags))
        with np.load(tmp_path / quantize / name, allow_pickle=False) as arrays:
            assert json.loads(str(arrays["settings"]))["quantize"] == quantize
    lower = read(tmp_path / "round" / name)[0] - read(tmp_path / "truncate" / name)[0]
    assert set(lower.flatten()) == {0, 1}

    # What was begun before the choice existed was rounded.
    settings = tmp_path / "old" / "samples_5x8x8x3.shards" / "settings.json"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ShardStore, "merge", lambda *_: sys.exit(1))
        run_sample(patch, sample_flags(checkpoint, tmp_path / "old", **words, quantize="round"))
    old = {key: value for key, value in json.loads(settings.read_text()).items() if key != "quantize"}
    settings.write_text(json.dumps(old))
    with pytest.raises(SystemExit):
        run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "old", **words))
    assert "was made with quantize round, now it is truncate: use the same" in capsys.readouterr().err
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "old", **words, quantize="round"))
    assert np.array_equal(read(tmp_path / "old" / name)[0], read(tmp_path / "round" / name)[0])


def test_classes_alone_are_a_list(checkpoint, tmp_path, monkeypatch):
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path, num_samples=5, classes="2=0"))
    assert read(tmp_path / "samples_5x8x8x3.npz")[1].tolist() == [2, 0, 2, 0, 2]


@pytest.mark.parametrize("faster", [True, False])
def test_auto_precision_is_chosen_and_said(faster, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(precision, "computes_bf16", lambda device_type: faster)
    config = SampleConfig(WeightsConfig(model_path=str(checkpoint), precision="auto"))
    sampler, weights = load_image_sampler(config)
    chosen = "bf16" if faster else "fp32"
    assert sampler.precision == chosen == describe(config, sampler, weights)["precision"]
    assert f"precision: {chosen}, chosen by --precision auto" in capsys.readouterr().out


def test_guidance_flags_without_guidance_are_said_to_be_unused(checkpoint, tmp_path, monkeypatch, capsys):
    published = {"num_samples": 2, "cfg_scale": 3.8, "scale_pow": 4.0}
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "plain", cfg_cond=False, num_samples=2))
    assert "not used" not in capsys.readouterr().out
    for name, flags in (("false", {"cfg_cond": False}), ("none", {"guidance": "none"})):
        run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / name, **published | flags))
        assert "not used by guidance rule none: --cfg_scale, --scale_pow" in capsys.readouterr().out
        drawn, plain = (read(tmp_path / folder / "samples_2x8x8x3.npz")[0] for folder in (name, "plain"))
        assert np.array_equal(drawn, plain)


def test_broken_output_ends_the_run_before_it_is_written(checkpoint, tmp_path, monkeypatch, capsys):
    def spoil(steps):
        return torch.where(torch.arange(4)[:, None, None, None] == 1, float("nan"), last_sample(steps))

    monkeypatch.setattr("masked_diffusion.sampling.image_sampler.last_sample", spoil)
    with pytest.raises(SystemExit) as stop:
        run_sample(monkeypatch, sample_flags(checkpoint, tmp_path, num_samples=4))
    assert stop.value.code == 2 and "error: image 1 has pixels that are NaN" in capsys.readouterr().err
    assert not list(tmp_path.rglob("shard_*")) and not list(tmp_path.rglob("*.png"))


def test_what_a_run_in_training_draws_does_not_end_it():
    config = RunConfig().replaced(sample_interval=1, eval_interval=1, image_size=8, batch_size=2)
    model = small_model()
    torch.nn.init.constant_(model.final_layer.linear.bias, float("nan"))
    grid = SampleGrid(config, model, IdentityFirstStage())
    evaluation = Evaluation(config, model, IdentityFirstStage(), create_comparison=lambda *_: None)
    for image_sampler in (grid.image_sampler, evaluation.image_sampler):
        assert image_sampler(range(2), torch.tensor([0, 1])).shape == (2, 8, 8, 3)
    # Live values compare with those of the npz.
    assert evaluation.image_sampler.quantize == "truncate" and grid.image_sampler.quantize == "round"


def test_weights_and_configuration_are_read_once(checkpoint, tmp_path, monkeypatch):
    from masked_diffusion.weights import checkpoint as files
    from masked_diffusion.weights import pretrained

    counts, parse, load = [], RunConfig.from_json, pretrained.read_weights
    monkeypatch.setattr(pretrained, "read_weights", lambda path: counts.append("weights") or load(path))
    monkeypatch.setattr(files.RunConfig, "from_json", lambda found: counts.append("config") or parse(found))
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path, num_samples=1))
    assert counts == ["weights", "config"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[3]",
        "{",
        '{"diffusion": {"diffusion_steps": "many"}}',
        '{"model": 3}',
        '{"classes": [1, 2]}',
        "[" * 100_000,
    ],
)
def test_another_configuration_is_named(checkpoint, tmp_path, monkeypatch, capsys, text):
    (tmp_path / "model.pt").write_bytes((checkpoint / "ema_0.9_000005.pt").read_bytes())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        run_sample(monkeypatch, sample_flags(tmp_path / "model.pt", tmp_path))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "config.json " in error and "Traceback" not in error


@pytest.mark.slow
def test_a_run_of_three_ranks_killed_again_and_again_draws_the_same_images(checkpoint, tmp_path):
    flags = {"num_samples": 90, "num_sampling_steps": 10}
    run_script("image_sample.py", *sample_flags(checkpoint, tmp_path / "whole", batch_size=50, **flags))
    words = sample_flags(checkpoint, tmp_path / "parts", batch_size=7, **flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone"]
    command += [REPO / "scripts" / "image_sample.py", *words]
    shards, env = tmp_path / "parts" / "samples_90x8x8x3.shards", {**os.environ, "OMP_NUM_THREADS": "1"}
    for kill in (1, 2):
        run = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
        while len(list(shards.glob("shard_*"))) < 4 * kill:
            time.sleep(0.02)
            assert run.poll() is None
        processes = subprocess.run(["pgrep", "-f", str(tmp_path / "parts")], capture_output=True, text=True)
        for pid in processes.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        run.wait()
    run_script("image_sample.py", *words)
    (images, labels), (other, other_labels) = (
        read(tmp_path / folder / "samples_90x8x8x3.npz") for folder in ("whole", "parts")
    )
    assert np.array_equal(labels, other_labels) and (np.abs(images - other) <= 1).mean() >= 0.999


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_path": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"model": "MDTv2_S_2"}, "--model asks for MDTv2 of depth 12"),
        ({"image_size": 256}, "--image_size asks for 256, but the checkpoint has 8"),
        ({"decode_layer": 1}, "--decode_layer asks for 1, but the checkpoint has 2: leave the flag out"),
        ({"class_cond": False}, "--class_cond asks for False, but the checkpoint has True: leave the flag out"),
        ({"diffusion_steps": 500}, "--diffusion_steps asks for 500, but the checkpoint has 1000: leave the flag out"),
        ({"use_kl": True}, "--use_kl asks for True, but the checkpoint has False"),
        ({"timestep_respacing": 4}, "--timestep_respacing 4 and --num_sampling_steps 3 exclude each other"),
        ({"class_con": True}, "did you mean --class_cond?"),
        ({"dist_urls": "a"}, "--dist_urls is not a flag of image_sample.py (--help"),
        ({"num_sampling_steps": "fast"}, "--num_sampling_steps is fast: it must be a number of steps above 0"),
        ({"num_sampling_steps": 0}, "--num_sampling_steps is 0: it must be a number of steps above 0"),
        ({"num_sampling_steps": 1001}, "--num_sampling_steps is 1001: "),
        ({"seed": -5}, "--seed is -5: it must be at least 0"),
        ({"class_rule": "list"}, "--class_rule is 'list' with 0 --classes"),
        ({"class_rule": "random", "classes": "1"}, "--class_rule is 'random' with 1 --classes"),
        ({"classes": ""}, "--classes is '': it must be numbers or names, none of them empty"),
        ({"class_rule": "list", "classes": "3"}, "class 3 does not exist: the model has 3 classes"),
        ({"class_rule": "list", "classes": "dog"}, "the classes of this model have none"),
        ({"solver": "unipc", "num_sampling_steps": "ddim5"}, "'ddim5': solver unipc takes one number"),
        ({"solver": "heun", "use_ddim": True}, "--use_ddim True and --solver heun contradict"),
        ({"guidance": "interval", "guidance_interval": "9=3"}, "--guidance_interval is 9.0 3.0: it must be two"),
        ({"guidance": "interval", "guidance_interval": "9=nan"}, "--guidance_interval is 9.0 nan: it must be finite"),
        ({"cfg_scale": "nan"}, "--cfg_scale is nan: it must be finite"),
        ({"cfg_scale": "inf"}, "--cfg_scale is inf: it must be finite"),
        ({"scale_pow": "nan"}, "--scale_pow is nan: it must be finite"),
        ({"cfg_cond": None, "cfg_scale": 4}, "--cfg_scale is given, but nothing is guided: add --cfg_cond True"),
        ({"cfg_cond": None, "scale_pow": 1}, "--scale_pow is given, but nothing is guided"),
        ({"cfg_cond": None, "guidance_interval": "0=9"}, "--guidance_interval is given, but nothing is guided"),
        ({"cfg_cond": False, "guidance": "constant"}, "--cfg_cond False and --guidance constant contradict"),
        ({"guide_path": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"num_samples": 0}, "--num_samples is 0: it must be at least 1"),
        ({"quantize": "up"}, "--quantize is up: it must be one of truncate, round"),
        ({"vae_decoder": "absent", "model_path": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"vae_decoder": "absent", "num_sampling_steps": "5000"}, "--num_sampling_steps is 5000"),
        ({"vae_decoder": "absent", "model": "DiT_S_2"}, "--model asks for DiT of depth 12"),
    ],
    ids=str,
)
def test_wrong_flags_end_in_one_sentence(checkpoint, tmp_path, options, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_sample(monkeypatch, sample_flags(checkpoint, tmp_path, **options))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and message in error
