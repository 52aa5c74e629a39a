import torch
from fill import fill, tensor

from masked_diffusion import create_diffusion, create_model
from masked_diffusion.training.objective import TwoPassObjective
from masked_diffusion.utils.random_numbers import GlobalBatchRandom

X, T, Y = tensor("pixels", (4, 3, 8, 8)), torch.tensor([3, 300, 600, 999]), torch.tensor([0, 1, 2, 3])


def objective(**options):
    model = fill(create_model("MDTv2_Nano_2", input_size=8, in_channels=3, num_classes=10, **options))
    return TwoPassObjective(model, create_diffusion()).train()


def test_the_loss_is_the_sum_of_both_passes():
    module, diffusion = objective(mask_ratio=0.3), create_diffusion()
    draws = module.draw(X)
    losses = module(X, T, Y, **draws)
    full = diffusion.training_losses(
        module.model, X, T, {"y": Y, "drop_labels": draws["drop_labels"]}, noise=draws["noise"]
    )
    masked = diffusion.training_losses(
        module.model,
        X,
        T,
        {"y": Y, "drop_labels": draws["masked_drop_labels"], "enable_mask": True, "ids_keep": draws["ids_keep"]},
        noise=draws["masked_noise"],
    )
    torch.testing.assert_close(losses["loss"], full["loss"] + masked["loss"])
    torch.testing.assert_close(losses["masked_loss"], masked["loss"])
    torch.testing.assert_close(losses["mse"], full["mse"])
    assert not torch.equal(draws["noise"], draws["masked_noise"])


def test_a_seed_means_what_it_means_in_the_published_run():
    module, diffusion = objective(mask_ratio=0.3), create_diffusion()
    torch.manual_seed(11)
    ours = module(X, T, Y)
    torch.manual_seed(11)
    full = diffusion.training_losses(module.model, X, T, {"y": Y})
    masked = diffusion.training_losses(module.model, X, T, {"y": Y, "enable_mask": True})
    torch.testing.assert_close(ours["loss"], full["loss"] + masked["loss"])
    torch.manual_seed(11)
    drawn = module(X, T, Y, **module.draw(X))
    torch.testing.assert_close(drawn["loss"], ours["loss"])


def test_a_model_without_masking_trains_on_the_full_pass():
    module = objective()
    losses = module(X, T, Y, **module.draw(X))
    assert "masked_loss" not in losses
    losses["loss"].mean().backward()


def test_unconditional_models_take_no_labels():
    model = create_model("MDTv2_Nano_2", input_size=8, in_channels=3, num_classes=0, mask_ratio=0.3)
    module = TwoPassObjective(model, create_diffusion()).train()
    assert module(X, T, **module.draw(X))["loss"].shape == (4,)


def test_bf16_computes_the_same_loss_nearly():
    module = objective(mask_ratio=0.3)
    draws = module.draw(X)
    exact = module(X, T, Y, **draws)["loss"]
    module.precision = "bf16"
    rounded = module(X, T, Y, **draws)["loss"]
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_draws_do_not_depend_on_the_number_of_ranks():
    module = objective(mask_ratio=0.3)

    def draw(x, rank, world_size):
        random = GlobalBatchRandom(5, 17, torch.device("cpu"), rank, world_size)
        return module.draw(x, random.rand, random.randn_like, random.host_rand)

    whole, halves = draw(X, 0, 1), [draw(X[:2], rank, 2) for rank in range(2)]
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([half[key] for half in halves])), key
    assert not torch.equal(whole["noise"], draw(X * 0, 0, 1)["masked_noise"])
