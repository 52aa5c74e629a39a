"""Where random numbers come from: functions of (seed, step) in training and of (seed, image index) in sampling.

Nothing else is drawn, so a run does not depend on the number of ranks, and a resumed run needs no generator states.
"""

import numpy as np
import torch


def fold_seed(*keys):
    """One 63-bit seed for a tuple of non-negative ints; different tuples give independent streams."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


class GlobalBatchRandom:
    """The random numbers of one training step.

    Every rank draws the rows of the whole global batch and keeps its own, so that the same global batch gets the same
    numbers on any number of ranks.

    :param seed, step: what the numbers are a function of.
    """

    def __init__(self, seed, step, device, rank=0, world_size=1):
        self.rank, self.world_size = rank, world_size
        self.generator = torch.Generator(device).manual_seed(fold_seed(seed, step, 0))
        self.host_generator = torch.Generator().manual_seed(fold_seed(seed, step, 1))

    def _own_rows(self, draw, num_rows, *shape):
        rows = draw(num_rows * self.world_size, *shape, generator=self.generator, device=self.generator.device)
        return rows[self.rank * num_rows : (self.rank + 1) * num_rows]

    def rand(self, num_rows, *shape, device=None):
        """(num_rows, *shape) uniform numbers for this rank; `device` is the generator's."""
        return self._own_rows(torch.rand, num_rows, *shape)

    def randn_like(self, x):
        """Normal numbers of x's shape, for this rank's rows."""
        return self._own_rows(torch.randn, *x.shape).to(x.dtype)

    def host_rand(self, *shape):
        """Uniform numbers on the CPU, the same on all ranks."""
        return torch.rand(*shape, generator=self.host_generator)


class PerSampleRandom:
    """The random numbers of some images, each with a generator of its own: row i is a function of (seed, indices[i]).

    An image therefore does not depend on the batch it is drawn in, nor on the number of ranks.
    """

    def __init__(self, seed, indices, device):
        self.generators = [torch.Generator(device).manual_seed(fold_seed(seed, int(i))) for i in indices]

    def randn(self, *shape):
        """(len(indices), *shape) normal numbers."""
        return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in self.generators])

    def randn_like(self, x):
        """Normal numbers of x's shape, whose rows are the images."""
        return self.randn(*x.shape[1:]).to(x.dtype)
