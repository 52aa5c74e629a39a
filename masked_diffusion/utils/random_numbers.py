"""Random numbers, and the determinism of training and sampling.

They depend only on (seed, step) in training, and only on (seed, image index) in sampling. So the number of ranks does
not change a run, and a run is resumed without saved generator states.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch


def fold_seed(*keys: int) -> int:
    """One 63-bit seed made of non-negative ints. Different keys give independent random streams."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


class GlobalBatchRandom:
    """The random numbers of one training step, which depend only on `seed` and `step`.

    Every rank draws the rows of the whole global batch and keeps its own rows, so that the same global batch gets the
    same numbers on any number of ranks.
    """

    def __init__(self, seed: int, step: int, device: torch.device | str, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.generator = torch.Generator(device).manual_seed(fold_seed(seed, step, 0))
        self.host_generator = torch.Generator().manual_seed(fold_seed(seed, step, 1))

    def _own_rows(self, draw: Callable[..., torch.Tensor], num_rows: int, *shape: int) -> torch.Tensor:
        rows = draw(num_rows * self.world_size, *shape, generator=self.generator, device=self.generator.device)
        return rows[self.rank * num_rows : (self.rank + 1) * num_rows]

    def rand(self, num_rows: int, *shape: int, device: torch.device | str | None = None) -> torch.Tensor:
        """(num_rows, *shape) uniform numbers in [0, 1) for this rank.

        :param device: ignored, so that `torch.rand` can be replaced by this; the generator's device is used.
        """
        return self._own_rows(torch.rand, num_rows, *shape)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Normal numbers with the shape and dtype of `x`, for this rank's rows."""
        return self._own_rows(torch.randn, *x.shape).to(x.dtype)

    def host_rand(self, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1) on the CPU, the same on all ranks."""
        return torch.rand(*shape, generator=self.host_generator)


class PerSampleRandom:
    """The random numbers of sampled images. Each image has its own generator: row i depends only on the seed and
    indices[i], so that an image depends neither on its batch nor on the number of ranks.
    """

    def __init__(self, seed: int, indices: Iterable[int], device: torch.device | str) -> None:
        self.generators = [torch.Generator(device).manual_seed(fold_seed(seed, int(i))) for i in indices]
        self.device = device

    def randn(self, *shape: int) -> torch.Tensor:
        """(len(indices), *shape) normal numbers."""
        rows = torch.empty(len(self.generators), *shape, device=self.device)
        # One call per image: a generator for the whole batch would make an image depend on its batch.
        for row, generator in zip(rows, self.generators, strict=True):
            row.normal_(generator=generator)
        return rows

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Normal numbers with the shape and dtype of `x`, whose rows are the images."""
        return self.randn(*x.shape[1:]).to(x.dtype)
