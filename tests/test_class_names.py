"""What classes are called, and which label a name means."""

import pytest

from masked_diffusion.sampling.class_names import class_names, find_label

IMAGENET = class_names(None, 1000)


def test_names_come_from_training_or_from_imagenet():
    assert class_names(["cat", "dog"], 2) == ["cat", "dog"]
    assert class_names(["n02099601", "n99999999"], 2) == ["golden retriever", "n99999999"]
    assert len(IMAGENET) == 1000 and IMAGENET[207] == "golden retriever"
    assert class_names(None, 10) == []


def test_names_and_rows_of_the_label_table_need_not_be_as_many():
    assert class_names(["cat", "dog"], 4) == ["cat", "dog", "2", "3"]  # trained with --num_classes 4
    with pytest.raises(ValueError, match="names 2 classes, but the model has 1"):
        class_names(["cat", "dog"], 1)


@pytest.mark.parametrize(
    "text, label",
    [("golden retriever", 207), ("Arctic fox", 279), (279, 279), ("maillot", 638), ("TIGER CAT", 282), ("chickad", 19)],
)
def test_a_name_a_synonym_or_a_part_is_found(text, label):
    assert find_label(text, IMAGENET, 1000) == label


@pytest.mark.parametrize(
    "text, message",
    [
        ("1000", "class 1000 does not exist: the model has 1000 classes"),
        ("crane", r"may be any of 2 classes: give the number of one, 134 \(crane\), 517 \(crane\)"),
        ("retriever", "may be any of 5 classes"),
        (" ", "a class is '': give its number"),
        ("unicorn drawing", "is none of the model's 1000 classes"),
    ],
)
def test_others_are_refused_with_what_is_near(text, message):
    with pytest.raises(ValueError, match=message):
        find_label(text, IMAGENET, 1000)


def test_classes_without_names_have_numbers():
    assert find_label("3", [], 10) == 3
    with pytest.raises(ValueError, match="the classes of this model have none: give its number"):
        find_label("cat", [], 10)
