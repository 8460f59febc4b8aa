import dataclasses
import re

import numpy as np
import pytest
from matplotlib.patches import StepPatch

from jaxsae.report import figures


def test_resamples__draw_whole_groups_as_often_as_there_are_groups():
    groups = np.array(["b", "a", "b", "c", "a"])
    for weights in figures.resamples(groups):
        assert weights[0] == weights[2]
        assert weights[1] == weights[4]
        assert weights[0] + weights[1] + weights[3] == 3


def test_roc_band__is_one_for_a_perfect_score_and_ignores_copies_within_groups():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    grid = np.linspace(0, 1, 11)
    perfect = figures.roc_band(labels, labels + 0.0, np.arange(60), grid)
    assert np.array_equal(perfect, np.ones((2, 11)))
    scores, groups = rng.normal(size=60) + labels, np.arange(60)
    once = figures.roc_band(labels, scores, groups, grid)
    twice = figures.roc_band(np.repeat(labels, 2), np.repeat(scores, 2), np.repeat(groups, 2), grid)
    np.testing.assert_allclose(once, twice, atol=1e-12)
    assert np.all(once[1] - once[0] >= 0)
    assert np.all(np.diff(once, axis=1) >= 0)


def test_calibration_points__have_equal_mass_and_keep_the_base_rate():
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=200)
    labels = (rng.uniform(size=200) < scores).astype(int)
    score, share, band = figures.calibration_points(labels, scores, np.arange(200))
    assert len(score) == figures.CALIBRATION_BINS
    np.testing.assert_allclose([score.mean(), share.mean()], [scores.mean(), labels.mean()], atol=1e-12)
    assert np.all((band[0] <= share) & (share <= band[1]))
    assert np.all(np.diff(score) > 0)


def test_calibration_points__of_few_answers_use_few_bins():
    score, share, _ = figures.calibration_points(np.array([0, 1, 1]), np.array([0.1, 0.5, 0.6]), np.array([0, 1, 1]))
    np.testing.assert_allclose([score, share], [[0.4], [2 / 3]])


def test_draw__leaves_out_what_has_no_numbers(make_inputs):
    empty = {"sae": (), "history": (), "detection": (), "canary": None, "predictions": {}, "examples": ()}
    assert figures.draw(make_inputs(**empty)) == {}


def test_draw__needs_both_classes_for_curves_and_probabilities_for_calibration(make_inputs):
    inputs = make_inputs(n_answers=80)
    rest = {"sae": (), "history": (), "detection": (), "examples": ()}
    labels, scores, groups = inputs.predictions[inputs.method]
    one_class = {inputs.method: (np.zeros_like(labels), scores, groups)}
    log_odds = {inputs.method: (labels, 9 * scores - 4, groups)}
    assert set(figures.draw(make_inputs(predictions=one_class, **rest))) == set()
    assert set(figures.draw(make_inputs(predictions=log_odds, **rest))) == {"roc"}
    calibrated = {name: 1 / (1 + np.exp(-raw)) for name, (_, raw, _) in log_odds.items()}
    both = figures.draw(make_inputs(predictions=log_odds, probabilities=calibrated, **rest))
    assert set(both) == {"roc", "calibration"}


def test_svg__has_no_links_out_and_ids_of_its_own(make_inputs):
    rest = {"history": (), "detection": (), "predictions": {}}
    charts = figures.draw(make_inputs(**rest))
    assert set(charts) == {"sae_layers", "sae_density", "sae_crowding", "tracks_1_right", "tracks_2_wrong"}
    ids = [found for chart in charts.values() for found in re.findall(r'\bid="([^"]+)"', chart.svg)]
    assert len(ids) == len(set(ids))
    for name, chart in charts.items():
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', chart.svg)
        assert {a or b for a, b in used} <= set(ids)
        assert all((a or b).startswith(f"{name}-") for a, b in used)
        assert not re.search(r"http|xmlns|<!--|<metadata|<script|<image", chart.svg)
        assert chart.svg.startswith("<svg viewBox=")
        assert chart.png.startswith(b"\x89PNG")


def test_tracks__beyond_what_a_page_can_show_are_counted(make_inputs):
    inputs = make_inputs(sae=(), history=(), detection=(), predictions={})
    charts = figures.draw(inputs)
    assert "18 of its 18 tracks" in charts["tracks_1_right"].caption
    assert "30 of its 70 tracks" in charts["tracks_2_wrong"].caption


@pytest.mark.parametrize(
    "tracks",
    [
        [{"birth": 0, "death": 0, "layers": [0], "features": [7], "activations": [0.0]}],
        [{"birth": 2, "death": None, "layers": [2, 5], "features": [7, 9], "activations": [1.0, 3.0]}],
    ],
)
def test_tracks__of_one_layer_or_without_activation_can_be_drawn(make_inputs, tracks):
    example = {"question": "q", "answer": "a", "label": 1, "expected": [], "score": None, "tracks": tracks}
    inputs = make_inputs(sae=(), history=(), detection=(), predictions={}, examples=[example])
    assert "1 of its 1 tracks" in figures.draw(inputs)["tracks_1_wrong"].caption


def test_auroc_forest__explains_only_the_marks_it_draws(make_inputs):
    rest = {"sae": (), "history": (), "predictions": {}, "examples": ()}
    full = figures.draw(make_inputs(**rest))["auroc"]
    assert "diamond: the method; square: the best simple baseline; cross: the noise canary" in full.caption
    bare = figures.draw(make_inputs(**rest, canary=None, method=None, best_baseline=None))["auroc"]
    assert bare.caption == "AUROC with 95% intervals (bootstrap over groups)."


def test_risk_coverage__draws_method_and_baseline_between_chance_and_no_error(make_inputs):
    inputs = make_inputs()
    figure, alt, _ = figures.risk_coverage(inputs)
    lines = {line.get_label().split(",")[0]: line for line in figure.axes[0].lines}
    rows = {row["name"]: row for row in inputs.detection}
    for name in (inputs.method, inputs.best_baseline):
        assert name in alt
        assert lines[name].get_ydata().tolist() == [point["risk"] for point in rows[name]["risk_coverage"]]
    assert set(lines["chance"].get_ydata()) == {0.531}
    best = lines["no error"]
    np.testing.assert_allclose(best.get_ydata()[-1], 0.531)
    assert (best.get_ydata()[best.get_xdata() < 1 - 0.531] == 0).all()
    older = [{key: value for key, value in row.items() if key != "risk_coverage"} for row in inputs.detection]
    assert figures.risk_coverage(make_inputs(detection=older)) is None


def test_label_curves__draw_a_line_a_detector_and_kind(make_inputs):
    inputs = make_inputs()
    figure, alt, _ = figures.label_curves(inputs)
    few, noise = figure.axes
    for axes, kind, key in ((few, "few_labels", "n_labelled"), (noise, "label_noise", "share")):
        for line, name in zip(axes.lines, ("resid_last_prompt", "tracks"), strict=False):
            rows = [row for row in inputs.curves if (row["kind"], row["detector"]) == (kind, name)]
            assert line.get_xdata().tolist() == [row[key] for row in rows]
            assert line.get_ydata().tolist() == [row["auroc"] for row in rows]
            assert name in alt
    assert few.get_ylim() == noise.get_ylim()
    assert figures.label_curves(make_inputs(curves=())) is None


def test_density_ridges__name_the_mean_rate__and_need_a_latent_that_fires(make_inputs):
    rest = {"history": (), "detection": (), "predictions": {}, "examples": ()}
    rows = [{"layer": layer, "l0_inference": l0} for layer, l0 in enumerate((6.0, 10.0))]
    density = {"log10_edges": [-0.5, -0.25, 0.0], "counts": [[3, 0], [0, 1]]}
    inputs = make_inputs(sae=rows, density=density, sae_spec={"n_latents": 512}, **rest)
    charts = figures.draw(inputs)
    assert "Dotted: the mean rate, 1 token in 64." in charts["sae_density"].caption
    assert "of 2 layers" in charts["sae_density"].alt
    unknown = figures.draw(dataclasses.replace(inputs, sae_spec={}))
    assert "Dotted" not in unknown["sae_density"].caption
    silent = {"log10_edges": [-0.5, 0.0], "counts": [[0], [0]]}
    assert "sae_density" not in figures.draw(dataclasses.replace(inputs, density=silent))


def test_density_ridges__draw_the_histograms_to_one_scale(make_inputs):
    counts = [[0, 8, 2], [4, 0, 0]]
    density = {"log10_edges": [-0.75, -0.5, -0.25, 0.0], "counts": counts}
    figure, _, _ = figures.density_ridges(make_inputs(n_layers=2, density=density))
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, StepPatch)]
    for layer, patch in enumerate(patches):
        heights = layer - patch.get_data().values
        np.testing.assert_allclose(heights, figures.RIDGE_OVERLAP * np.array(counts[layer]) / 8)
        assert patch.get_data().baseline == layer


def test_crowding__draws_the_quantiles_it_names_beside_random_directions(make_inputs):
    inputs = make_inputs(n_layers=3, crowding_random=0.25)
    figure, alt, _ = figures.crowding(inputs)
    (axes,) = figure.axes
    wide, narrow = (np.array(lines.get_segments()) for lines in axes.collections)
    for layer, row in enumerate(inputs.sae):
        assert wide[layer].tolist() == [[layer, row["crowding_p05"]], [layer, row["crowding_p95"]]]
        assert narrow[layer].tolist() == [[layer, row["crowding_p25"]], [layer, row["crowding_p75"]]]
    median, largest, random = axes.lines
    assert median.get_ydata().tolist() == [row["crowding_median"] for row in inputs.sae]
    assert largest.get_ydata().tolist() == [row["crowding_max"] for row in inputs.sae]
    assert list(random.get_ydata()) == [0.25, 0.25]
    medians = sorted(row["crowding_median"] for row in inputs.sae)
    assert alt.endswith(f"medians {medians[0]:.3f} to {medians[-1]:.3f}.")
    figure, _, _ = figures.crowding(make_inputs(crowding_random=None))
    assert len(figure.axes[0].lines) == 2
