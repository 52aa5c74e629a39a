"""Checkpoints: writing, finding and loading them."""
