import pytest

from jaxsae.report import ReportInputs, verdicts

EMPTY = ReportInputs(config_name="c", command="x", created="t")
NAN = float("nan")


def paired(inputs, index: int, low: float | None, high: float | None) -> list[dict]:
    rows = [dict(row) for row in inputs.differences]
    rows[index] |= {"ci_low": low, "ci_high": high, "difference": None if low is None else (low + high) / 2}
    return rows


@pytest.mark.parametrize(
    ("low", "high", "state", "words"),
    [
        (0.001, 0.03, "good", "is better than logprob_first"),
        (0.0, 0.03, "open", "cannot be told from logprob_first"),
        (-0.01, 0.03, "open", "cannot be told from logprob_first"),
        (-0.03, 0.0, "open", "cannot be told from logprob_first"),
        (-0.03, -0.001, "bad", "is worse than logprob_first"),
        (None, None, "missing", "run jaxsae detect"),
        (NAN, NAN, "missing", "run jaxsae detect"),
    ],
)
def test_detection_verdict__follows_the_paired_interval(make_inputs, low, high, state, words):
    inputs = make_inputs(differences=paired(make_inputs(), 0, low, high))
    verdict = verdicts.detection_verdict(inputs)
    assert (verdict.state, words in verdict.text) == (state, True)
    assert ("the method passes" in verdict.title) == (state == "good")


@pytest.mark.parametrize(
    ("low", "high", "state"),
    [(0.001, 0.02, "good"), (-0.01, 0.02, "open"), (-0.02, -0.001, "bad"), (None, None, "missing")],
)
def test_tracks_verdict__follows_the_paired_interval(make_inputs, low, high, state):
    verdict = verdicts.tracks_verdict(make_inputs(differences=paired(make_inputs(), 1, low, high)))
    assert verdict.state == state
    assert verdicts.tracks_verdict(make_inputs(tracks_difference=None)).state == "missing"


@pytest.mark.parametrize(
    ("low", "high", "state"), [(0.48, 0.52, "good"), (0.5, 0.52, "good"), (0.501, 0.6, "bad"), (0.3, 0.499, "bad")]
)
def test_canary_verdict__asks_for_one_half_within_the_interval(make_inputs, low, high, state):
    canary = {"auroc": (low + high) / 2, "ci_low": low, "ci_high": high}
    verdict = verdicts.canary_verdict(make_inputs(canary=canary))
    assert verdict.state == state
    assert ("trust no AUROC" in verdict.text) == (state == "bad")


@pytest.mark.parametrize("canary", [None, {}, {"auroc": NAN, "ci_low": NAN, "ci_high": NAN}])
def test_canary_verdict__is_missing_without_an_interval(make_inputs, canary):
    assert verdicts.canary_verdict(make_inputs(canary=canary)).state == "missing"


@pytest.mark.parametrize(
    ("fvu", "band", "state"),
    [(0.05, "excellent", "good"), (0.1, "good", "good"), (0.2, "fair", "open"), (0.4, "poor", "bad")],
)
def test_sae_verdict__is_that_of_the_worst_layer(make_inputs, fvu, band, state):
    rows = [{"layer": 0, "fvu": 0.01}, {"layer": 1, "fvu": fvu}, {"layer": 2, "fvu": None}]
    verdict = verdicts.sae_verdict(make_inputs(sae=rows))
    assert (verdict.state, verdict.title) == (state, f"SAE quality: {band} at the worst layer")
    assert f"{fvu:.4f} at worst (layer 1)" in verdict.text
    assert "1 not measured" in verdict.text
    assert "PCA" not in verdict.text
    assert "ΔCE" not in verdict.text


def test_sae_verdict__counts_the_layers_below_pca(make_inputs):
    rows = [
        {"layer": 0, "fvu": 0.03, "pca_fvu": 0.02},
        {"layer": 1, "fvu": 0.03, "pca_fvu": 0.3},
        {"layer": 2, "fvu": 0.03},
    ]
    text = verdicts.sae_verdict(make_inputs(sae=rows)).text
    assert "PCA with 8 components leaves 0.0200 to 0.3000; the SAE leaves less on 1 of 2 layers." in text


def curve(*fvus: float, n_layers: int = 2) -> list[dict]:
    """Evaluations after 100, 200, ... tokens; the layers differ by 0.02."""
    return [
        {"tokens": 100 * (i + 1), "layer": layer, "fvu": fvu + 0.02 * layer - 0.01}
        for i, fvu in enumerate(fvus)
        for layer in range(n_layers)
    ]


@pytest.mark.parametrize(
    ("fvus", "dead", "state", "words"),
    [
        (
            (0.3, 0.2, 0.19, 0.181),
            0.02,
            "good",
            "From 200 to 400 tokens the mean held-out FVU went from 0.2000 to 0.1810",
        ),
        ((0.3, 0.2, 0.19, 0.18), 0.02, "open", "10% down; dead latents at most 2.0%. The SAEs were still improving."),
        ((0.3, 0.2, 0.19, 0.181), 0.11, "open", "Train longer, or with fewer latents."),
        ((0.3, 0.2, 0.21, 0.22), 0.02, "good", "10% up"),
        ((0.3, 0.2), 0.02, "missing", "fewer than 3 evaluations"),
        ((), 0.02, "missing", "fewer than 3 evaluations"),
    ],
)
def test_budget_verdict__asks_what_the_second_half_gave(make_inputs, fvus, dead, state, words):
    inputs = make_inputs(history=curve(*fvus), sae=[{"layer": 0, "dead": 0.0}, {"layer": 1, "dead": dead}])
    verdict = verdicts.budget_verdict(inputs)
    assert (verdict.state, words in verdict.text) == (state, True), verdict


def test_budget_verdict__leaves_out_evaluations_that_lack_a_layer(make_inputs):
    torn = [*curve(0.3, 0.2, 0.19, 0.181), {"tokens": 500, "layer": 0, "fvu": 0.01}]
    assert "to 400 tokens" in verdicts.budget_verdict(make_inputs(history=torn)).text


def test_depth_sentence__compares_early_and_late(make_inputs):
    def rows(*fvus):
        return [{"layer": layer, "fvu": fvu} for layer, fvu in enumerate(fvus)]

    assert "is higher than" in verdicts.depth_sentence(make_inputs(sae=rows(0.1, 0.9, 0.2)))
    assert "is lower than" in verdicts.depth_sentence(make_inputs(sae=rows(0.2, 0.9, 0.1)))
    assert "is equal to" in verdicts.depth_sentence(make_inputs(sae=rows(0.2, 0.2)))
    assert verdicts.depth_sentence(make_inputs(sae=rows(0.2))) == ""
    assert verdicts.depth_sentence(make_inputs(sae=rows(None, 0.2))) == ""


def test_phases_verdict__names_the_missing_ones(make_inputs):
    phases = [{"name": "train", "status": "done", "seconds": 60.0}, {"name": "detect", "status": "missing"}]
    verdict = verdicts.phases_verdict(make_inputs(phases=phases))
    assert verdict.state == "open"
    assert verdict.text == "1 of 2 phases have their output, in 1 min 00 s altogether. Missing: detect."
    assert verdicts.phases_verdict(make_inputs(phases=phases[:1])).state == "good"


def test_executive_summary__of_an_empty_run_says_what_to_run():
    found = [(verdict.state, verdict.text) for verdict in verdicts.executive_summary(EMPTY)]
    assert found[2] == ("missing", verdicts.budget_verdict(EMPTY).text)
    stages = ["run", "train", "detect", "detect", "detect"]
    assert found[:2] + found[3:] == [("missing", f"not available: run jaxsae {stage}") for stage in stages]


def test_overview__leaves_out_what_is_not_known(make_inputs):
    assert verdicts.overview(EMPTY) == ["Config c."]
    full = " ".join(verdicts.overview(make_inputs()))
    for words in (
        "demo_gpt2: 6 layers",
        "residual width 128",
        "topk, latents 512, k 8",
        "2,924 answers in 1,560 groups",
    ):
        assert words in full
