"""Every kind of sharding trains, saves and resumes the same run, tensor by tensor, and each rank holds its part."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import REPO, assert_same, tensors

from masked_diffusion import create_model
from masked_diffusion.training.parallel import shard_model
from masked_diffusion.utils.errors import UserError

KINDS = ("zero1", "fsdp", "hsdp")


def run_ranks(folder, **environment):
    command = [sys.executable, REPO / "tests" / "rank_checks.py", folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=290, env=os.environ | environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(4)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder and what each of four ranks, on two pretended nodes, saw; see rank_checks.py."""
    return run_ranks(tmp_path_factory.mktemp("ranks"), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("kind", KINDS)
def test_sharding_changes_no_step(ranks, kind):
    folder, _ = ranks
    # With evaluations between the steps: fsdp's next step once took the EMA for the weights outside of the blocks.
    assert_same(tensors(folder / kind, 3), tensors(folder / "none", 3), rtol=0, atol=2e-6)
    assert_same(tensors(folder / f"{kind}_again", 5), tensors(folder / "none_again", 5), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ("none", *KINDS))
def test_a_checkpoint_that_is_loaded_and_saved_is_bitwise_the_same(ranks, kind):
    folder, _ = ranks
    ours, theirs = tensors(folder / f"{kind}_copy", 3), tensors(folder / "none", 3)
    assert len(ours) > 200
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", ("none", *KINDS))
def test_one_rank_of_each_node_reads(ranks, kind):
    # The weights, two EMAs and the optimizer.
    assert [seen["opened"][kind] for seen in ranks[1]] == [4, 0, 4, 0]


def test_a_full_disk_of_rank_0_ends_the_save_on_all_ranks(ranks):
    folder, seen = ranks
    for rank in seen:
        assert "could not be written (No space left" in rank["full"]
    assert seen[0]["left"] == [] and (folder / "full" / "opt000005.pt").exists()


def test_nodes_exchange_gradients_once_per_step(ranks):
    for seen in ranks[1]:
        assert 0 < seen["exchanges"]["1"] == seen["exchanges"]["4"]


def test_fine_tuning_starts_from_the_same_weights(ranks):
    for seen in ranks[1]:
        assert seen["tuned_hsdp"] == pytest.approx(ranks[1][0]["tuned_none"], rel=1e-12)
        assert seen["local"] < 0.6 * seen["all"]  # a half, for two ranks on each node


def test_nodes_of_different_sizes_are_refused_for_hsdp(ranks):
    for seen in ranks[1]:
        assert seen["uneven"].startswith(
            "--shard hsdp needs the same number of ranks on every node, but they have 3, 1"
        )


@pytest.mark.parametrize("shard", ["fsdp", "hsdp"])
def test_shards_need_a_process_group(shard):
    with pytest.raises(UserError, match=f"--shard {shard} needs a process group: start the script with torchrun"):
        shard_model(create_model("DiT_Nano_2", input_size=8), shard)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_on_several_gpus_too(tmp_path):
    folder, seen = run_ranks(tmp_path)
    for kind in KINDS:
        assert_same(tensors(folder / kind, 3), tensors(folder / "none", 3), rtol=1e-4, atol=1e-4)
        assert_same(tensors(folder / f"{kind}_copy", 3), tensors(folder / "none", 3))
    assert [rank["opened"]["hsdp"] for rank in seen] == [4, 0, 4, 0]
