"""The training loop: resume, ranks, microbatches, precision, logs, bad flags; through the script where it matters."""

import csv
import json
import socket
import sys
from functools import partial
from types import SimpleNamespace

import encode_latents
import image_sample
import numpy as np
import pytest
import torch
from helpers import assert_same, make_loop, run_script, run_train, tensors, train_flags, trained
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from masked_diffusion import script_util
from masked_diffusion.latents.autoencoder import create_first_stage
from masked_diffusion.train_util import TrainLoop
from masked_diffusion.utils.errors import UserError

# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
@pytest.mark.parametrize("optimizer", ["adan", "adan-pytorch", "adamw"])
def test_a_stopped_run_goes_on_bitwise(tmp_path, sampler, optimizer):
    options = {"schedule_sampler": sampler, "optimizer": optimizer}
    trained(tmp_path / "whole", **options)
    trained(tmp_path / "parts", max_steps=2, **options)
    resumed = trained(tmp_path / "parts", **options)
    assert resumed.step == 4
    assert_same(tensors(tmp_path / "whole", 4), tensors(tmp_path / "parts", 4))


def test_a_finished_run_does_nothing(tmp_path, capsys):
    trained(tmp_path, max_steps=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    trained(tmp_path, max_steps=2)
    assert "nothing to train" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}


def test_foreign_weights_start_at_step_0(tmp_path):
    trained(tmp_path / "first", max_steps=2)
    (tmp_path / "first" / "ema_0.9_000002.pt").rename(tmp_path / "weights.pt")
    loop = make_loop(tmp_path / "second", resume_checkpoint=str(tmp_path / "weights.pt"))
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert loop.step == 0
    assert all(torch.equal(value, weights[name]) for name, value in loop.model.state_dict().items())


def test_checkpoints_carry_the_published_names(tmp_path):
    trained(tmp_path, max_steps=3)
    files = {path.name for path in tmp_path.glob("*.pt")}
    kinds = ("model{}.pt", "ema_0.9_{}.pt", "ema_0.99_{}.pt", "opt{}.pt")
    assert files == {kind.format(f"{step:06d}") for kind in kinds for step in (2, 3)}


# ---------------------------------------------------------------- arithmetic


def test_microbatches_add_up_to_the_batch(tmp_path):
    trained(tmp_path / "whole", max_steps=2, optimizer="adamw")
    trained(tmp_path / "micro", max_steps=2, optimizer="adamw", microbatch=3)
    for name in ("model000002.pt", "ema_0.9_000002.pt"):
        ours, theirs = (torch.load(tmp_path / kind / name, weights_only=True) for kind in ("whole", "micro"))
        assert_same(ours, theirs, rtol=1e-4, atol=1e-5)


def test_images_are_encoded_a_microbatch_at_a_time(tmp_path, vae_folder):
    first_stage = create_first_stage(vae_folder, "cpu")
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loop, sizes = make_loop(tmp_path, microbatch=3), []
    loop.first_stage = first_stage
    randn_like = partial(torch.full_like, fill_value=0.5)
    expected = first_stage.encode(images, randn_like)
    moments = first_stage.moments
    first_stage.moments = lambda part: sizes.append(len(part)) or moments(part)
    latents = loop._encode(images, SimpleNamespace(randn_like=randn_like))
    assert sizes == [3, 3, 2]
    torch.testing.assert_close(latents, expected)


def test_ema_follows_the_weights(tmp_path):
    loop = make_loop(tmp_path)
    expected = [p.detach().clone() for p in loop.state.params]
    for _ in range(3):
        loop.run_step(*next(loop.data))
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, loop.state.params, strict=True)]
    for ours, theirs in zip(loop.state.ema["0.9"], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_training_lowers_the_loss(tmp_path):
    trained(tmp_path, max_steps=60, log_interval=10, save_interval=60)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_annealing_ends_the_run_at_zero(tmp_path):
    loop = trained(tmp_path, max_steps=0, lr_anneal_steps=4)
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert loop.step == 4 and [row["lr"] for row in rows] == [pytest.approx(7.5e-4), pytest.approx(2.5e-4)]


def test_the_gradient_is_clipped_to_its_global_norm(tmp_path):
    loop = make_loop(tmp_path, grad_clip=1e-3, optimizer="adamw")
    seen = []
    loop.state.opt.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in loop.state.params]).norm())
    loop.run_step(*next(loop.data))
    assert seen[0] == pytest.approx(1e-3, rel=1e-2)


def test_bf16_trains_float32_weights(tmp_path):
    loop = trained(tmp_path, precision="bf16", max_steps=2)
    assert {p.dtype for p in loop.state.params} == {torch.float32}


# ---------------------------------------------------------------- logs


def test_logs_are_for_people_and_scripts(tmp_path, capsys):
    trained(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    with (tmp_path / "progress.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [2, 4] and [int(row["step"]) for row in table] == [2, 4]
    keys = {"loss", "mse", "vb", "masked_loss", "grad_norm", "lr", "images_per_second", "train_seconds", "eta_seconds"}
    assert keys <= rows[0].keys() and any(f"loss_q{q}" in rows[0] for q in range(4))
    assert rows[0]["loss"] == pytest.approx(rows[0]["mse"] + rows[0]["vb"] + rows[0]["masked_loss"], rel=1e-5)
    assert float(table[1]["loss"]) == pytest.approx(rows[1]["loss"])
    assert "images/s  ETA" in capsys.readouterr().out and "step 4/4" in (tmp_path / "log.txt").read_text()


# ---------------------------------------------------------------- the script, ranks


@pytest.fixture(scope="module")
def one_process(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_script("image_train.py", *train_flags(images, folder))
    return folder


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "torch.distributed.launch"])
def test_two_processes_train_like_one_with_the_doubled_batch(images, one_process, tmp_path, launcher):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = (
        "-m",
        launcher,
        "--nproc_per_node=2",
        f"--master_port={port}",
    )
    result = run_script("image_train.py", *train_flags(images, tmp_path, batch_size=4), launcher=launch)
    assert result.stdout.count("step 3/3") == 1
    for name in ("model000003.pt", "ema_0.9_000003.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (tmp_path, one_process))
        assert_same(ours, theirs, rtol=1e-4, atol=2e-6)
    ours, theirs = (
        torch.load(folder / "opt000003.pt", weights_only=True)["schedule_sampler"] for folder in (tmp_path, one_process)
    )
    assert_same(ours, theirs, rtol=1e-4, atol=1e-6)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "progress.jsonl").read_text().splitlines()]
        for folder in (tmp_path, one_process)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_training_and_sampling_in_the_latents_of_a_vae(images, vae_folder, tmp_path, monkeypatch):
    flags = {"vae": vae_folder, "image_size": 32, "decode_layer": 4, "class_cond": False, "max_steps": 2}
    run_train(monkeypatch, train_flags(images, tmp_path, **flags))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (
        config["model"]["options"] | {"input_size": 4, "in_channels": 4, "num_classes": 0} == config["model"]["options"]
    )
    sample = {"model_path": tmp_path, "log_dir": tmp_path / "samples", "num_samples": 3, "num_sampling_steps": 2}
    monkeypatch.setattr(sys, "argv", ["image_sample.py", *(f"--{key}={value}" for key, value in sample.items())])
    script_util.run(image_sample.main)
    with np.load(tmp_path / "samples" / "samples_3x32x32x3.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (3, 32, 32, 3) and arrays["arr_0"].std() > 0
        assert json.loads(str(arrays["settings"]))["vae"] == vae_folder


def test_the_script_leaves_its_configuration(one_process):
    config = json.loads((one_process / "config.json").read_text())
    assert config["classes"] == ["a", "b", "c"]
    assert config["model"]["options"]["num_classes"] == 3 and config["model"]["name"] == "MDTv2_Nano_2"
    assert config["diffusion"]["snr_gamma"] == 5.0 and config["vae"] == "identity"


def test_training_from_cached_latents_is_training_from_images(images, vae_folder, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "latents"
    encode = {"data_dir": images, "latent_dir": cache, "image_size": 32, "vae": vae_folder, "num_workers": 0}
    monkeypatch.setattr(sys, "argv", ["encode_latents.py", *(f"--{key}={value}" for key, value in encode.items())])
    script_util.run(encode_latents.main)
    options = {"vae": vae_folder, "image_size": 32, "max_steps": 3, "decode_layer": 4}
    run_train(monkeypatch, train_flags(images, tmp_path / "live", **options))
    run_train(monkeypatch, train_flags("", tmp_path / "cached", latent_dir=cache, **options))
    rows = [(tmp_path / kind / "progress.jsonl").read_text().splitlines() for kind in ("live", "cached")]
    live, cached = ([json.loads(line)["loss"] for line in lines] for lines in rows)
    np.testing.assert_allclose(cached, live, rtol=2e-3)
    assert cached != live  # the cache is rounded to float16
    with pytest.raises(SystemExit):
        run_train(monkeypatch, train_flags("", tmp_path / "other", latent_dir=cache, **options | {"vae": "identity"}))
    assert "was made with vae_fingerprint" in capsys.readouterr().err


def test_sample_grids_show_the_ema_and_change_nothing(images, tmp_path, monkeypatch):
    grids = {"sample_interval": 2, "optimizer": "adan", "max_steps": 4, "diffusion_steps": 40}
    run_train(monkeypatch, train_flags(images, tmp_path / "with", **grids))
    run_train(monkeypatch, train_flags(images, tmp_path / "without", **grids | {"sample_interval": 0}))
    assert_same(tensors(tmp_path / "with", 4), tensors(tmp_path / "without", 4))
    first, second = (np.asarray(Image.open(tmp_path / "with" / f"grid00000{step}.png")) for step in (2, 4))
    assert first.shape == (4 * 8, 10 * 8, 3) and not np.array_equal(first, second)
    board = EventAccumulator(str(tmp_path / "with"), size_guidance={"images": 0})
    board.Reload()
    assert board.Tags()["images"] == ["samples"] and [e.step for e in board.Images("samples")] == [2, 4]
    assert {"loss", "loss_q3", "grad_norm", "lr", "images_per_second"} <= set(board.Tags()["scalars"])
    assert [e.step for e in board.Scalars("loss")] == [1, 2, 3, 4]


def test_snapshots_of_power_function_emas_resume_bitwise(tmp_path):
    options = {"phema": "0.05,0.10", "keep": 1}
    trained(tmp_path / "whole", **options)
    trained(tmp_path / "parts", max_steps=2, **options)
    trained(tmp_path / "parts", **options)
    assert_same(tensors(tmp_path / "parts", 4), tensors(tmp_path / "whole", 4))
    for step in (2, 4):
        assert (tmp_path / "parts" / f"phema_0.050_{step:06d}.pt").exists()
    assert not (tmp_path / "parts" / "model000002.pt").exists()


def test_metrics_after_a_resume_go_on_where_the_checkpoint_was(tmp_path):
    loop = make_loop(tmp_path, max_steps=10, log_interval=1, save_interval=4)
    for _ in range(6):  # two steps beyond the checkpoint, then a crash while a row is written
        loop.run_step(*next(loop.data))
        loop._log_row()
        if loop.step == 4:
            loop.save()
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    with (tmp_path / "progress.csv").open("a") as file:
        file.write("7,5")
    trained(tmp_path, max_steps=8, log_interval=1, save_interval=4)
    rows = [json.loads(line)["step"] for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    with (tmp_path / "progress.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == rows == list(range(1, 9))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data_dir": ""}, "--data_dir is missing"),
        ({"model": "MDTv2_Huge_2"}, "no model is called 'MDTv2_Huge_2'"),
        ({"decode_layer": 1}, "must be even, for two equal halves: choose another --decode_layer"),
        ({"image_size": 7}, "input_size (7) must be a multiple of patch_size (2): choose another --image_size"),
        ({"num_classes": 2}, "has 3 classes (a, b, c, ...), more than --num_classes 2"),
        ({"batch_size": 64}, "holds 24 images, fewer than one global batch of 64"),
        ({"resume_checkpoint": "nowhere/model000001.pt"}, "nowhere/model000001.pt does not exist"),
        ({"model": "DiT_Nano_2"}, "DiT has no masked pass"),
        ({"schedule_sampler": "best"}, "--schedule_sampler is best: it must be one of uniform, loss-second-moment"),
    ]
    + ([] if torch.cuda.is_available() else [({"use_fp16": True}, "precision fp16 needs a GPU")]),
    ids=str,
)
def test_wrong_flags_end_in_one_sentence(images, tmp_path, options, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_train(monkeypatch, train_flags(images, tmp_path, **options))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and message in error
    assert not list(tmp_path.glob("*.pt"))


def test_the_published_call_of_the_loop_is_refused_in_a_sentence():
    with pytest.raises(UserError, match=r"TrainLoop\(model=.*not rebuilt here: train with scripts/image_train\.py"):
        TrainLoop(model=None, diffusion=None, data=None, batch_size=4, microbatch=-1, lr=1e-4, ema_rate="0.9999")


def test_flags_that_matter_are_compared_on_resume(images, one_process, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_train(monkeypatch, train_flags(images, one_process, lr=2e-3))
    error = capsys.readouterr().err
    assert "--lr was 0.001 when" in error and "now it is 0.002: repeat it" in error
    run_train(monkeypatch, train_flags(images, one_process, log_interval=2, num_workers=0))
    run_train(monkeypatch, train_flags(images, one_process, lr=1e-3, allow_config_change=True))


def test_an_unreadable_image_stops_training_with_its_name(images, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    whole = (folder / "a_0.png").read_bytes()
    for content, message in (
        (b"broken", f"1 images cannot be used, the first: {folder}/a_0.png cannot be read"),
        (whole[: len(whole) // 2], f"error: {folder}/a_0.png cannot be read as an image"),
    ):
        (folder / "a_0.png").write_bytes(content)
        with pytest.raises(SystemExit):
            run_train(monkeypatch, train_flags(folder, tmp_path / "log"))
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
        run_train(
            monkeypatch, train_flags(folder, tmp_path / f"skip{len(content)}", on_bad_image="skip", num_workers=0)
        )
        assert "a_0.png cannot be read" in "".join(capsys.readouterr())
