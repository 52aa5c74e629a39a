"""Every kind of sharding trains, saves and resumes the same run, tensor by tensor, and each rank holds its part."""

import json
import subprocess
import sys

import pytest
from helpers import REPO, assert_same, tensors

KINDS = ("zero1", "fsdp", "hsdp")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder and what each of four ranks, on two pretended nodes, saw; see rank_checks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, REPO / "tests" / "rank_checks.py", folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_sharding_changes_no_step(ranks, kind):
    folder, _ = ranks
    assert_same(tensors(folder / kind, 3), tensors(folder / "none", 3), rtol=0, atol=2e-6)
    assert_same(tensors(folder / f"{kind}_again", 5), tensors(folder / "none_again", 5), rtol=0, atol=5e-6)


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
