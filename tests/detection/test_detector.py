"""The kept detector predicts the same after a round trip, and a file that was touched is refused."""

import dataclasses
import json

import numpy as np
import pytest
import skops.io
from sklearn.metrics import roc_auc_score

from jaxsae.artifacts import InputError, sha256_file
from jaxsae.detection import DETECTORS, FittedDetector, fit_detector
from jaxsae.detection.baselines import TEXT_DETECTORS
from jaxsae.detection.tracks import CONTROLS


@pytest.fixture(scope="module")
def planted(tables):
    """The tables with a signal in the residual stream of layer 1 and in one track metric."""
    resid, metrics = tables.resid.astype(np.float32), tables.track_metrics.copy()
    resid[:, 1, 0, 2] += 3 * tables.labels
    metrics[:, 3] += tables.labels
    return dataclasses.replace(tables, resid=resid, track_metrics=metrics)


@pytest.fixture(scope="module")
def detector(planted, config):
    return fit_detector(planted, config)


@pytest.fixture
def saved(detector, tmp_path):
    detector.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in DETECTORS if name not in (*TEXT_DETECTORS, *CONTROLS)])
def test_load__predicts_as_the_saved_detector(planted, config, tmp_path, name):
    fitted = fit_detector(planted, dataclasses.replace(config, deploy=name))
    fitted.save(tmp_path)
    loaded = FittedDetector.load(tmp_path)
    np.testing.assert_array_equal(loaded.predict_proba(planted), fitted.predict_proba(planted))
    assert (loaded.name, loaded.threshold, loaded.settings) == (name, fitted.threshold, fitted.settings)


def test_predict_proba__is_higher_for_hallucinated_answers(planted, detector):
    probabilities = detector.predict_proba(planted)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert roc_auc_score(planted.labels, probabilities[:, 1]) > 0.9
    np.testing.assert_array_equal(detector.predict(planted), probabilities[:, 1] >= detector.threshold)


def test_predict_proba__of_one_row_is_that_of_the_batch(inputs, planted, detector):
    row = 41
    features = inputs.features
    alone = dataclasses.replace(
        planted,
        **{name: getattr(planted, name)[row : row + 1] for name in (
            "ids", "groups", "labels", "categories", "questions", "answers", "lengths", "logprobs", "entropies",
            "resid", "feature_ids", "activations", "track_metrics",
        )},
        track_controls={},
        track_families={name: family[row : row + 1] for name, family in planted.track_families.items()},
    )  # fmt: skip
    assert len(features.ids) == 120
    np.testing.assert_allclose(detector.predict_proba(alone)[0], detector.predict_proba(planted)[row], rtol=1e-12)


def test_calibration__is_fitted_out_of_fold(tables, config):
    """On noise a forest separates the rows it was fitted on; its calibration must not have learned from that."""
    fitted = fit_detector(tables, dataclasses.replace(config, deploy="tracks_forest"))
    forest_scores = fitted.scores(tables)
    assert roc_auc_score(tables.labels, forest_scores) > 0.99
    assert abs(fitted.slope) < 3


def test_detector_json__says_what_it_needs(saved, detector):
    content = json.loads((saved / "detector.json").read_text())
    assert content["name"] == "stack_tracks"
    assert content["layout"]["n_layers"] == 3
    assert content["layout"]["track_columns"] == [f"metric_{index}" for index in range(7)]
    assert content["calibration"] == {"slope": detector.slope, "intercept": detector.intercept}
    layers = {part["name"]: part["layer"] for part in content["parts"]}
    assert layers["probe_last_prompt"] == 1
    assert layers["tracks_forest"] is None


def test_predict_proba__ignores_latents_that_training_never_had(planted, config):
    fitted = fit_detector(planted, dataclasses.replace(config, deploy="sae_logistic"))
    ids = planted.feature_ids.copy()
    ids[ids == -1] = 500
    other = dataclasses.replace(planted, feature_ids=ids, n_latents=501)
    np.testing.assert_array_equal(fitted.predict_proba(other), fitted.predict_proba(planted))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resid": np.zeros((120, 2, 3, 5), dtype=np.float16)}, r"n_layers 3, these have 2"),
        ({"resid": np.zeros((120, 3, 3, 6), dtype=np.float16)}, r"width 5, these have 6"),
        ({"positions": ("last_prompt", "pooled")}, r"positions .*last_answer.*, these have .*pooled"),
        ({"track_columns": tuple("abcdefg")}, r"track_columns .*metric_0.*, these have \['a', 'b'"),
        ({"track_families": {}}, r"track_families .*'concepts': 40, .*, these have \{\}"),
    ],
)
def test_predict_proba__refuses_rows_of_another_model(planted, detector, changes, message):
    if "resid" in changes and changes["resid"].shape[1] == 2:
        changes = changes | {name: getattr(planted, name)[:, :2] for name in ("feature_ids", "activations")}
    with pytest.raises(InputError, match=message):
        detector.predict_proba(dataclasses.replace(planted, **changes))


def test_load__refuses_a_flipped_byte(saved):
    path = saved / "estimators.skops"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"estimators.skops has sha256 [0-9a-f]{12}, detector.json says .*run jaxsae detect"
    ):
        FittedDetector.load(saved)


def test_load__names_a_missing_file(saved):
    (saved / "estimators.skops").unlink()
    with pytest.raises(InputError, match=r"estimators.skops is missing; run jaxsae detect"):
        FittedDetector.load(saved)
    (saved / "detector.json").unlink()
    with pytest.raises(InputError, match=r"detector.json is missing; run jaxsae detect"):
        FittedDetector.load(saved)


def rewrite(directory, **changes):
    path = directory / "detector.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_load__refuses_a_description_that_lacks_a_key(saved):
    rewrite(saved, threshold=None)
    with pytest.raises(InputError, match=r"detector.json is not a detector's description \(KeyError\('threshold'\)\)"):
        FittedDetector.load(saved)


def test_load__refuses_parts_that_do_not_fit_the_estimators(saved, detector):
    rewrite(saved, parts=[{"name": "length", "layer": None, "c": None}])
    with pytest.raises(InputError, match=r"names 1 parts, estimators.skops holds 15"):
        FittedDetector.load(saved)


def test_load__refuses_types_that_no_detector_has(saved):
    class Stranger:
        pass

    Stranger.__module__, Stranger.__qualname__ = "stranger", "Stranger"
    path = saved / "estimators.skops"
    path.write_bytes(skops.io.dumps([Stranger()]))
    rewrite(saved, estimators_sha256=sha256_file(path))
    with pytest.raises(InputError, match=r"estimators.skops holds stranger.*, which no detector has"):
        FittedDetector.load(saved)


def test_load__refuses_a_file_that_is_no_skops_file(saved):
    path = saved / "estimators.skops"
    path.write_bytes(b"not a zip")
    rewrite(saved, estimators_sha256=sha256_file(path))
    with pytest.raises(InputError, match=r"estimators.skops is not a file of estimators"):
        FittedDetector.load(saved)


def test_fit_detector__refuses_one_class(tables, config):
    one = dataclasses.replace(tables, labels=np.ones(120, dtype=np.int64))
    with pytest.raises(InputError, match=r"got 120 hallucinated and 0 right"):
        fit_detector(one, config)
