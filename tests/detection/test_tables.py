"""Rows are aligned by id, summaries are exact, and what does not fit is refused by name."""

import dataclasses

import numpy as np
import pytest

from jaxsae.artifacts import InputError
from jaxsae.detection import build_tables
from jaxsae.detection.tables import normalise_text


def replaced(inputs, **changes):
    return dataclasses.replace(inputs, features=dataclasses.replace(inputs.features, **changes))


def test_build_tables__aligns_answers_in_any_order(inputs, tables):
    shuffled = dataclasses.replace(inputs, answers=inputs.answers[::-1]).tables()
    assert shuffled.ids == tables.ids == tuple(f"row{index}" for index in range(120))
    assert shuffled.groups == tables.groups
    np.testing.assert_array_equal(shuffled.labels, [answer.label for answer in inputs.answers])
    np.testing.assert_array_equal(shuffled.logprobs, tables.logprobs)


def test_build_tables__summarises_logprobs_and_lengths_exactly(inputs, tables):
    for row, answer in enumerate(inputs.answers):
        values = np.array(answer.logprobs)
        expected = [values.mean(), values.min(), values.sum(), values[0]] if len(values) else [0, 0, 0, 0]
        np.testing.assert_allclose(tables.logprobs[row], expected, rtol=1e-12)
        assert tables.lengths[row].tolist() == [len(values), len(answer.answer)]


def test_build_tables__counts_empty_answers_and_keeps_them_finite(inputs, tables):
    assert tables.n_empty == sum(not answer.answer_ids for answer in inputs.answers) > 1
    assert np.isfinite(tables.logprobs).all()


def test_build_tables__takes_answers_that_are_all_empty(make_inputs):
    inputs = make_inputs(n_groups=3)
    answers = [
        dataclasses.replace(answer, answer="", answer_ids=(), logprobs=(), entropies=()) for answer in inputs.answers
    ]
    empty = replaced(inputs, logprobs=np.zeros(0), offsets=np.zeros(7, dtype=np.int64))
    tables = build_tables(empty.features, answers, empty.track_metrics, empty.track_columns)
    assert tables.n_empty == 6
    assert tables.logprobs.tolist() == [[0.0] * 4] * 6
    assert tables.entropies.tolist() == [[0.0] * 2] * 6
    assert tables.answer_counts.shape == (6, 1)
    assert tables.answer_counts.nnz == 0


@pytest.mark.parametrize("position", ["last_prompt", "last_answer", "max"])
def test_latents__equal_a_plain_loop(tables, position):
    picked = [0, 1] if position == "max" else [tables.positions.index(position)]
    expected = np.zeros((len(tables.ids), tables.n_latents))
    for row in range(len(tables.ids)):
        for index in picked:
            for latent, value in zip(tables.feature_ids[row, 1, index], tables.activations[row, 1, index], strict=True):
                if latent >= 0:
                    expected[row, latent] = max(expected[row, latent], value)
    np.testing.assert_array_equal(tables.latents(1, position).toarray(), expected)


def test_latents__leave_out_ids_beyond_the_columns(tables):
    few = dataclasses.replace(tables, n_latents=9)
    np.testing.assert_array_equal(few.latents(2, "max").toarray(), tables.latents(2, "max").toarray()[:, :9])


def test_latents__name_a_position_that_was_not_kept(tables):
    with pytest.raises(InputError, match=r"last_prompt, last_answer, detection.sae_position asks for pooled"):
        tables.latents(0, "pooled")


def test_normalise_text__forgets_case_width_spacing_and_punctuation():
    assert normalise_text("  The  Ｒｉｖｅｒ—Élan!\n") == "the river élan"
    assert normalise_text("?!") == ""


def test_build_tables__names_the_first_id_without_answer(inputs):
    with pytest.raises(InputError, match=r"features.npz has id 'row4', answers.jsonl has not"):
        dataclasses.replace(inputs, answers=inputs.answers[:4] + inputs.answers[6:]).tables()


def test_build_tables__names_the_first_answer_without_features(inputs):
    extra = dataclasses.replace(inputs.answers[0], id="stranger")
    with pytest.raises(InputError, match=r"answers.jsonl has id 'stranger', features.npz has not"):
        dataclasses.replace(inputs, answers=[*inputs.answers, extra]).tables()


def test_build_tables__refuses_repeated_ids(inputs):
    with pytest.raises(InputError, match=r"answers.jsonl repeats id 'row3'"):
        dataclasses.replace(inputs, answers=[*inputs.answers, inputs.answers[3]]).tables()
    with pytest.raises(InputError, match=r"features.npz repeats id 'row0'"):
        replaced(inputs, ids=("row0", "row0", *inputs.features.ids[2:])).tables()


def test_build_tables__refuses_no_row(inputs):
    with pytest.raises(InputError, match=r"features.npz holds no row"):
        replaced(inputs, ids=()).tables()


def test_build_tables__refuses_another_label(inputs):
    odd = [dataclasses.replace(inputs.answers[0], label=2), *inputs.answers[1:]]
    with pytest.raises(InputError, match=r"answer 'row0' has label 2"):
        dataclasses.replace(inputs, answers=odd).tables()


def test_build_tables__takes_mean_and_largest_entropy(inputs, tables):
    for row, answer in enumerate(inputs.answers):
        expected = [np.mean(answer.entropies), np.max(answer.entropies)] if answer.entropies else [0, 0]
        np.testing.assert_allclose(tables.entropies[row], expected, rtol=1e-15)


def test_build_tables__names_an_answer_whose_entropies_are_not_its_tokens(inputs):
    row = next(n for n, answer in enumerate(inputs.answers) if answer.entropies)
    short = dataclasses.replace(inputs.answers[row], entropies=inputs.answers[row].entropies[1:])
    answers = [*inputs.answers[:row], short, *inputs.answers[row + 1 :]]
    n = len(short.answer_ids)
    with pytest.raises(InputError, match=rf"'row{row}' has {n - 1} entropies, features.npz {n} tokens of it; run"):
        dataclasses.replace(inputs, answers=answers).tables()


def test_build_tables__refuses_metrics_of_another_size(inputs):
    shorter = {name: metrics[:-1] for name, metrics in inputs.track_controls.items()}
    with pytest.raises(InputError, match=r"119 rows of 7 columns, expected 120 rows of 7"):
        dataclasses.replace(inputs, track_controls=shorter).tables()
    with pytest.raises(InputError, match=r"119 rows of 7 columns, expected 120 rows of 7"):
        dataclasses.replace(inputs, track_metrics=inputs.track_metrics[:-1]).tables()
    with pytest.raises(InputError, match=r"120 rows of 7 columns, expected 120 rows of 2"):
        dataclasses.replace(inputs, track_columns=("a", "b")).tables()


def test_build_tables__names_the_first_row_that_is_not_finite(inputs):
    metrics = inputs.track_metrics.copy()
    metrics[[17, 40], 3] = np.nan
    with pytest.raises(InputError, match=r"track metrics of 2 rows, first 'row17', are not finite"):
        dataclasses.replace(inputs, track_metrics=metrics).tables()
    resid = inputs.features.resid.copy()
    resid[5, 2, 1, 0] = np.inf
    with pytest.raises(InputError, match=r"resid of layer 2 of 1 rows, first 'row5'"):
        replaced(inputs, resid=resid).tables()
