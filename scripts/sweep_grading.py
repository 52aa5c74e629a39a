"""What a sweep grades its images with: the metrics of evaluations/ against a reference, or the demo's classifier."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from typing_extensions import Self

from masked_diffusion import dist_util
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.evaluations import load_evaluations
from masked_diffusion.utils.files import file_hash
from masked_diffusion.utils.options import Config, option

KEYS = {  # what evaluations/ reports for each of its --metrics
    "is": ("inception_score",),
    "fid": ("fid",),
    "sfid": ("sfid",),
    "pr": ("precision", "recall"),
    "kid": ("kid",),
    "dc": ("density", "coverage"),
}
DIGIT_KEYS = ("class_accuracy", "frechet_pixels")
HIGHER_IS_BETTER = {"inception_score", "precision", "recall", "density", "coverage", "class_accuracy"}
BATCH_SIZE = 64  # of evaluations/evaluator.py


@dataclass(frozen=True)
class GradingConfig(Config):
    """grading"""

    reference: str = option("", "npz of the reference, as for evaluations/evaluator.py")
    metrics: str = option("fid,is", f"with --reference: of {', '.join(KEYS)}, separated by commas")
    inception: str | None = option(None, "with --reference: the network; None: where evaluations/evaluator.py finds it")
    backend: str = option("auto", "with --reference: see evaluations/", choices=("auto", "tensorflow", "torch"))
    digits: str = option("", "folder of the demo's digits: their classifier grades, instead of a reference")
    best: str | None = option(None, "the measure by which a setting is the best; None: the first")
    bootstrap: int = option(
        50, "resamples for the intervals over images, of which recall, coverage and KID have none; 0: no intervals",
        at_least=0,
    )  # fmt: skip

    def check(self) -> Self:
        super().check()
        if bool(self.reference) == bool(self.digits):
            raise UserError("give --reference, an npz to compare with, or --digits, the folder of the demo's digits")
        for metric in self.metrics.split(","):
            if metric not in KEYS:
                raise UserError(f"--metrics names {metric!r}: choose of {', '.join(KEYS)}")
        if self.best not in (None, *self.keys):
            raise UserError(f"--best is {self.best}: choose one of {', '.join(self.keys)}")
        if self.bootstrap == 1:
            raise UserError("--bootstrap is 1: a deviation needs at least 2 resamples, and 0 is none")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """The measures, in the order of their columns."""
        return DIGIT_KEYS if self.digits else tuple(key for name in self.metrics.split(",") for key in KEYS[name])


class Grades(NamedTuple):
    """Values of the measures, and of those that can be resampled over samples: standard errors, and resampled values.

    Recall and coverage cannot: they are shares of reference images, and how they vary over samples is not known.
    """

    values: dict[str, float]
    deviations: dict[str, float]
    replicates: dict[str, list[float]]


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn the user errors of evaluations/, which knows nothing of this package's, into these."""
    try:
        yield
    except load_evaluations("errors").UserError as error:
        raise UserError(str(error)) from error


class DigitsGrader:
    """The demo's classifier and pixel distance, on the first rank.

    :raises UserError: for a folder without digits.
    """

    def __init__(self, config: GradingConfig):
        self.config, self.module = config, load_evaluations("grade_digits")
        with as_user_errors():
            for part in ("train", "test"):
                self.module.read_folder(Path(config.digits, part))
        self.identity = {"grader": "the demo's classifier"}

    def prepare(self) -> None:
        """See `SuiteGrader.prepare`; the classifier is quick."""

    def check_size(self, size: int) -> None:
        """:raises UserError: for images of another size than the digits'."""
        if size != 8:
            raise UserError(f"the model draws images of {size} pixels, but --digits grades digits of 8")

    def __call__(self, samples: Path) -> Grades | None:
        """Grade an npz. All ranks call it; the first one gets the grades, the others None."""
        if not dist_util.is_main():
            return None
        with as_user_errors():
            grades = self.module.grade(self.config.digits, *self.module.read_samples(samples), self.config.bootstrap)
        values = {key: grades[key] for key in DIGIT_KEYS}
        return Grades(values, grades.get("deviations", {}), grades.get("replicates", {}))


class Planned(NamedTuple):
    """Images that are yet to be drawn, as far as `suite.check_counts` looks at them."""

    path: str
    count: int

    def __len__(self) -> int:
        return self.count


class SuiteGrader:
    """The suite of evaluations/, with the network and the reference kept from one setting to the next.

    Its `identity` is of the reference alone until `prepare` is called.

    :param num_samples: images of each setting.
    :raises UserError: for a reference that cannot serve, an `--inception` that is no file, and a missing package.
    """

    def __init__(self, config: GradingConfig, num_samples: int):
        self.config, self.metrics = config, config.metrics.split(",")
        self.suite, self.features, self.npz = map(load_evaluations, ("suite", "features", "npz_reader"))
        self.evaluator: ModuleType = load_evaluations("evaluator")
        flags = {"inception": config.inception, "backend": config.backend, "batch_size": BATCH_SIZE, "devices": 1}
        self.flags = Namespace(**flags, exact_distances=False)
        with as_user_errors():
            self.evaluator.check_network_flags(self.flags)
            self.images = self.npz.NpzImages(config.reference)
            self.suite.reference_needs(self.metrics, self.images)
            self.suite.ready_statistics(self.metrics, self.images)
            planned = Planned("each setting", num_samples)
            self.suite.check_counts(self.metrics, self.images, planned)
        self.identity = {"reference_sha256": file_hash(config.reference)}

    def prepare(self) -> None:
        """What takes long: load the network, and pass the reference through it. All ranks call it.

        :raises UserError: for a network that cannot be had, and one that does not fit the reference.
        """
        with as_user_errors():
            self.network, self.weights = self.evaluator.create_network(self.flags)
            self.suite.check_sizes(self.metrics, self.images, self.network.sizes)
            first = "pr" in self.metrics and dist_util.is_main()
            self.rule = self.evaluator.choose_rule(self.flags, self.network.name) if first else None
            self.reference = self.suite.read_reference(self.images, self.network, self.metrics, BATCH_SIZE)
        self.identity |= {"inception_sha256": file_hash(self.weights), "backend": self.network.name}

    def check_size(self, size: int) -> None:
        """:raises UserError: for images of another size than the reference's."""
        if self.images.size not in (None, (size, size)):
            raise UserError(
                f"the model draws images of {size} pixels, but {self.config.reference} has images of "
                f"{self.images.size}: make a reference of that size"
            )

    def __call__(self, samples: Path) -> Grades | None:
        """See `DigitsGrader.__call__`."""
        repeats, device = self.config.bootstrap, load_evaluations("ranks").device()
        with as_user_errors():
            images = self.npz.NpzImages(samples)
            needs = self.suite.sample_needs(self.metrics, repeats, images)
            found = self.features.collect(images, self.network, needs, BATCH_SIZE)
            if found is None:
                return None
            weights = self.network.logit_weights
            result = self.suite.compare(self.reference, found, self.metrics, weights, repeats, device, self.rule)
        values = {key: result.values[key] for key in self.config.keys}
        return Grades(values, {key: result.deviations[key] for key in result.replicates}, result.replicates)


def create_grader(config: GradingConfig, num_samples: int) -> DigitsGrader | SuiteGrader:
    """The grader that flags describe, before `prepare`."""
    return DigitsGrader(config) if config.digits else SuiteGrader(config, num_samples)
