"""What a training run is made of: objective, optimizers, EMA, parallelism, and what watches it."""
