"""Inpainting and variations: what is kept, what is filled, and the schedule of RePaint."""

import numpy as np
import pytest
import torch
from fill import fill
from helpers import HOLE, IMAGE, make_image_sampler, small_model
from PIL import Image

from masked_diffusion import create_model
from masked_diffusion.sampling.editing import (
    count_evaluations,
    inpaint,
    inpaint_progressive,
    paste,
    read_image_and_hole,
    resampling_times,
    vary_progressive,
)
from masked_diffusion.sampling.image_sampler import last_sample
from masked_diffusion.utils.errors import UserError

LABELS = torch.tensor([1, 2, 3])


def test_the_schedule_walks_every_stretch_so_many_times():
    assert resampling_times(5, 2, 1) == [5, 4, 3, 2, 1, 0]
    assert resampling_times(5, 2, 2) == [5, 4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0]
    times = resampling_times(250, 10, 10)
    assert times[0] == 250 and times[-1] == 0 and set(np.abs(np.diff(times))) == {1}
    assert count_evaluations(250, 10, 10) == 250 + 24 * 9 * 10


def test_the_hole_is_filled_and_the_rest_is_kept():
    drawn = inpaint(make_image_sampler(), range(3), LABELS, IMAGE, HOLE, jump_length=2, resamplings=2)
    assert drawn.shape == (3, 8, 8, 3) and drawn.dtype == np.uint8
    assert (drawn[:, ~HOLE] == IMAGE[~HOLE]).all()
    assert (drawn[:, HOLE] != IMAGE[HOLE]).mean() > 0.9 and (drawn[0, HOLE] != drawn[1, HOLE]).mean() > 0.2


def test_what_lies_in_the_hole_is_not_looked_at():
    other = np.where(HOLE[:, :, None], 255 - IMAGE, IMAGE)
    a, b = (inpaint(make_image_sampler(), range(3), LABELS, image, HOLE) for image in (IMAGE, other))
    assert np.array_equal(a, b)


def test_the_latents_around_the_hole_are_those_of_the_image():
    *_, last = inpaint_progressive(make_image_sampler(), range(3), LABELS, IMAGE, HOLE)
    expected = torch.from_numpy(IMAGE).permute(2, 0, 1).float() / 127.5 - 1
    for latents in last["sample"], last["pred_xstart"]:
        torch.testing.assert_close(latents[:, :, ~HOLE], expected[:, ~HOLE].expand(3, -1, -1))


def test_a_filled_hole_does_not_depend_on_the_batch():
    whole = inpaint(make_image_sampler(), range(3), LABELS, IMAGE, HOLE).astype(int)
    alone = inpaint(make_image_sampler(), [2], LABELS[2:], IMAGE, HOLE).astype(int)
    assert np.abs(whole[2:] - alone).max() <= 1


# ---------------------------------------------------------------- the side-interpolater


@pytest.mark.parametrize("name", ["MDTv2_Nano_2", "MDT_Nano_2"])
def test_given_tokens_are_kept_as_in_a_masked_pass_of_training(name):
    options = {"input_size": 8, "in_channels": 3, "num_classes": 10}
    trained = fill(create_model(name, **options, mask_ratio=0.3)).train()
    loaded = create_model(name, **options).eval()  # its weights do not tell the ratio
    loaded.load_state_dict(trained.state_dict())
    x, t, ids = torch.randn(3, 3, 8, 8), torch.tensor([1, 500, 999]), torch.rand(3, 16).argsort(1)[:, :9].sort(1).values
    masked = trained(x, t, LABELS, enable_mask=True, ids_keep=ids, drop_labels=torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(loaded(x, t, LABELS, ids_keep=ids), masked)
    assert not torch.allclose(loaded(x, t, LABELS), masked, atol=1e-3)
    assert not create_model(name, **options).interpolates and trained.interpolates and loaded.interpolates


def test_the_encoder_does_not_see_the_tokens_of_the_hole():
    sampler, seen = make_image_sampler(small_model(mask_ratio=0.3)), []
    sampler.model.en_inblocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    options = {"jump_length": 2, "resamplings": 1, "method": "side-interpolater"}
    drawn = inpaint(sampler, range(3), LABELS, IMAGE, HOLE, **options)
    known = ~HOLE.reshape(4, 2, 4, 2).all(axis=(1, 3))
    assert len(seen) == 6 and {tuple(x.shape[1:]) for x in seen} == {(known.sum(), 128)}
    assert {len(x) for x in seen} == {3, 6}  # without and with the null class
    assert (drawn[:, ~HOLE] == IMAGE[~HOLE]).all() and (drawn[:, HOLE] != IMAGE[HOLE]).mean() > 0.9
    other = np.where(HOLE[:, :, None], 255 - IMAGE, IMAGE)
    assert np.array_equal(drawn, inpaint(sampler, range(3), LABELS, other, HOLE, **options))
    plain = inpaint(sampler, range(3), LABELS, IMAGE, HOLE, jump_length=2, resamplings=1)
    assert not np.array_equal(drawn, plain)


def test_models_and_holes_without_anything_to_interpolate_are_refused():
    everywhere, options = np.ones((8, 8), dtype=bool), {"input_size": 8, "in_channels": 3, "num_classes": 10}
    dit, unmasked = (create_model(name, **options).eval() for name in ("DiT_Nano_2", "MDTv2_Nano_2"))
    for model, hole, method, message in (
        (dit, HOLE, "side-interpolater", "needs a model that was trained with --mask_ratio, but this DiT was not"),
        (unmasked, HOLE, "side-interpolater", "but this MDTv2 was not: choose --method repaint"),
        (None, everywhere, "side-interpolater", "nothing of the image is known"),
        (None, HOLE, "magic", "--method is 'magic': choose one of repaint, side-interpolater"),
    ):
        with pytest.raises(UserError, match=message):
            inpaint(make_image_sampler(model), [0], LABELS[:1], IMAGE, hole, method=method)


# ---------------------------------------------------------------- variations, and what is refused


def test_strength_is_the_share_of_steps():
    for solver, strength, steps in (("ddpm", 1.0, 6), ("ddpm", 0.5, 3), ("ddim", 0.01, 1)):
        outs = list(vary_progressive(make_image_sampler(solver=solver), range(3), LABELS, IMAGE, strength))
        assert len(outs) == steps
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"strength is {strength}"):
            next(vary_progressive(make_image_sampler(), range(3), LABELS, IMAGE, strength))


def test_weak_variations_stay_near_the_image():
    def untrained(strength):
        model = small_model()
        torch.nn.init.zeros_(model.final_layer.linear.weight)  # predicts no noise: what is added stays
        torch.nn.init.zeros_(model.final_layer.linear.bias)
        image_sampler = make_image_sampler(model, solver="ddim")
        drawn = image_sampler.decode(last_sample(vary_progressive(image_sampler, range(3), LABELS, IMAGE, strength)))
        return np.abs(drawn.astype(int) - IMAGE).mean()

    assert untrained(0.01) < 5 < untrained(0.5)


def test_pictures_that_do_not_fit_are_refused(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    Image.fromarray(HOLE.astype(np.uint8) * 255).save(tmp_path / "hole.png")
    image, hole = read_image_and_hole(tmp_path / "image.png", tmp_path / "hole.png", 8)
    assert np.array_equal(image, IMAGE) and np.array_equal(hole, HOLE)
    assert np.array_equal(paste(image, hole, 255 - IMAGE[None])[0][hole], 255 - IMAGE[hole])
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    for name, message in (("black.png", "nothing white"), ("wide.png", "must have one size")):
        with pytest.raises(ValueError, match=message):
            read_image_and_hole(tmp_path / "image.png", tmp_path / name, 8)
    with pytest.raises(ValueError, match=r"the image is \(9, 8, 3\) uint8: it must be \(8, 8, 3\)"):
        inpaint(make_image_sampler(), [0], LABELS[:1], np.zeros((9, 8, 3), np.uint8), np.ones((9, 8), bool))
    with pytest.raises(ValueError, match=r"solver unipc cannot start from an image: choose ddpm or ddim"):
        inpaint(make_image_sampler(solver="unipc"), [0], LABELS[:1], IMAGE, HOLE)
