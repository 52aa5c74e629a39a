"""Configuration: values in their range, from flags and from files, and what resuming compares."""

import dataclasses
import math
import typing

import pytest

from masked_diffusion.config import RunConfig
from masked_diffusion.published import model_and_diffusion_defaults
from masked_diffusion.sample_config import SampleConfig
from masked_diffusion.script_util import parse_flags
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.options import Config, check_value


def parse(*words, config_class=RunConfig, **defaults):
    return parse_flags(config_class, "A test.", words, **defaults)


def numbers(config_class):
    """Every flag that is a number, with its bounds."""
    for owner, field in config_class.flags():
        kinds = typing.get_args(typing.get_type_hints(owner)[field.name]) or (typing.get_type_hints(owner)[field.name],)
        if {int, float} & set(kinds):
            yield field


NUMBERS = [*numbers(RunConfig), *numbers(SampleConfig)]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_no_number_may_be_nan_infinite_or_out_of_its_range(field):
    bounds = field.metadata["bounds"]
    outside = {"at_least": lambda b: b - 1, "above": lambda b: b, "at_most": lambda b: 2 * b, "below": lambda b: b}
    for value in (math.nan, math.inf, *(outside[key](bound) for key, bound in bounds.items())):
        with pytest.raises(UserError, match=rf"^--{field.name} is .*: it must be "):
            check_value(field, value)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ema_rate", "nan"], "--ema_rate is nan"),
        (["--ema_rate", "2"], "--ema_rate is 2"),
        (["--ema_rate", "abc"], "--ema_rate is abc"),
        (["--ema_rate", ""], "--ema_rate is '': it must be"),
        (["--ema_rate", "0.9,0.90"], "--ema_rate is 0.9,0.90: it must be different numbers"),
        (["--phema", "0.05,0.05"], "--phema is 0.05,0.05"),
        (["--phema", "0.3"], "--phema is 0.3"),
        (["--grad_clip", "-1"], "--grad_clip is -1.0: it must be at least 0"),
        (["--weight_decay", "-1"], "--weight_decay is -1.0"),
        (["--keep", "-1"], "--keep is -1: it must be at least 0"),
        (["--max_steps", "-5"], "--max_steps is -5"),
        (["--lr", "inf"], "--lr is inf: it must be finite and above 0"),
        (["--mask_ratio", "nan"], "--mask_ratio is nan: it must be finite and at least 0 and below 1"),
        (["--seed", "-1"], "--seed is -1: it must be at least 0"),
        (["--snr_gamma", "0"], "--snr_gamma is 0.0: it must be a number above 0"),
        (["--snr_gamma", "much"], "--snr_gamma is much: it must be a number above 0"),
        (["--fp16_scale_growth", "0"], "--fp16_scale_growth is 0.0: it must be above 0"),
        (["--predict_v", "--predict_xstart"], "--predict_xstart and --predict_v exclude each other"),
        (["--objective", "flows"], "--objective is flows: it must be one of diffusion, flow"),
        (["--t_sampling", "logit-normal"], "--t_sampling logit-normal belongs to --objective flow: add it"),
        (["--objective", "flow", "--predict_v"], "--predict_v True has no meaning with --objective flow: leave it out"),
        (["--objective", "flow", "--diffusion_steps", "500"], "--diffusion_steps 500 has no meaning"),
        (["--objective", "flow", "--snr_gamma", "5"], "--snr_gamma 5.0 has no meaning"),
        (
            ["--objective", "flow", "--schedule_sampler", "loss-second-moment"],
            "--schedule_sampler loss-second-moment needs",
        ),
        (["--lr", "1e38"], r"--lr is 1e\+38: it must be above 0 and at most 1000"),
        (["--use_fp16", "True", "--precision", "bf16"], "--use_fp16 True and --precision bf16 contradict each other"),
        (["--precision", "fp8"], "--precision is fp8: it must be one of fp32, tf32, bf16, fp16"),
        (["--eval_interval", "3"], "--eval_interval is 3, but there is no reference to compare with"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--compile", "perhaps"], "argument --compile: 'perhaps' is neither True nor False"),
        (["--mask_ration", "0.3"], "--mask_ration is not a flag of .*: did you mean --mask_ratio?"),
        (["--mask", "0.3"], "--mask is not a flag of"),
        (["--timestep_respacing", "250"], "--timestep_respacing is 250: it must be empty, since training draws from"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_flags_are_named_with_what_is_required(words, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse(*words)


def test_flags_take_the_spellings_of_the_published_scripts():
    config = parse("--compile", "--use-fp16", "False", "--mask_ratio=0.3", "--optimizer", "None", "--local-rank=1")
    assert config.train.compile is True and config.train.use_fp16 is False and config.train.optimizer is None
    assert config.model.mask_ratio == 0.3 and parse("--mask_ratio", "None").model.mask_ratio is None
    sample = parse(
        "--cfg-scale",
        "1.5",
        "--cfg-cond",
        "--guidance_interval",
        "10",
        "900",
        config_class=SampleConfig,
        seed=7,
        model_path="m",
    )
    assert sample.guidance.cfg_scale == 1.5 and sample.guidance.guidance_interval == (10.0, 900.0)
    assert sample.solver.seed == 7 and parse(
        "--guided_channels", "all", config_class=SampleConfig, model_path="m"
    ).guidance == (dataclasses.replace(SampleConfig().guidance, guided_channels=None))


def test_flags_of_mdts_training_are_taken():
    words = [word for key, value in model_and_diffusion_defaults().items() for word in (f"--{key}", str(value))]
    words += ["--rank", "3", "--world_size", "9", "--dist_url", "env://", "--dist_on_itp", "--local-rank", "-1"]
    assert parse(*words) == RunConfig()


def test_spaces_after_commas_do_not_reach_file_names():
    train = parse("--ema_rate", "0.9, 0.99", "--phema", "0.05, 0.1").train
    assert (train.ema_rate, train.phema) == ("0.9,0.99", "0.05,0.1")


def test_every_flag_is_stated_once():
    for config_class in (RunConfig, SampleConfig):
        names = [field.name for _, field in config_class.flags()]
        assert len(names) == len(set(names))
        assert all(field.metadata["help"] for _, field in config_class.flags())


def test_json_and_back_is_the_same_configuration():
    facts = {"architecture": {"name": "DiT_S_2", "options": {"input_size": 4}}, "classes": ("a", "b")}
    facts |= {"data_signature": "0f", "global_batch": 64}
    config = RunConfig().replaced(lr=0.1, vae="mse", snr_gamma=None, betas=None, **facts)
    assert RunConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "found, message",
    [
        ([], "it holds a list"),
        ({"model": "MDTv2_S_2"}, "its 'model' is 'MDTv2_S_2' instead of a dictionary"),
        ({"model": {"options": {}, "size": 1}}, "it needs a 'name'"),
        ({"model": {"name": "MDTv2_S_2", "options": 5}}, "'options' that are a dictionary"),
        ({"classes": [1, 2]}, "its 'classes' are not a list of names"),
        ({"classes": "abc"}, "its 'classes' are not a list of names"),
        ({"vae": 3}, "its 'vae' is 3"),
        ({"diffusion": [1]}, r"its 'diffusion' is \[1\]"),
    ],
    ids=str,
)
def test_json_of_another_shape_is_a_sentence(found, message):
    with pytest.raises(UserError, match=message):
        RunConfig.from_json(found)


def test_configs_nest_without_losing_a_name():
    config = RunConfig().replaced(model="DiT_S_2")
    assert config.model.model == "DiT_S_2" and isinstance(config.model, Config)
    assert config.values()["model"] == "DiT_S_2" and RunConfig.from_values(config.values()) == config
