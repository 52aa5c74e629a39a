"""The first stage that makes latents of images, and the cache of what it made."""
