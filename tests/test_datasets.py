import subprocess
import sys

import numpy as np
from conftest import REPO
from PIL import Image
from sklearn.datasets import load_digits

from masked_diffusion.image_datasets import image_classes, list_image_files


def test_digits_are_the_real_ones(tmp_path):
    command = [sys.executable, REPO / "datasets" / "digits.py", tmp_path]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        == "1437 training and 360 test digits\n"
    )
    splits = [list_image_files(str(tmp_path / split)) for split in ("train", "test")]
    assert [len(paths) for paths in splits] == [1437, 360]
    assert [image_classes(paths)[1] for paths in splits] == [list("0123456789")] * 2
    digits, seen = load_digits(), set()
    for path in splits[0] + splits[1]:
        label, number = path.rsplit("/", 1)[1].removesuffix(".png").split("_")
        pixels = np.asarray(Image.open(path)).astype(float) * 16 / 255
        assert np.abs(pixels - digits.images[int(number)]).max() < 0.04 and int(label) == digits.target[int(number)]
        seen.add(number)
    assert len(seen) == 1797
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    subprocess.run(command, check=True, capture_output=True)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
