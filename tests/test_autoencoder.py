import pytest
import torch

from masked_diffusion.latents.autoencoder import StableDiffusionVAE, create_first_stage


def test_pixels_pass_unchanged():
    stage, images = create_first_stage("identity"), torch.randn(2, 3, 8, 8)
    assert stage.decode(stage.encode(images)) is images
    assert (stage.channels, stage.downsample) == (3, 1)


def test_a_vae_from_a_folder(vae_folder):
    stage, images = create_first_stage(vae_folder), torch.rand(2, 3, 32, 32) * 2 - 1
    assert (stage.channels, stage.downsample) == (4, 8)
    latents = stage.encode(images, torch.ones_like)
    posterior = stage.vae.encode(images).latent_dist
    torch.testing.assert_close(latents, (posterior.mean + posterior.std) * 0.18215)
    assert not latents.requires_grad
    torch.testing.assert_close(stage.decode(latents), stage.vae.decode(latents / 0.18215).sample)
    torch.manual_seed(1)
    drawn = stage.encode(images)
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, posterior.sample() * StableDiffusionVAE.scale)


def test_missing_weights_say_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"download config\.json and diffusion_pytorch_model\.safetensors"):
        create_first_stage(str(tmp_path))
