"""Layers of the transformers: attention with a relative position bias, transformer blocks, and embeddings."""
