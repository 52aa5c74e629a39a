"""Write scikit-learn's handwritten digits as images: OUT/train and OUT/test hold `ClassID_ImgID.png`, 8 x 8 pixels.

The 1,797 digits are real (UCI, "Optical Recognition of Handwritten Digits") and come with scikit-learn: no download.
"""

import argparse
from pathlib import Path

import numpy as np
from common import run, whole_file
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_SHARE = 0.2


def write_digits(out: str) -> tuple[int, int]:
    """Write both splits, the same every time. Returns the number of images in each."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(pixels)), test_size=TEST_SHARE, stratify=digits.target, random_state=0)
    for split, indices in (("train", train), ("test", test)):
        folder = Path(out, split)
        folder.mkdir(parents=True, exist_ok=True)
        for i in indices:
            path = folder / f"{digits.target[i]}_{i:04d}.png"
            if not path.exists():
                with whole_file(path) as unfinished:
                    Image.fromarray(pixels[i]).save(unfinished, format="png")
    return len(train), len(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write train/ and test/ into")
    num_train, num_test = write_digits(parser.parse_args().out)
    print(f"{num_train} training and {num_test} test digits")


if __name__ == "__main__":
    run(main)
