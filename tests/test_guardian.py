"""One test per fault: not a number, a spike, a full disk, an unreadable checkpoint."""

import errno
import re
import shutil
import subprocess

import pytest
import torch
from helpers import make_loop, stream, tensors, trained

from masked_diffusion import dist_util
from masked_diffusion.training.guardian import Guardian, TrainingFault
from masked_diffusion.utils.errors import UserError
from masked_diffusion.weights import checkpoint
from masked_diffusion.weights.checkpoint import complete_steps, latest_step


def planted(loop, faults):
    """Give the batches of some steps a factor."""

    def data(start_step, seed, first_stage):
        for step, (batch, cond) in enumerate(stream(start_step, seed), start_step):
            yield batch * faults.get((step, seed), 1.0), cond

    loop.source.stream = data
    loop._start_data()
    return loop


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, capsys):
    loop = planted(make_loop(tmp_path, max_steps=1, log_interval=1), {(1, 0): float("nan")})
    loop.run_step(*next(loop.data))
    before = (
        [p.detach().clone() for p in loop.state.params],
        [e.clone() for e in loop.state.ema["0.9"]],
        str(loop.state.opt.state_dict()),
    )
    loop.run_step(*next(loop.data))
    assert loop.step == 2 and loop.guardian.bad_steps == 1
    assert all(map(torch.equal, loop.state.params, before[0])) and all(
        map(torch.equal, loop.state.ema["0.9"], before[1])
    )
    assert str(loop.state.opt.state_dict()) == before[2]
    loop.run_step(*next(loop.data))
    assert not all(map(torch.equal, loop.state.params, before[0])) and loop.guardian.bad_in_a_row == 0
    assert (
        "step 2 is skipped: its loss or gradients are not finite (1 skipped steps in total)" in capsys.readouterr().out
    )


def test_too_many_in_a_row_stop_the_run_with_the_checkpoint_intact(tmp_path):
    faults = {(step, 0): float("inf") for step in range(3, 100)}
    loop = planted(make_loop(tmp_path, max_steps=50, max_bad_steps=4), faults)
    with pytest.raises(TrainingFault, match="4 steps in a row were not finite"):
        loop.run_loop()
    assert issubclass(TrainingFault, UserError)  # one sentence, and no restarts of what would diverge again
    assert latest_step(tmp_path) == 6 and loop.step == 6
    state = torch.load(tmp_path / "model000006.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state.values())


def test_spikes_are_measured_against_the_recent_mean():
    guardian = Guardian(spike_zscore=4.0, window=30)
    assert [guardian.spike(1.0 + 0.1 * (-1) ** i) for i in range(40)] == [None] * 40
    assert guardian.spike(1.6) == pytest.approx(6.0, rel=0.05)
    restored = Guardian(spike_zscore=4.0, window=30)
    restored.load_state_dict(guardian.state_dict())
    assert restored.spike(1.7) == guardian.spike(1.7) is not None
    assert Guardian().spike(1e9) is None, "there is nothing to compare the first loss with"


def test_a_spike_is_reported_with_its_files(tmp_path, capsys):
    loop = make_loop(tmp_path, max_steps=41, log_interval=100, spike_zscore=5.0, mask_ratio=None)
    loop.source.batch_names = lambda step, seed: [f"file{step}_{i}.png" for i in range(8)]
    planted(loop, {(40, 0): 300.0}).run_loop()
    out = capsys.readouterr().out
    assert "step 41: the loss" in out and "standard deviations above its mean" in out
    assert re.search(r"loss \d+\.\d{4}  t \d+  label \d  file40_\d\.png", out)


def test_a_spike_names_the_worst_samples_of_all_ranks(tmp_path, capsys, monkeypatch):
    gather = dist_util.gather_objects
    other = [(1e9, 5, 3, "of_rank_1.png")]
    loop = make_loop(tmp_path, max_steps=41, log_interval=100, spike_zscore=5.0, mask_ratio=None)
    monkeypatch.setattr(dist_util, "gather_objects", lambda value: [*gather(value), other])
    planted(loop, {(40, 0): 300.0}).run_loop()
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if "is a spike" in line)
    assert lines[first + 1] == "  loss 1000000000.0000  t 5  label 3  of_rank_1.png"
    assert "image_40_" in lines[first + 2] and len([line for line in lines if line.startswith("  loss ")]) == 8


def test_a_spike_rolls_back_to_the_last_checkpoint_with_other_data(tmp_path, capsys):
    options = {"log_interval": 1, "save_interval": 30, "max_steps": 45, "rollback_on_spike": 2, "mask_ratio": None}
    loop = planted(make_loop(tmp_path, spike_zscore=5.0, **options), {(40, 0): 300.0})
    loop.run_loop()
    assert "rolled back to step 30 to continue with other data (rollback 1 of at most 2)" in capsys.readouterr().out
    assert loop.state.rollbacks == 1 and loop.run_seed != loop.config.train.seed and loop.step == 45
    assert torch.load(tmp_path / "opt000045.pt", weights_only=True)["rollbacks"] == 1


def test_rolling_back_restores_everything(tmp_path):
    loop = make_loop(tmp_path, max_steps=4, rollback_on_spike=1)
    loop.run_loop()
    saved = tensors(tmp_path, 4)
    loop.run_step(*next(loop.data))
    loop._roll_back()
    assert loop.step == 4
    loop.save()
    assert all(torch.equal(value, saved[key]) for key, value in tensors(tmp_path, 4).items())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    loop = make_loop(tmp_path, max_steps=4)
    whole_save, calls = checkpoint.save_tensors, []

    def full_at_the_third_file(value, file):
        calls.append(file)
        if loop.step == 4 and len(calls) == 7:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        whole_save(value, file)

    monkeypatch.setattr(checkpoint, "save_tensors", full_at_the_third_file)
    with pytest.raises(OSError, match="No space left"):
        loop.run_loop()
    monkeypatch.undo()
    assert complete_steps(tmp_path) == [2] and not list(tmp_path.glob(".*"))
    resumed = trained(tmp_path, max_steps=4)
    assert resumed.step == 4 and complete_steps(tmp_path) == [2, 4]


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        trained(disk, max_steps=2)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 3_000_000))
        with pytest.raises(OSError, match=r"No space left on device\): free some disk space"):
            trained(disk, max_steps=4)
        assert complete_steps(disk) == [2] and not list(disk.glob(".*"))
        (disk / "filler").unlink()
        assert trained(disk, max_steps=4).step == 4
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_unreadable_checkpoint_is_named(tmp_path):
    trained(tmp_path, max_steps=2)
    path = tmp_path / "opt000002.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"opt000002\.pt cannot be read as a checkpoint"):
        make_loop(tmp_path)


def test_a_killed_removal_is_finished_later(tmp_path):
    trained(tmp_path, max_steps=4)
    (tmp_path / "opt000002.pt").rename(tmp_path / ".opt000002.pt.pruned")
    for name in ("model000009.pt", "config.json", "grid000009.png"):
        (tmp_path / f".{name}.123.partial").write_bytes(b"half")
    checkpoint.remove_leftovers(tmp_path)
    assert complete_steps(tmp_path) == [4]
    left = {path.name for path in [*tmp_path.glob("*000002*"), *tmp_path.glob(".*")]}
    assert left == {"ema_0.9_000002.pt", "ema_0.99_000002.pt"}, "every EMA is kept"


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(tmp_path):
    loop = make_loop(tmp_path, keep=1)
    loop.save()
    with torch.no_grad():
        loop.state.params[0].fill_(torch.nan)
    loop.state.step = 1
    with pytest.raises(TrainingFault, match="the weights of step 1 are NaN or infinite and are not saved"):
        loop.save()
    assert complete_steps(tmp_path) == [0]


def test_skipped_steps_push_no_checkpoint_out(tmp_path):
    faults = {(step, 0): float("inf") for step in range(2, 100)}
    loop = planted(make_loop(tmp_path, max_steps=50, max_bad_steps=5, keep=1), faults)
    with pytest.raises(TrainingFault):
        loop.run_loop()
    assert complete_steps(tmp_path) == [2, 4, 6]
