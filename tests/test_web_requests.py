"""Requests from a browser: what is refused, what is drawn, and how it is shown."""

import numpy as np
import pytest
import torch
import web_requests
from fill import fill
from helpers import HOLE, IMAGE, painting, sample_config
from web_requests import Limits, Request, check_painting, check_request, clicked, view_of

from masked_diffusion import create_model
from masked_diffusion.sample_config import SOLVERS_OF
from masked_diffusion.sampling.build import load_image_sampler, load_weights
from masked_diffusion.sampling.editing import inpaint

GOOD = {"label": 2, "count": 3, "seed": 7, "solver": "ddim", "steps": 6, "cfg_scale": 2.0, "scale_pow": 1.0}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def loaded(named_checkpoint):
    config = sample_config(named_checkpoint)
    return config, load_weights(config)


# ---------------------------------------------------------------- checks


def test_a_request_is_taken_as_it_is_meant():
    assert check_request(Limits(), 3, **GOOD) == Request(2, 3, 7, "ddim", 6, 2.0, 1.0)
    whole = check_request(Limits(), 3, **GOOD | {"label": 2.0, "seed": 7.0, "cfg_scale": 2})
    assert whole == Request(2, 3, 7, "ddim", 6, 2.0, 1.0) and type(whole.label) is int
    assert check_request(Limits(3, 6), 0, **GOOD | {"label": 0}).label == 0


@pytest.mark.parametrize(
    "values, message",
    [
        ({"label": 3}, "class is 3: it must be a whole number from 0 to 2"),
        ({"label": -1}, "class is -1"),
        ({"label": "2"}, "class is '2'"),
        ({"label": None}, "class is None"),
        ({"label": [2]}, "class is [2]"),
        ({"label": True}, "class is True"),
        ({"label": "x" * 10**6}, "class is 'xxxxxxxxx"),
        ({"count": 17}, "images is 17: it must be a whole number from 1 to 16"),
        ({"count": 0}, "images is 0"),
        ({"count": 2.5}, "images is 2.5"),
        ({"count": float("nan")}, "images is nan"),
        ({"count": float("inf")}, "images is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**31}, "seed is 2147483648: it must be a whole number from 0 to 2147483647"),
        ({"solver": "euler_a"}, "solver is 'euler_a': choose one of ddpm, ddim"),
        ({"solver": ["ddim"]}, "solver is ['ddim']"),
        ({"steps": 251}, "steps is 251: it must be a whole number from 1 to 250"),
        ({"steps": "10,15"}, "steps is '10,15'"),
        ({"cfg_scale": float("nan")}, "scale is nan: it must be a number from 0 to 20"),
        ({"cfg_scale": 1e9}, "scale is 1000000000.0"),
        ({"cfg_scale": "4"}, "scale is '4'"),
        ({"scale_pow": -1}, "power is -1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_no_request_may_ask_for_is_refused(values, message):
    with pytest.raises(ValueError) as error:
        check_request(Limits(), 3, **GOOD | values)
    assert str(error.value).startswith(message) and len(str(error.value)) < 120


def test_an_enlarged_image_comes_back_as_it_was():
    image, hole = check_painting(painting(IMAGE, HOLE.astype(np.uint8) * 255, scale=64), 8)
    assert np.array_equal(image, IMAGE) and np.array_equal(hole, HOLE)


def test_a_pixel_is_filled_from_a_quarter_of_paint_on():
    paint = np.zeros((512, 512), dtype=np.uint8)
    paint[:64, :15], paint[64:128, :17], paint[128:192, 64:128] = 255, 255, 255
    _, hole = check_painting(painting(np.zeros((512, 512, 3), np.uint8), paint), 8)
    assert np.argwhere(hole).tolist() == [[1, 0], [2, 1]]


def blank(height, width, value=255):
    return np.full((height, width, 4), value, dtype=np.uint8)


@pytest.mark.parametrize(
    "painted, message",
    [
        (None, "there is no image"),
        ({"background": None, "layers": []}, "there is no image"),
        ({"background": blank(8, 8, 0), "layers": [blank(8, 8)]}, "there is no image"),
        ({"background": blank(8, 8), "layers": []}, "nothing is painted"),
        ({"background": blank(8, 8), "layers": [blank(8, 8, 0)]}, "nothing is painted"),
        ({"background": blank(8, 8), "layers": [blank(8, 9)]}, "the paint is (8, 9, 4): it must be (8, 8, 4)"),
        ({"background": blank(8, 8), "layers": [blank(8, 8)[:, :, :3]]}, "the paint is (8, 8, 3)"),
        ({"background": blank(4, 4097), "layers": []}, "the image has 4097 x 4 pixels: at most 4096 a side"),
        ({"background": blank(10, 41), "layers": []}, "one side at most 4 times the other"),
    ],
    ids=str,
)
def test_a_painting_that_cannot_be_filled_is_refused(painted, message):
    with pytest.raises(ValueError) as error:
        check_painting(painted, 8)
    assert message in str(error.value)


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("solver", SOLVERS_OF["diffusion"])
def test_what_is_drawn_is_what_the_script_draws(loaded, named_checkpoint, solver):
    request = check_request(Limits(), 3, **GOOD | {"solver": solver, "steps": 30})
    progress = list(web_requests.draw(*loaded, request))
    same = ("--solver", solver, "--num_sampling_steps", "30", "--cfg_scale", "2", "--scale_pow", "1", "--seed", "7")
    image_sampler, _ = load_image_sampler(sample_config(named_checkpoint, *same))
    expected = image_sampler(range(3), torch.tensor([2, 2, 2]))
    assert np.abs(progress[-1].images.astype(int) - expected).max() <= 1
    total = 59 if solver == "heun" else 30
    assert {p.total for p in progress} == {total} and progress[-1].done == total
    every = 5 if solver == "heun" else 3
    assert [p.done for p in progress] == [*range(every, total, every), total]
    assert all(p.images.shape == (3, 8, 8, 3) and p.images.dtype == np.uint8 for p in progress)
    assert not np.array_equal(progress[0].images, progress[-1].images)


def test_requests_share_the_weights(loaded):
    config, weights = loaded
    requests = (Request(0, 1, 0, "ddim", n, n, 1.0) for n in (2, 9))
    one, other = (web_requests.image_sampler_of(config, weights, request) for request in requests)
    assert one.model is other.model is weights.model
    assert one.denoise.guidance.cfg_scale == 2 and other.denoise.guidance.cfg_scale == 9
    assert (one.solver.num_outputs, other.solver.num_outputs) == (2, 9)


def test_a_hole_is_filled_as_the_library_fills_it(loaded):
    config, weights = loaded
    request = check_request(Limits(), 3, **GOOD)
    progress = list(web_requests.fill(config, weights, request, IMAGE, HOLE, 2))
    image_sampler = web_requests.image_sampler_of(config, weights, request)
    expected = inpaint(image_sampler, range(3), torch.tensor([2, 2, 2]), IMAGE, HOLE, jump_length=10, resamplings=2)
    assert np.array_equal(progress[-1].images, expected) and progress[-1].done == progress[-1].total
    assert all((p.images[:, ~HOLE] == IMAGE[~HOLE]).all() for p in progress)
    assert (progress[-1].images[:, HOLE] != IMAGE[HOLE]).mean() > 0.9
    long = list(web_requests.fill(config, weights, check_request(Limits(), 3, **GOOD | {"steps": 25}), IMAGE, HOLE, 3))
    assert long[-1].total == 25 + 2 * 2 * 10


def test_latents_of_a_class_without_a_name_are_drawn_and_filled(vae_folder, tmp_path):
    model = fill(create_model("MDTv2_Nano_2", input_size=4, in_channels=4, num_classes=2))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    config = sample_config(tmp_path / "model.pt", "--vae_decoder", vae_folder)
    weights, request = load_weights(config), Request(1, 2, 0, "ddpm", 5, 2.0, 1.0)
    *_, drawn = web_requests.draw(config, weights, request)
    assert drawn.images.shape == (2, 32, 32, 3) and weights.class_names == []
    hole = np.zeros((32, 32), dtype=bool)
    hole[9:23, 9:23] = True
    *_, filled = web_requests.fill(config, weights, request, drawn.images[0], hole, 1)
    assert (filled.images[:, ~hole] == drawn.images[0][~hole]).all()
    assert (filled.images[:, hole] != drawn.images[0][hole]).mean() > 0.5


@pytest.mark.parametrize(
    "solver, resamplings, message",
    [
        ("unipc", 2, "solver unipc cannot start from an image: choose ddpm or ddim"),
        ("ddim", 11, "resamplings is 11: it must be a whole number from 1 to 10"),
        ("ddim", None, "resamplings is None"),
    ],
)
def test_fillings_that_cannot_be_had_are_refused(loaded, solver, resamplings, message):
    request = check_request(Limits(), 3, **GOOD | {"solver": solver})
    with pytest.raises(ValueError, match=message):
        next(web_requests.fill(*loaded, request, IMAGE, HOLE, resamplings))


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("count, size, side", [(1, 8, 516), (5, 8, 172), (4, 256, 260), (3, 512, 516)])
def test_a_click_means_the_image_under_it(count, size, side):
    images = RNG.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    view, columns = view_of(images), web_requests.columns_of(count)
    assert view.shape == (side * -(-count // columns), side * columns, 3)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = view[row * side : (row + 1) * side, column * side : (column + 1) * side]
        scale = (side - web_requests.GAP) // size
        assert np.array_equal(tile[2:-2, 2:-2], image.repeat(scale, axis=0).repeat(scale, axis=1))
        assert (tile[:2] == 255).all() and (tile[:, -2:] == 255).all()
        for x, y in ((0, 0), (side - 1, side - 1), (side / 2, 3)):
            assert np.array_equal(clicked(images, [x + column * side, y + row * side]), image)


@pytest.mark.parametrize("place", [None, "0,0", [1], [1, 2, 3], [-1, 0], [0, 10**6], [float("nan"), 0], ["1", "2"]])
def test_a_click_beside_the_images_is_refused(place):
    images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="the click is"):
        clicked(images, place)


def test_a_click_where_nothing_is_drawn_is_refused():
    images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    height, width = view_of(images).shape[:2]
    with pytest.raises(ValueError, match="there is no image at this place"):
        clicked(images, [width - 1, height - 1])
    with pytest.raises(ValueError, match="there are no images yet"):
        clicked(None, [0, 0])
