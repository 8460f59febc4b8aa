"""What splits keep together: a question with its answers, or a whole category of questions."""

import dataclasses

import numpy as np
import pytest

from jaxsae import artifacts, detection
from jaxsae.artifacts import InputError
from jaxsae.detection.splits import make_folds
from jaxsae.pipeline.detect import make_tables, read_tables


def test_split_by_category__keeps_each_category_in_one_fold(finished):
    by_question, by_category = (read_tables(finished.workdir, split_by=name) for name in ("question", "category"))
    assert len(set(by_question.groups)) > len(set(by_category.groups)) == len(set(by_question.categories)) > 1
    np.testing.assert_array_equal(by_question.labels, by_category.labels)
    (fold,) = make_folds(by_category, detection.ProtocolConfig(folds=3, repeats=1))
    assert len(set(fold)) == 3
    for category in set(by_category.categories):
        assert len({number for number, own in zip(fold, by_category.categories, strict=True) if own == category}) == 1


def test_split_by_category__names_an_answer_without_one(finished):
    answers = artifacts.read_answers(finished.workdir / "answers.jsonl")
    answers[3] = dataclasses.replace(answers[3], category="")
    features = artifacts.read_features(finished.workdir / "features.npz")
    tracks = artifacts.read_npz(finished.workdir / "tracks.npz", rebuild="")
    with pytest.raises(InputError, match=f"answer {answers[3].id} has no category; set detection.split_by=question"):
        make_tables(features, answers, tracks, {}, split_by="category")
    assert len(make_tables(features, answers, tracks, {}, split_by="question").ids) == len(answers)
