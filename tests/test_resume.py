"""Where a run starts: whose checkpoints it keeps, what it refuses, what every rank agrees on."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from helpers import assert_same, fork, make_loop, run_train, tensors, train_flags, trained

from masked_diffusion import dist_util
from masked_diffusion.config import LogConfig, RunConfig
from masked_diffusion.image_datasets import LoaderWorkerDied
from masked_diffusion.training import resume
from masked_diffusion.training.resume import Start, agree_on_start, find_differences, find_start, resolve
from masked_diffusion.utils.errors import UserError
from masked_diffusion.weights.checkpoint import complete_steps


def start(folder, named="auto", before=None, **log):
    return find_start(folder, LogConfig(resume_checkpoint=str(named), **log), before)


def begun_from(origin):
    return RunConfig().replaced(resume_checkpoint=str(origin))


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("four")
    trained(folder, max_steps=4)
    return folder


@pytest.fixture
def run(four_steps, tmp_path):
    """A copy of `four_steps`."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in four_steps.glob("*.pt"):
        os.link(path, folder / path.name)
    return folder


# ---------------------------------------------------------------- where to start


def test_auto_takes_the_newest_checkpoint(run, tmp_path):
    assert start(tmp_path) == Start(None, 0, True)
    assert start(run) == Start(run / "model000004.pt", 4, False)
    assert start(run, run) == Start(run / "model000004.pt", 4, False)


def test_a_checkpoint_of_the_folder_is_gone_back_to_once(run):
    older = run / "model000002.pt"
    assert start(run, older, begun_from("auto")) == Start(older, 2, True)
    assert start(run, older, begun_from(older)) == Start(run / "model000004.pt", 4, False)
    assert start(run, run / "model000004.pt", begun_from("auto")) == Start(run / "model000004.pt", 4, True)


def test_an_empty_name_starts_afresh_but_for_restarts_of_the_launcher(run, monkeypatch):
    assert start(run, "", begun_from("")) == Start(None, 0, True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start(run, "", begun_from("")).step == 4


def test_files_elsewhere_are_weights_alone(run, tmp_path):
    new = tmp_path / "new"
    for name in ("model000004.pt", "ema_0.9_000004.pt"):
        assert start(new, run / name) == Start(run / name, 0, True)
    assert start(new, run) == Start(run, 0, True)
    assert start(new, continue_from=str(run / "model000004.pt")) == Start(run / "model000004.pt", 4, True)
    with pytest.raises(UserError, match=r"--continue_from .*ema_0\.9_000004\.pt is not a checkpoint to resume from"):
        start(new, continue_from=str(run / "ema_0.9_000004.pt"))
    with pytest.raises(UserError, match=r"--resume_checkpoint .*absent\.pt does not exist"):
        start(new, tmp_path / "absent.pt")
    with pytest.raises(UserError, match=r"--continue_from .* and --resume_checkpoint .* cannot be used together"):
        start(new, run, continue_from=str(run / "model000004.pt"))


def test_a_run_from_weights_goes_on_from_its_own_checkpoints(run, tmp_path):
    weights = tmp_path / "weights.pt"
    weights.touch()
    assert start(run, weights, begun_from(weights)).step == 4
    with pytest.raises(UserError, match="holds checkpoints of a run that did not start from"):
        start(run, weights, begun_from("auto"))


# ---------------------------------------------------------------- nothing is lost or mixed


@pytest.mark.parametrize("named, kept", [("", []), ("model000002.pt", [2])])
def test_what_a_new_start_leaves_behind_is_moved_aside(run, named, kept, capsys):
    log = RunConfig().replaced(resume_checkpoint=named and str(run / named), ema_rate="0.9,0.99")
    chosen = agree_on_start(run, log, begun_from("auto"))
    assert chosen.step == (kept[-1] if kept else 0) and complete_steps(run) == kept
    assert complete_steps(run / "earlier_run_1") == [step for step in (2, 4) if step not in kept]
    assert f"are moved to {run / 'earlier_run_1'}" in capsys.readouterr().out


def test_keep_counts_the_checkpoints_of_this_run(run, monkeypatch):
    loop = make_loop(run, resume_checkpoint="", keep=1, save_interval=1, max_steps=3)
    loop.run_loop()
    assert complete_steps(run) == [3] and complete_steps(run / "earlier_run_1") == [2, 4]


def test_weights_of_the_folder_itself_start_at_step_0_once(run):
    loop = make_loop(run, resume_checkpoint=str(run / "ema_0.9_000004.pt"))
    kept = run / "earlier_run_1" / "ema_0.9_000004.pt"
    assert loop.step == 0 and complete_steps(run) == []
    assert all(torch.equal(v, torch.load(kept, weights_only=True)[k]) for k, v in loop.model.state_dict().items())


# ---------------------------------------------------------------- through the script


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "progress.jsonl").read_text().splitlines()]


def test_a_named_older_step_is_not_gone_back_to_at_every_restart(images, tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, train_flags(images, tmp_path, max_steps=4, save_interval=2))
    expected = losses(tmp_path)
    older = {"resume_checkpoint": tmp_path / "model000002.pt"}
    run_train(monkeypatch, train_flags(images, tmp_path, max_steps=3, save_interval=1, **older))
    assert complete_steps(tmp_path) == [2, 3]
    run_train(monkeypatch, train_flags(images, tmp_path, max_steps=4, save_interval=1, **older))
    out = capsys.readouterr().out
    assert "starting at step 2, weights" in out and "starting at step 3, weights" in out
    assert losses(tmp_path) == expected
    assert_same(tensors(tmp_path, 4), tensors(tmp_path / "earlier_run_1", 4))


def test_fine_tuning_from_a_run_elsewhere_takes_its_weights_alone(images, tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, train_flags(images, tmp_path / "first"))
    for name in ("model000003.pt", "ema_0.9_000003.pt", ""):
        other = {"resume_checkpoint": tmp_path / "first" / name, "num_classes": 5, "max_steps": 1}
        run_train(monkeypatch, train_flags(images, tmp_path / f"tuned_{name}", **other))
        assert "starting at step 0, weights from" in capsys.readouterr().out
        assert torch.load(tmp_path / f"tuned_{name}" / "opt000001.pt", weights_only=True)["step"] == 1


def test_continue_from_takes_everything_along(images, tmp_path, monkeypatch):
    run_train(monkeypatch, train_flags(images, tmp_path / "whole", max_steps=4))
    run_train(monkeypatch, train_flags(images, tmp_path / "first", max_steps=2))
    flags = {"continue_from": tmp_path / "first" / "model000002.pt"}
    run_train(monkeypatch, train_flags(images, tmp_path / "second", max_steps=3, **flags))
    run_train(monkeypatch, train_flags(images, tmp_path / "second", max_steps=4, **flags))
    assert_same(tensors(tmp_path / "second", 4), tensors(tmp_path / "whole", 4))
    assert complete_steps(tmp_path / "first") == [2]


def refused(monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        run_train(monkeypatch, flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_other_class_names_or_files_are_refused(images, tmp_path, monkeypatch, capsys):
    folder, log_dir = tmp_path / "images", tmp_path / "log"
    folder.mkdir()
    for path in images.glob("*.png"):
        os.link(path, folder / path.name)
    run_train(monkeypatch, train_flags(folder, log_dir, max_steps=1))
    (folder / "extra_folder").mkdir()
    os.link(images / "a_0.png", folder / "extra_folder" / "a_1.png")
    assert "the list of image files was" in refused(monkeypatch, capsys, train_flags(folder, log_dir, max_steps=2))
    (folder / "extra_folder" / "a_1.png").unlink()
    for path in folder.glob("a_*.png"):
        path.rename(folder / f"dog{path.name[1:]}")
    error = refused(monkeypatch, capsys, train_flags(folder, log_dir, max_steps=2))
    assert "the list of class names was 'a' for label 0" in error and "now it is 'b'" in error


@pytest.mark.parametrize(
    "spelled_out",
    [{"optimizer": "adan"}, {"grad_clip": 1}, {"snr_gamma": 5.0}, {"num_classes": 3}, {"decode_layer": 2}],
    ids=str,
)
def test_a_default_that_is_spelled_out_is_no_change(images, tmp_path, monkeypatch, spelled_out):
    flags = {"optimizer": "None", "max_steps": 1}
    run_train(monkeypatch, train_flags(images, tmp_path, **flags))
    run_train(monkeypatch, train_flags(images, tmp_path, **flags | {"max_steps": 2} | spelled_out))
    assert complete_steps(tmp_path) == [1, 2]


def test_a_configuration_of_before_is_compared_too(images, tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, train_flags(images, tmp_path, max_steps=1, optimizer="None"))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    old = {key: config[key] for key in ("model", "diffusion", "vae", "classes")}
    flags = {key: value for key, value in config["flags"].items() if key not in ("snr_gamma", "continue_from")}
    flags |= {"optimizer": None, "grad_clip": None, "decode_layer": None, "num_classes": None, "local_rank": None}
    path.write_text(json.dumps(old | {"flags": flags | {"global_batch": 8}}))
    assert "--lr was 0.001" in refused(monkeypatch, capsys, train_flags(images, tmp_path, lr=2e-3, optimizer="None"))
    run_train(monkeypatch, train_flags(images, tmp_path, max_steps=2, optimizer="adan"))
    assert complete_steps(tmp_path) == [1, 2]


# ---------------------------------------------------------------- ranks


def test_a_rank_that_cannot_see_the_checkpoint_ends_the_run(run, monkeypatch):
    monkeypatch.setattr(dist_util, "gather_objects", lambda value: [value, "model000004.pt (rank 1, node1)"])
    with pytest.raises(UserError, match=r"1 of 2 ranks cannot see the checkpoint.*rank 1, node1.*--log_dir"):
        agree_on_start(run, RunConfig().replaced(ema_rate="0.9"), None)


def test_when_rank_0_fails_the_others_are_told(images, tmp_path):
    flags = train_flags(images, tmp_path, vae=tmp_path / "no_vae", batch_size=4)
    before = time.monotonic()
    result = fork("image_train.py", flags, ranks=2, check=False)
    assert result.returncode == 2 and result.stderr.count("error: no VAE at") == 1, result.stderr
    assert "Traceback" not in result.stderr and time.monotonic() - before < 60


# ---------------------------------------------------------------- stopped


def test_ctrl_c_saves_and_a_second_one_ends_at_once(tmp_path):
    loop = make_loop(tmp_path, max_steps=100_000)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    loop.run_loop()
    assert complete_steps(tmp_path)[-1] == loop.step > 0

    def wait_for_ever(start_step, seed, first_stage):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        threading.Timer(1.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(20)
        yield

    loop = make_loop(tmp_path, max_steps=100_000)
    loop.data = wait_for_ever(0, 0, None)
    with pytest.raises(KeyboardInterrupt):
        loop.run_loop()


def test_a_killed_loading_process_leaves_a_checkpoint(tmp_path):
    loop = make_loop(tmp_path, max_steps=10, save_interval=100)
    batches = loop.data

    def dies_at_the_fourth():
        for _ in range(3):
            yield next(batches)
        raise LoaderWorkerDied("data loading process 7 was killed")

    loop.data = dies_at_the_fourth()
    with pytest.raises(LoaderWorkerDied, match="process 7 was killed"):
        loop.run_loop()
    assert complete_steps(tmp_path) == [3]


# ---------------------------------------------------------------- what is logged


def test_saving_and_grids_are_no_training_time(tmp_path, monkeypatch):
    class Sleep:
        def after_step(self, loop):
            with loop.metrics.paused():
                time.sleep(0.3)
            return False

    loop = make_loop(tmp_path, max_steps=4, log_interval=2, save_interval=100, hooks=[Sleep()])
    loop.run_step(*next(loop.data))  # what is made on first use is made
    began = time.perf_counter()
    loop.run_loop()
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert time.perf_counter() - began - rows[-1]["train_seconds"] > 0.85


def test_values_of_a_step_that_is_not_finite_stay_in_its_row(tmp_path):
    class Value:
        def after_step(self, loop):
            from masked_diffusion import logger

            logger.logkv("eval_x", loop.step)
            return True

    loop = make_loop(tmp_path, max_steps=3, log_interval=100, hooks=[Value()])
    batches = loop.data
    loop.data = ((batch * (np.nan if i == 1 else 1.0), cond) for i, (batch, cond) in enumerate(batches))
    loop.run_loop()
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [(row["step"], row["eval_x"]) for row in rows] == [(1, 1), (2, 2), (3, 3)]
    assert "loss" not in rows[1]


def test_a_short_schedule_trains_with_and_without_grids(images, tmp_path, monkeypatch):
    for interval in (0, 1):
        flags = {"diffusion_steps": 40, "sample_interval": interval, "max_steps": 1}
        run_train(monkeypatch, train_flags(images, tmp_path / str(interval), **flags))
    assert (tmp_path / "1" / "grid000001.png").exists()


def test_resuming_compares_what_changes_a_run_and_nothing_else():
    config = RunConfig(classes=("cat", "dog"), data_signature="aa", global_batch=8)
    assert list(find_differences(config, config)) == []
    changed = {"lr": 1.0, "mask_ratio": 0.3, "seed": 1, "vae": "mse", "num_workers": 0, "keep": 3, "log_interval": 7}
    names = [name for name, _, _ in find_differences(config, config.replaced(**changed))]
    assert sorted(names) == ["--lr", "--mask_ratio", "--seed", "--vae"]
    assert list(find_differences(config, config.replaced(global_batch=9))) == [
        ("the global batch (--batch_size times the number of ranks)", 8, 9)
    ]
    masked = config.replaced(mask_ratio=0.3)
    ((name, before, now),) = find_differences(masked, masked.replaced(compile=True))
    assert "--compile without --exact_lengths" in name and (before, now) == (False, True)
    assert list(find_differences(masked, masked.replaced(compile=True, exact_lengths=True))) == []
    assert list(find_differences(config, config.replaced(compile=True))) == []
    ((name, before, now),) = find_differences(config, config.replaced(classes=("cat", "eel")))
    assert (name, before, now) == ("the list of class names", "'dog' for label 1", "'eel'")
    ((name, *_),) = find_differences(config, config.replaced(data_signature="bb"))
    assert name == "the list of image files"
    assert list(find_differences(RunConfig(), config)) == [], "an older configuration has neither classes nor signature"


# ---------------------------------------------------------------- nothing moves for a start that fails


def test_the_newest_step_is_gone_back_to_once_too(images, tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, train_flags(images, tmp_path, max_steps=2))
    named = {"resume_checkpoint": tmp_path / "model000002.pt"}
    for steps in (3, 4):
        run_train(monkeypatch, train_flags(images, tmp_path, max_steps=steps, **named))
    assert "starting at step 3, weights" in capsys.readouterr().out
    assert complete_steps(tmp_path) == [2, 3, 4]


def test_weights_of_the_folder_are_found_again_after_a_kill_before_the_first_checkpoint(run):
    named = RunConfig().replaced(resume_checkpoint=str(run / "ema_0.9_000004.pt"), ema_rate="0.9,0.99")
    moved = Start(run / "earlier_run_1" / "ema_0.9_000004.pt", 0, True)
    assert agree_on_start(run, named, None) == moved
    assert agree_on_start(run, named, None) == moved


@pytest.mark.parametrize(
    "name, rates, message",
    [
        ("opt000004.pt", "0.9,0.99", "holds no state dict"),
        ("model000002.pt", "0.5", "ema_0.5_000002.pt .*does not exist, but resuming from step 2 needs it"),
        ("cut.pt", "0.9,0.99", "cannot be read as a checkpoint"),
    ],
)
def test_a_start_that_fails_moves_nothing(run, name, rates, message):
    (run / "cut.pt").write_bytes(b"PK")
    config = RunConfig().replaced(resume_checkpoint=str(run / name), ema_rate=rates)
    with pytest.raises(UserError, match=message):
        agree_on_start(run, config, begun_from("auto"))
    assert complete_steps(run) == [2, 4]


def test_continue_from_compares_the_runs(images, tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, train_flags(images, tmp_path / "first", max_steps=1))
    flags = train_flags(images, tmp_path / "second", continue_from=tmp_path / "first" / "model000001.pt", lr=0.5)
    assert "--lr was 0.001 when" in refused(monkeypatch, capsys, flags)


def test_a_checkpoint_that_does_not_fit_or_is_broken_is_named(run):
    broken = torch.load(run / "model000004.pt", weights_only=True)
    broken["final_layer.linear.bias"][0] = torch.nan
    (run / "model000004.pt").unlink()  # a link
    torch.save(broken, run / "model000004.pt")
    with pytest.raises(UserError, match=r"model000004\.pt .* not finite"):
        make_loop(run)
    torch.save({**broken, "final_layer.linear.bias": torch.zeros(7)}, run / "model000004.pt")
    with pytest.raises(UserError, match=r"model000004\.pt is of another model .*final_layer\.linear\.bias"):
        make_loop(run)
    os.link(run / "model000002.pt", run / "model000006.pt")
    torch.save({"optimizer": {}}, run / "opt000006.pt")
    for rate in (0.9, 0.99):
        os.link(run / f"ema_{rate}_000002.pt", run / f"ema_{rate}_000006.pt")
    with pytest.raises(UserError, match=r"opt000006\.pt is no training state"):
        make_loop(run)


def test_both_spellings_of_a_model_are_the_same_run():
    ours, dits = (resolve(RunConfig().replaced(model=name)) for name in ("MDTv2_Nano_2", "MDTv2-Nano/2"))
    assert list(find_differences(ours, dits)) == []


# ---------------------------------------------------------------- one run in a folder


def test_a_second_run_in_the_folder_is_refused(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resume, "LOCK_SECONDS", 0.3)
    with resume.own_log_dir(tmp_path):
        error = refused(monkeypatch, capsys, train_flags(images, tmp_path))
        assert f"{tmp_path} is being trained in already, by process {os.getpid()} on host" in error
    run_train(monkeypatch, train_flags(images, tmp_path, max_steps=1))
    assert complete_steps(tmp_path) == [1] and not (tmp_path / ".lock").exists()


def test_the_newest_three_checkpoints_and_every_ema_are_kept(tmp_path):
    trained(tmp_path, max_steps=5, save_interval=1)
    assert complete_steps(tmp_path) == [3, 4, 5]
    assert len(list(tmp_path.glob("ema_0.9_*.pt"))) == 5 and not (tmp_path / "model000002.pt").exists()
