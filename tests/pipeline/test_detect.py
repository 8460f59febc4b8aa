"""What splits keep together: a question with its answers, or a whole category of questions."""

import dataclasses

import numpy as np
import pytest

from jaxsae import artifacts
from jaxsae.artifacts import InputError
from jaxsae.pipeline.detect import make_tables, read_tables


def test_split_by_category__makes_groups_of_the_categories(finished):
    by_question, by_category = (read_tables(finished.workdir, split_by=name) for name in ("question", "category"))
    assert len(set(by_question.groups)) > len(set(by_category.groups)) > 1
    assert by_category.groups == by_question.categories
    np.testing.assert_array_equal(by_question.labels, by_category.labels)


def test_split_by_category__names_an_answer_without_one(finished):
    answers = artifacts.read_answers(finished.workdir / "answers.jsonl")
    answers[3] = dataclasses.replace(answers[3], category="")
    features = artifacts.read_features(finished.workdir / "features.npz")
    tracks = artifacts.read_npz(finished.workdir / "tracks.npz", rebuild="")
    with pytest.raises(InputError, match=f"answer {answers[3].id} has no category; set detection.split_by=question"):
        make_tables(features, answers, tracks, {}, split_by="category")
    assert len(make_tables(features, answers, tracks, {}, split_by="question").ids) == len(answers)
