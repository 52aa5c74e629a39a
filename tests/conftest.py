import sys
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parent / "data"
REPO = Path(__file__).parent.parent
sys.path.insert(0, str(DATA))

from fill import tensor  # noqa: E402 (lies beside the vectors that it was made for)

torch.set_num_threads(min(4, torch.get_num_threads()))


@pytest.fixture
def golden():
    """Loader of a vector file made by the published implementation."""
    return lambda name: np.load(DATA / f"{name}.npz")


@pytest.fixture
def latents():
    return tensor("x", (2, 4, 32, 32))
