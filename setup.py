import re
from pathlib import Path

from setuptools import find_packages, setup

EVAL = ["tensorflow>=2.16", "torch-fidelity>=0.3", "scipy>=1.11", "matplotlib>=3.8"]
MPI = ["mpi4py>=4.0", "mpich>=4.2"]
DEMO = ["scikit-learn>=1.3", "matplotlib>=3.8"]
LOGGERS = ["wandb>=0.19", "trackio>=0.43"]
WEB = ["gradio>=6.31"]
TOOLS = ["pytest>=8.0", "pytest-timeout>=2.3", "ruff>=0.6", "build>=1.2", "setuptools>=77", "wheel", "mpmath>=1.3"]
TOOLS += ["lmdb>=1.4", "torch-fidelity>=0.3", "selenium>=4.20", "webdataset>=1.0"]
TOOLS += ["pytest-xdist>=3.6", "nbclient>=0.9", "ipykernel>=6.29"] + DEMO + MPI + WEB
TEST = TOOLS + ["tensorflow-cpu>=2.16; platform_machine == 'x86_64'"]  # no code for GPUs: quicker to install

setup(
    name="masked-diffusion",
    version=re.search(r'__version__ = "(.+)"', Path("masked_diffusion/__init__.py").read_text(encoding="utf-8"))[1],
    description="Masked Diffusion Transformers (MDTv2, MDT, DiT): training, sampling and evaluation",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["masked_diffusion", "masked_diffusion.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "timm>=1.0.16",
        "diffusers>=0.32",
        "huggingface_hub>=0.27",
        "safetensors>=0.4.5",
        "adan-pytorch>=0.1.0",
        "blobfile>=3.0",
        "Pillow>=10.1",
        "tqdm>=4.66",
        "tensorboard>=2.16",
    ],
    extras_require={
        "eval": EVAL,
        "mpi": MPI,
        "demo": DEMO,
        "lsun": ["lmdb>=1.4"],
        "web": WEB,
        "loggers": LOGGERS,
        "test": TEST,
        "all": EVAL + TOOLS + LOGGERS,
    },
)
