"""Each detector reads what its name says, and nothing that it may not know."""

import concurrent.futures
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.feature_extraction.text import TfidfTransformer, TfidfVectorizer
from sklearn.pipeline import make_pipeline

from jaxsae.artifacts import RESID_POSITIONS
from jaxsae.detection import DETECTORS
from jaxsae.detection.baselines import STACKS, make_baselines, text_noise
from jaxsae.detection.estimators import BestLatent, FixedScore, MeanDifference, TrainVocabulary
from jaxsae.detection.nesting import raw_scores
from jaxsae.detection.specs import Choice
from jaxsae.detection.tables import normalise_text


@pytest.fixture
def baselines(config, tables):
    return make_baselines(config.settings, tables.n_layers)


def test_make_baselines__has_every_detector_with_a_definition(baselines):
    assert set(baselines) | set(STACKS) == set(DETECTORS)
    assert all(len(baseline.definition) > 20 and "\n" not in baseline.definition for baseline in baselines.values())


def test_text_detectors__equal_tfidf_of_the_training_rows_alone(tables, baselines):
    train = np.arange(len(tables.ids)) < 80  # the towns of the other rows are words it never saw
    texts = [normalise_text(question) for question in tables.questions]
    reference = TfidfVectorizer(token_pattern=r"\w+", ngram_range=(1, 2))
    reference.fit([text for text, seen in zip(texts, train, strict=True) if seen])
    counts = baselines["question_tfidf"].inputs(tables, Choice())
    ours = make_pipeline(TrainVocabulary(), TfidfTransformer()).fit(counts[train])
    # Columns may be in another order: all inner products between rows are equal.
    expected = reference.transform(texts)
    found = ours.transform(counts)
    assert found.shape == expected.shape != counts.shape
    np.testing.assert_allclose((found @ found.T).toarray(), (expected @ expected.T).toarray(), atol=1e-12)


def test_train_vocabulary__keeps_one_column_where_none_is_used():
    assert TrainVocabulary().fit(sp.csr_matrix((4, 3))).transform(sp.csr_matrix((2, 3))).shape == (2, 1)


def test_logprob_detectors__score_minus_the_logprob(tables, baselines):
    for index, name in enumerate(["logprob_mean", "logprob_min", "logprob_sum", "logprob_first"]):
        inputs = baselines[name].inputs(tables, Choice())
        estimator = baselines[name].estimator(Choice(), 120, 1).fit(inputs, tables.labels)
        assert isinstance(estimator, FixedScore)
        np.testing.assert_array_equal(raw_scores(estimator, inputs), -tables.logprobs[:, index])


def test_probes__read_the_layer_and_position_of_their_name(tables, baselines):
    for index, position in enumerate(RESID_POSITIONS):
        found = baselines[f"probe_{position}"].inputs(tables, Choice(2, 0.03))
        np.testing.assert_array_equal(found, tables.resid[:, 2, index])


def test_best_latent__finds_the_one_that_tells_and_its_sign():
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    latents = rng.random((80, 6)) * (rng.random((80, 6)) < 0.3)
    latents[:, 4] = 1.0
    latents[:, 2] = 3.0 * (1 - labels)
    best = BestLatent().fit(sp.csr_matrix(latents), labels)
    np.testing.assert_array_equal(best.coef_, [0, 0, -1, 0, 0, 0])
    np.testing.assert_array_equal(best.decision_function(sp.csr_matrix(latents)), -latents[:, 2])


def test_mean_difference__equals_the_dense_formula_and_ignores_constants():
    rng = np.random.default_rng(1)
    latents = rng.random((50, 4)) * (rng.random((50, 4)) < 0.5)
    latents[:, 1] = 0.7
    labels = (rng.random(50) < 0.4).astype(int)
    expected = (latents[labels == 1].mean(axis=0) - latents[labels == 0].mean(axis=0)) / latents.std(axis=0)
    expected[1] = 0
    np.testing.assert_allclose(MeanDifference().fit(sp.csr_matrix(latents), labels).coef_, expected, rtol=1e-9)


def test_sae_logistic__drops_latents_of_noise(baselines):
    rng = np.random.default_rng(2)
    latents = sp.random(900, 60, density=0.2, format="csr", random_state=0)
    labels = (rng.random(900) < 0.5).astype(int)
    signal = sp.csr_matrix(2.0 * labels[:, None] * (rng.random((900, 1)) < 0.5))
    both = sp.hstack([signal, latents], format="csr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regression = baselines["sae_logistic"].estimator(Choice(0), 900, 61).fit(both, labels)[-1]
    assert np.argmax(np.abs(regression.coef_)) == 0
    assert np.mean(regression.coef_[0, 1:] == 0) > 0.5


def test_sae_logistic__is_the_same_beside_other_threads(baselines):
    latents = sp.random(400, 60, density=0.3, format="csr", random_state=0)
    labels = np.random.default_rng(0).integers(2, size=400)

    def fit(_):
        return baselines["sae_logistic"].estimator(Choice(0), 400, 60).fit(latents, labels)[-1].coef_

    alone = fit(None)
    assert (alone != 0).any()
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        for beside in executor.map(fit, range(40)):
            np.testing.assert_array_equal(beside, alone)


def test_text_noise__depends_on_text_and_seed_alone():
    noise = text_noise(("a", "b", "a"), n_columns=500, seed=0)
    np.testing.assert_array_equal(noise[0], noise[2])
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.2
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert (text_noise(("a",), n_columns=500, seed=1)[0] != noise[0]).all()
