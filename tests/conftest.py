from pathlib import Path

import numpy as np
import pytest
import torch
from fill import tensor

DATA = Path(__file__).parent / "data"
REPO = Path(__file__).parent.parent
torch.set_num_threads(min(4, torch.get_num_threads()))


@pytest.fixture
def golden():
    """Loader of a vector file made by the published implementation."""
    return lambda name: np.load(DATA / f"{name}.npz")


@pytest.fixture
def latents():
    return tensor("x", (2, 4, 32, 32))
