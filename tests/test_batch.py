"""The batch of a step: shared by ranks, in microbatches that find themselves; and the hours that a run will take."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same, run_train, tensors, train_flags

from masked_diffusion import create_diffusion, create_model, dist_util
from masked_diffusion.config import RunConfig
from masked_diffusion.script_util import parse_flags
from masked_diffusion.training import batch, forecast
from masked_diffusion.training.objective import TwoPassObjective
from masked_diffusion.training.resume import resolve
from masked_diffusion.utils.errors import UserError


def small_objective(**options):
    model = create_model("MDTv2_Nano_2", input_size=8, in_channels=3, num_classes=3, mask_ratio=0.3, **options)
    return TwoPassObjective(model, create_diffusion()).train()


def test_ranks_share_the_global_batch():
    config = RunConfig().replaced(global_batch_size=256)
    train = batch.share_batch(config, 8).train
    assert (train.batch_size, train.global_batch_size) == (32, None)
    assert batch.share_batch(RunConfig(), 8) == RunConfig()
    with pytest.raises(UserError, match=r"--global_batch_size 256 cannot be shared by 24 ranks: .* such as 264"):
        batch.share_batch(config, 24)
    with pytest.raises(UserError, match=r"--global_batch_size 2 cannot be shared by 8 ranks: .* such as 8"):
        batch.share_batch(RunConfig().replaced(global_batch_size=2), 8)


@pytest.mark.parametrize("words", [["--microbatch", "much"], ["--microbatch", "-2"], ["--microbatch", "1.5"]])
def test_a_wrong_microbatch_is_a_sentence(words):
    with pytest.raises(UserError, match=f"--microbatch is {words[1]}: it must be a whole number of images, -1 .* auto"):
        parse_flags(RunConfig, "", words)


def test_sharded_weights_cannot_try():
    with pytest.raises(UserError, match=r"--microbatch auto does not work with --shard fsdp: .*give a number"):
        parse_flags(RunConfig, "", ["--microbatch", "auto", "--shard", "fsdp"])


def test_activations_are_counted_without_random_numbers():
    state = torch.get_rng_state()
    objective = small_objective()
    after_init = torch.get_rng_state()
    found = [batch.activation_bytes(objective, num) for num in (1, 2, 3, 4)]
    assert torch.equal(torch.get_rng_state(), after_init) and not torch.equal(state, after_init)
    assert found[3] - found[1] == 2 * (found[2] - found[1]) > 0
    full, masked = (batch.activation_bytes(objective, 2, passes) for passes in ("full", "masked"))
    assert full < found[1] and masked < found[1] and full + masked >= found[1]
    objective.model.enable_grad_checkpoint()
    # One (T, D) input of each block, and the patches that every decoder block gets, are kept at least.
    model = objective.model
    assert found[1] / 4 > batch.activation_bytes(objective, 2) > 4 * 2 * model.num_patches * model.hidden_size


def test_the_longest_masked_pass_is_tried():
    rows = batch.draw_largest(small_objective(), 2)
    assert rows["ids_keep"].shape == (2, int(16 * (1 - 0.3)))
    model = create_model("DiT_Nano_2", input_size=8, in_channels=3, num_classes=0)
    rows = batch.draw_largest(TwoPassObjective(model, create_diffusion()), 2)
    assert set(rows) & {"y", "ids_keep"} == set()


def test_on_a_gpu_the_sizes_are_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(dist_util, "dev", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    sizes = [1, 2, 4, 8, 16, 32, 64, 128]
    for limit, fitting in ((20, 5), (0, 0), (1, 1), (128, 8)):
        tried.clear()
        monkeypatch.setattr(batch, "fits_on_gpu", lambda _, num, *rest, most=limit: tried.append(num) or num <= most)
        assert batch._count_fitting(small_objective(), sizes, ("both",), 0) == fitting
        assert len(tried) <= 4


def test_a_trial_that_runs_out_of_memory_leaves_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    objective = small_objective()
    assert batch.fits_on_gpu(objective, 2, ("full", "masked"), 10)
    assert all(param.grad is None for param in objective.parameters())
    forward = objective.forward

    def forward_up_to_3(x_start, **rows):
        if len(x_start) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x_start, **rows)

    monkeypatch.setattr(objective, "forward", forward_up_to_3)
    assert [batch.fits_on_gpu(objective, num, ("both",), 0) for num in (3, 4)] == [True, False]
    assert all(param.grad is None for param in objective.parameters())


def test_ranks_agree_on_the_smallest(monkeypatch):
    config = resolve(RunConfig().replaced(model="MDTv2_Nano_2", microbatch="auto", batch_size=8))
    config = config.replaced(global_batch=16, architecture={"name": "MDTv2_Nano_2", "options": {}})
    others = {"CPU": "CPU with 4 GiB"}
    monkeypatch.setattr(batch, "_find_microbatch", lambda config, objective: 8)
    monkeypatch.setattr(dist_util, "gather_objects", lambda own: [own, 2 if isinstance(own, int) else others["CPU"]])
    found = batch.choose_microbatch(config, lambda: None, None)
    assert found.train.microbatch == 2 and "CPU with 4 GiB" in found.auto_microbatch["circumstances"]["devices"]
    assert RunConfig.from_json(json.loads(json.dumps(found.to_json()))) == found
    monkeypatch.setattr(batch, "_find_microbatch", None)  # not called again where nothing has changed
    assert batch.choose_microbatch(config, lambda: None, found) == found
    monkeypatch.setattr(batch, "_find_microbatch", lambda config, objective: 1)
    smaller = config.replaced(precision="bf16")
    assert batch.choose_microbatch(smaller, lambda: None, found).train.microbatch == 1
    monkeypatch.setattr(batch, "_find_microbatch", lambda config, objective: 0)
    with pytest.raises(UserError, match=r"not even one image at a time fits .* --grad_checkpoint True"):
        batch.choose_microbatch(config, lambda: None, None)


def test_a_container_limits_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(batch, "CGROUP", tmp_path)
    assert batch.available_memory() == batch.total_memory() // 2  # no Linux
    (tmp_path / "meminfo").write_text("MemTotal:  400 kB\nMemAvailable:      300 kB\n")
    assert batch.available_memory() == 300 * 1024
    (tmp_path / "memory.current").write_text("50000\n")
    for limit, expected in (("max", 300 * 1024), ("60000\n", 10000), ("9000000", 300 * 1024)):
        (tmp_path / "memory.max").write_text(limit)
        assert batch.available_memory() == expected


def test_a_run_equals_that_with_the_number_it_found_and_resumes_with_it(images, tmp_path, monkeypatch):
    asked = []

    def memory_for(num):
        """Memory in which `num` images fit."""

        def available():
            asked.append(num)
            model = create_model("MDTv2_Nano_2", input_size=8, in_channels=3, num_classes=3, mask_ratio=0.3)
            objective = TwoPassObjective(model, create_diffusion()).train()
            per_image = batch.activation_bytes(objective, 2) - batch.activation_bytes(objective, 1)
            num_params = sum(param.numel() for param in objective.parameters())
            return (4 * num_params * 5 + (num + 0.5) * per_image) / batch.CPU_SHARE  # weights, gradients, AdamW, EMA

        return available

    options = {"num_workers": 0, "save_interval": 1}
    monkeypatch.setattr(batch, "available_memory", memory_for(5))
    run_train(monkeypatch, train_flags(images, tmp_path / "auto", microbatch="auto", max_steps=2, **options))
    monkeypatch.setattr(batch, "available_memory", memory_for(100))
    run_train(monkeypatch, train_flags(images, tmp_path / "auto", microbatch="auto", max_steps=3, **options))
    assert asked == [5]
    log = (tmp_path / "auto" / "log.txt").read_text()
    assert "--microbatch auto: 4 of 8 images is the largest microbatch that fits" in log
    assert "--microbatch auto: 4 of 8 images, as this run has found before" in log
    assert log.count("in microbatches of 4;") == 2
    run_train(monkeypatch, train_flags(images, tmp_path / "number", microbatch=4, max_steps=3, **options))
    assert_same(tensors(tmp_path / "auto", 3), tensors(tmp_path / "number", 3))
    flags = json.loads((tmp_path / "auto" / "config.json").read_text())["flags"]
    assert flags["microbatch"] == 4 and flags["batch_size"] == 8


# ---------------------------------------------------------------- hours


def test_the_hours_of_a_run(monkeypatch):
    config = RunConfig().replaced(model="MDTv2_S_2", max_steps=100_000, global_batch=512)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: 8)
    line = forecast.describe_duration(config, 10_000, 100_000, 0.4)
    # 90,000 steps of 0.4 s; 400,000 x 256 / 512 - 10,000 = 190,000 steps
    assert line == (
        "0.4 s per step, 1280.0 images/s; 10 h (80 process hours) to step 100,000 (--max_steps); 21.1 h (169 process "
        "hours) to the paper's 400,000 steps of 256 images"
    )
    monkeypatch.setattr(dist_util, "dev", lambda: torch.device("cuda"))
    annealed = config.replaced(model="MDTv2_Nano_2", lr_anneal_steps=100_000)
    assert forecast.describe_duration(annealed, 100_000, 100_000, 0.4) == (
        "0.4 s per step, 1280.0 images/s; 0 h (0 GPU hours) to step 100,000 (--lr_anneal_steps)"
    )
    assert forecast.describe_duration(annealed, 5, None, 0.4) == "0.4 s per step, 1280.0 images/s"


def test_the_hours_are_said_once_and_leave_pauses_out(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: clock.now)
    loop = SimpleNamespace(metrics=SimpleNamespace(paused_seconds=0.0), step=0, last_step=3610)
    hook = forecast.Forecast(RunConfig().replaced(model="MDTv2_Nano_2", global_batch=8))
    for step in range(1, 120):
        clock.now += 100.0 if step < 10 else 2.0  # the first steps compile
        if step == 30:  # an evaluation
            clock.now += 1000.0
            loop.metrics.paused_seconds += 1000.0
        loop.step = step
        assert hook.after_step(loop) is False
    assert capsys.readouterr().out == (
        "2 s per step, 4.0 images/s; 1.98 h (1.98 process hours) to step 3,610 (--max_steps)\n"
    )
