"""Finding and reading the images of a dataset: a folder with its index, or packed shards; decoding and crops."""
