"""Sharded checkpoints: the same run as with whole ones, on any ranks; found, moved and pruned; damaged ones refused."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import export
import numpy as np
import pytest
import sharded_checks
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    REPO,
    Trap,
    assert_same,
    make_loop,
    run_sample,
    run_train,
    sample_flags,
    tensors,
    train_flags,
    trained,
    whole_tensors,
)

from masked_diffusion import load_model, script_util
from masked_diffusion.config import LogConfig, RunConfig
from masked_diffusion.training.ema import reconstruct
from masked_diffusion.training.resume import Start, agree_on_start, find_start
from masked_diffusion.training.sharded import load_sharded
from masked_diffusion.utils.errors import UserError
from masked_diffusion.weights.checkpoint import complete_steps, newest_ema, prune_checkpoints, remove_leftovers
from masked_diffusion.weights.sharded import read_contents, read_section

SHARDED = {"checkpoint_format": "sharded"}
ASYNC = SHARDED | {"async_save": True}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A run with whole checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("expected")
    trained(folder, phema="0.05")
    return folder


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """The same run with sharded checkpoints."""
    folder = tmp_path_factory.mktemp("sharded")
    trained(folder, phema="0.05", **SHARDED)
    return folder


@pytest.fixture
def run(four_steps, tmp_path):
    """A copy of `four_steps`."""
    return shutil.copytree(four_steps, tmp_path / "run")


# ---------------------------------------------------------------- the same run


def test_its_parts_are_those_of_the_whole_files(expected, four_steps, tmp_path):
    assert complete_steps(four_steps) == [2, 4] and not list(four_steps.glob("*.pt"))
    ours, theirs = whole_tensors(four_steps, 4, tmp_path / "out"), tensors(expected, 4)
    assert_same(ours, theirs)
    assert len({key.split("/")[0] for key in ours}) == 5  # model, two EMAs, a snapshot and the optimizer
    state, other = (torch.load(path / "opt000004.pt", weights_only=True) for path in (tmp_path / "out", expected))
    assert state.keys() == other.keys()
    assert state["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    assert all(state[key] == other[key] for key in ("step", "seed", "guardian", "scaler", "schedule_sampler"))
    names = [list(torch.load(path / "model000004.pt")) for path in (tmp_path / "out", expected)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "kinds", [(SHARDED, SHARDED), (ASYNC, {}), ({}, ASYNC)], ids=["sync", "async-whole", "whole-async"]
)
@pytest.mark.parametrize("optimizer", ["adan", "adan-pytorch", "adamw"])
def test_a_stopped_run_goes_on_bitwise_in_either_format(kinds, optimizer, tmp_path):
    options = {"optimizer": optimizer, "schedule_sampler": "loss-second-moment", "max_steps": 4, "keep": 1}
    trained(tmp_path / "expected", **options)
    for steps, kind in zip((2, 4), kinds, strict=True):
        loop = trained(tmp_path / "parts", **options | {"max_steps": steps} | kind)
    assert loop.step == 4 and complete_steps(tmp_path / "parts") == [4]
    ours = whole_tensors(tmp_path / "parts", 4, tmp_path / "out") if kinds[1] else tensors(tmp_path / "parts", 4)
    assert_same(ours, tensors(tmp_path / "expected", 4))


def test_an_exported_checkpoint_is_resumed(images, tmp_path, monkeypatch):
    options = {"optimizer": "adan", "save_interval": 2}
    run_train(monkeypatch, train_flags(images, tmp_path / "run", max_steps=2, **options, **SHARDED))
    flags = ["--model_path", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--format", "whole"]
    monkeypatch.setattr("sys.argv", ["export.py", *flags])
    script_util.run(export.main)
    for folder, kind in (("run", SHARDED), ("out", {})):
        run_train(monkeypatch, train_flags(images, tmp_path / folder, max_steps=4, **options, **kind))
    assert_same(whole_tensors(tmp_path / "run", 4, tmp_path / "whole"), tensors(tmp_path / "out", 4))


def test_whole_files_are_made_of_sharded_checkpoints_only(expected, tmp_path, monkeypatch, capsys):
    flags = ["--model_path", str(expected), "--out", str(tmp_path / "out"), "--format", "whole"]
    monkeypatch.setattr("sys.argv", ["export.py", *flags])
    with pytest.raises(SystemExit):
        script_util.run(export.main)
    assert "holds no sharded checkpoint" in capsys.readouterr().err and not (tmp_path / "out").exists()


def run_on_ranks(folder, *names):
    """Make the runs of sharded_checks.py with these names."""
    command = [sys.executable, REPO / "tests" / "sharded_checks.py", folder, *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Where the runs that take little time are; and the folder that the full disk was of."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(folder, "fsdp_zero1", "full")
    return folder


def check_same(folder, name, out):
    """Bitwise as with whole files, before the stop and after it; and the ranks have shared the writing."""
    first, second, _ = sharded_checks.RUNS[name]
    for step, (_, count) in ((2, first), (4, second)):
        theirs = tensors(folder / "whole" / name, step)
        assert len(theirs) > 200
        assert_same(whole_tensors(folder / "sharded" / name, step, out), theirs)
        sizes = [path.stat().st_size for path in (folder / "sharded" / name).glob(f"sharded{step:06d}/*/*.distcp")]
        assert len(sizes) >= 5 * min(count, 2) and max(sizes) < 0.9 * sum(sizes) / min(count, 2)


def test_ranks_write_their_parts_and_any_others_go_on(ranks, tmp_path):
    check_same(ranks, "fsdp_zero1", tmp_path)


@pytest.mark.slow
def test_every_kind_of_sharding_goes_on_as_every_other(tmp_path):
    names = [name for name in sharded_checks.RUNS if name != "fsdp_zero1"]
    run_on_ranks(tmp_path, *names)
    for name in names:
        check_same(tmp_path, name, tmp_path / f"{name}_out")


def test_a_full_disk_on_one_rank_ends_all_and_leaves_no_half(ranks):
    """The others learn it at their next step."""
    said = [json.loads((ranks / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1] and "could not be written (File too large)" in said[0]
    assert complete_steps(ranks / "full") == [2] and not list((ranks / "full").glob(".sharded*"))


def test_torch_reads_it_too(four_steps):
    """A section is what `torch.distributed.checkpoint` calls a checkpoint."""
    path = four_steps / "sharded000004" / "model"
    state = {name: torch.zeros(each.size) for name, each in read_contents(path).tensors.items()}
    state = {name: value.long() if name.endswith("index") else value for name, value in state.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert_same(state, read_section(path))


# ---------------------------------------------------------------- who uses it


def test_models_are_loaded_from_it(four_steps, expected, tmp_path, monkeypatch):
    path = four_steps / "sharded000004"
    assert newest_ema(four_steps) == newest_ema(path) == path / "ema_0.99"
    for source, name in (
        (four_steps, "ema_0.99_"),
        (path, "ema_0.99_"),
        (path / "ema_0.9", "ema_0.9_"),
        (path / "model", "model"),
    ):
        state = torch.load(expected / f"{name}000004.pt", weights_only=True)
        assert_same(load_model(source).state_dict(), state)


def test_images_are_drawn_from_it_and_other_weights_are_told_apart(images, tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, train_flags(images, tmp_path / "run", max_steps=2, save_interval=1, **ASYNC))
    run_train(monkeypatch, train_flags(images, tmp_path / "whole", max_steps=2))
    drawn = []
    for folder in ("run", "whole"):
        run_sample(monkeypatch, sample_flags(tmp_path / folder, tmp_path / f"samples_{folder}"))
        with np.load(next((tmp_path / f"samples_{folder}").glob("*.npz"))) as arrays:
            drawn.append(arrays["arr_0"])
    assert np.array_equal(*drawn)
    next((tmp_path / "samples_run").glob("*.npz")).touch()
    with pytest.raises(SystemExit):
        run_sample(monkeypatch, sample_flags(tmp_path / "run" / "sharded000001", tmp_path / "samples_run"))
    assert "error: " in capsys.readouterr().err


def test_an_average_of_any_length_is_made_of_its_snapshots(tmp_path):
    options = {"phema": "0.05,0.10", "max_steps": 4, "save_interval": 1, "keep": 1}
    for kind, format in (("whole", {}), ("sharded", SHARDED)):
        trained(tmp_path / kind, **options, **format)
    assert_same(reconstruct(tmp_path / "sharded", 0.08), reconstruct(tmp_path / "whole", 0.08))


# ---------------------------------------------------------------- keep, move, find


def test_pruning_keeps_every_ema(tmp_path, monkeypatch):
    trained(tmp_path, max_steps=5, save_interval=1, phema="0.05", **ASYNC)
    assert complete_steps(tmp_path) == [3, 4, 5]
    left = {path.name for path in (tmp_path / "sharded000001").iterdir()}
    assert left == {"ema_0.9", "ema_0.99", "phema_0.050", "manifest.json"}
    assert load_model(tmp_path / "sharded000001").depth == 2
    with monkeypatch.context() as patch:  # killed between the mark and the rest
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        prune_checkpoints(tmp_path, 2)
    assert complete_steps(tmp_path) == [4, 5] and (tmp_path / "sharded000003" / "model").exists()
    prune_checkpoints(tmp_path, 2)
    assert not (tmp_path / "sharded000003" / "model").exists() and (tmp_path / "sharded000003" / "ema_0.9").exists()


def test_both_formats_are_counted_together(tmp_path):
    for steps, kind in ((2, {}), (3, SHARDED), (4, {})):
        trained(tmp_path, max_steps=steps, save_interval=1, keep=2, **kind)
    assert complete_steps(tmp_path) == [3, 4]
    assert (tmp_path / "model000004.pt").exists() and (tmp_path / "sharded000003" / "state.pt").exists()
    assert not (tmp_path / "model000002.pt").exists() and (tmp_path / "ema_0.9_000002.pt").exists()


def test_what_killed_processes_left_goes_at_the_next_start_alone(run):
    partial = run / ".sharded000006.0badcafe.partial"
    shutil.copytree(run / "sharded000004", partial)
    (run / "sharded000004").rename(run / ".sharded000004.replaced")
    assert complete_steps(run) == [2]
    prune_checkpoints(run, 3)
    assert partial.exists()
    remove_leftovers(run)
    assert not partial.exists() and complete_steps(run) == [2, 4] and not list(run.glob(".sharded*"))


def test_starts(run, tmp_path):
    newest, new = run / "sharded000004", tmp_path / "new"

    def start(folder, named="auto", before=None, **log):
        before = before and RunConfig().replaced(resume_checkpoint=str(before))
        return find_start(folder, LogConfig(resume_checkpoint=str(named), **log), before)

    assert start(run) == Start(newest, 4, False)
    assert start(run, run / "sharded000002", "auto") == Start(run / "sharded000002", 2, True)
    assert start(new, continue_from=str(newest)) == Start(newest, 4, True)
    for path in (newest, newest / "model"):
        assert start(new, path) == Start(path, 0, True)
    (newest / "state.pt").unlink()
    assert start(run) == Start(run / "sharded000002", 2, False)
    with pytest.raises(UserError, match=r"sharded000004 is not a checkpoint to resume from"):
        start(new, continue_from=str(newest))


def test_going_back_moves_the_later_ones_aside(run):
    log = RunConfig().replaced(resume_checkpoint=str(run / "sharded000002"), ema_rate="0.9,0.99")
    assert agree_on_start(run, log, RunConfig()) == Start(run / "sharded000002", 2, True)
    assert complete_steps(run) == [2] and complete_steps(run / "earlier_run_1") == [4]


def test_weights_within_it_start_a_run_of_their_own_once(run):
    """Its checkpoints are moved aside, and what it starts from with them."""
    named = RunConfig().replaced(resume_checkpoint=str(run / "sharded000004" / "ema_0.9"), ema_rate="0.9,0.99")
    moved = Start(run / "earlier_run_1" / "sharded000004" / "ema_0.9", 0, True)
    assert agree_on_start(run, named, None) == moved
    assert agree_on_start(run, named, None) == moved


def test_continuing_elsewhere_takes_everything_along(four_steps, expected, tmp_path):
    trained(tmp_path / "run", phema="0.05", continue_from=str(four_steps / "sharded000002"), **SHARDED)
    assert_same(whole_tensors(tmp_path / "run", 4, tmp_path / "out"), tensors(expected, 4))


# ---------------------------------------------------------------- damage


def damage(path, kind):
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        os.truncate(path, path.stat().st_size - 7)
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize(
    "kind, message",
    [("missing", "cannot be read"), ("truncated", r"has \d+ bytes instead of \d+"), ("changed", "is damaged")],
)
@pytest.mark.parametrize("name", ["model/__0_0.distcp", "optimizer/__0_0.distcp", "ema_0.99/.metadata", "state.pt"])
def test_a_damaged_part_is_named_before_anything_is_overwritten(run, kind, message, name):
    loop = make_loop(run, phema="0.05", **SHARDED)
    before = {key: value.clone() for key, value in loop.model.state_dict().items()}
    loop.run_step(*next(loop.data))
    after = {key: value.clone() for key, value in loop.model.state_dict().items()}
    damage(run / "sharded000004" / name, kind)
    with pytest.raises(UserError, match=rf"sharded000004/{name} {message}.*--resume_checkpoint"):
        load_sharded(loop.state, run / "sharded000004")
    assert_same(loop.model.state_dict(), after)
    assert any(not torch.equal(value, before[key]) for key, value in after.items())


def test_code_in_a_description_is_never_run(run, tmp_path):
    path = run / "sharded000004" / "ema_0.99"
    for hostile in (Trap(tmp_path / "trap"), getattr, torch.load):
        (path / ".metadata").write_bytes(pickle.dumps(hostile))
        with pytest.raises(UserError, match=r"\.metadata cannot be read as a description of tensors \(it asks for "):
            read_contents(path)
    assert not (tmp_path / "trap").exists()


def elsewhere(found):
    next(iter(found.storage_data.values())).relative_path = "../../secret"


def incomplete(found):
    next(iter(found.state_dict_metadata.values())).chunks.clear()


def nothing(found):
    found.state_dict_metadata = None


@pytest.mark.parametrize(
    "lie, message",
    [(elsewhere, "secret is no part of it"), (incomplete, "has 0 numbers"), (nothing, "description of tensors")],
)
def test_a_description_that_lies_is_refused(run, lie, message):
    path = run / "sharded000004" / "ema_0.99"
    found = pickle.loads((path / ".metadata").read_bytes())
    lie(found)
    (path / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(UserError, match=message):
        read_contents(path)


def test_another_model_is_named(run):
    with pytest.raises(UserError, match=r"sharded000004/model is of another model than the flags describe \(.*--model"):
        make_loop(run, phema="0.05", num_classes=4)
    with pytest.raises(UserError, match=r"averages of sigma_rel 0\.050, but this run tracks \(none\)"):
        make_loop(run)
    with pytest.raises(UserError, match=r"sharded000004/ema_0\.5 .*does not exist, but resuming from step 4 needs it"):
        make_loop(run, phema="0.05", ema_rate="0.5")
