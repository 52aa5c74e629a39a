"""Layers of the transformers: attention with its relative position bias, and embeddings."""
