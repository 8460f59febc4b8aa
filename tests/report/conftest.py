"""Made-up inputs of a report, as a run on a small model would give them."""

import dataclasses

import numpy as np
import pytest

from jaxsae.report import ReportInputs

METHOD, BASELINE = "logprob_probe_tracks", "logprob_first"
DETECTORS = (
    (METHOD, "stack: log-prob family, residual probe and the 26 track metrics", 0.912),
    ("logprob_probe", "stack: log-prob family and residual probe", 0.909),
    (BASELINE, "1 − p(first token)", 0.884),
    ("resid_last_prompt", "logistic regression on the residual at the last prompt token, layer by validation", 0.771),
    ("sae_l1", "SAE features, max-pooled, L1 logistic regression", 0.742),
    ("tracks", "the 26 track metrics, random forest", 0.701),
    ("answer_tfidf", "TF-IDF of the answer's words", 0.583),
    ("answer_length", "number of tokens of the answer", 0.541),
    ("class_prior", "the share of hallucinated answers", 0.5),
)
CHOSEN = {
    METHOD: {
        "n_choices": 20,
        "chosen": [
            {"repeat": 0, "fold": fold, "layer": None, "c": None, "model": model, "families": families}
            for fold, (model, families) in enumerate([("svm", "metrics"), *[("logistic", "prompt+late_births")] * 2])
        ],
    }
}


def detection_row(name: str, definition: str, auroc: float) -> dict:
    """One row of the detection table, its other columns derived from the AUROC."""
    low, high = auroc - 0.021, auroc + 0.02
    if name == "class_prior":
        low = high = auroc
    rates = {"pr_auc": 0.38 + 0.55 * (auroc - 0.5) / 0.41, "base_rate": 0.531, "brier": 0.24 - 0.3 * (auroc - 0.5)}
    scores = {"ece": 0.021, "accuracy": 0.62 + 0.5 * (auroc - 0.5), "precision": auroc - 0.1, "recall": auroc - 0.12}
    return {
        "name": name,
        "definition": definition,
        "n": 2924,
        "n_groups": 1560,
        "auroc": auroc,
        "ci_low": low,
        "ci_high": high,
        "f1": auroc - 0.11,
        "p_value": 0.0005 if auroc > 0.5 else 1.0,
        "brier_isotonic": rates["brier"] - 0.002,
        "ece_isotonic": 0.017,
        "aurc": 0.531 - 0.6 * (auroc - 0.5),
        "aurc_best": 0.176,
        "risk_coverage": [
            {"coverage": share, "risk": 0.531 * (1 - (1 - share) * 2 * (auroc - 0.5))} for share in (0.1, 0.5, 1.0)
        ],
        **rates,
        **scores,
    }


def curve_rows() -> list[dict]:
    """AUROC of two detectors with fewer and with flipped labels."""
    settings = [("few_labels", share, round(2924 * share)) for share in (0.05, 0.25, 1.0)]
    settings += [("label_noise", share, 2924) for share in (0.0, 0.2)]
    return [
        {
            "kind": kind,
            "detector": name,
            "share": share,
            "n_labelled": n_labelled,
            "auroc": top - (0.1 * (1 - share) if kind == "few_labels" else 0.3 * share),
            "ci_low": top - 0.13,
            "ci_high": top + 0.02,
        }
        for name, top in (("resid_last_prompt", 0.771), ("tracks", 0.701))
        for kind, share, n_labelled in settings
    ]


def sae_rows(n_layers: int) -> list[dict]:
    """SAE rows of a good run: FVU rising slowly with depth."""
    rng = np.random.default_rng(1)
    noise = rng.uniform(0, 1, size=(n_layers, 4))
    return [
        {
            "layer": layer,
            "mse": 0.0031 * (1 + layer),
            "fvu": 0.030 + 0.03 * layer / n_layers + 0.004 * u[0],
            "pca_fvu": 0.2 + 0.09 * u[1],
            "l0_train": 8.0,
            "l0_inference": 7.4 + u[2],
            "dead": 0.02 + 0.05 * u[3],
            "delta_ce": 0.02 + 0.1 * u[0],
            "explained_variance_legacy": 0.97 - 0.03 * layer / n_layers,
            "dead_held_out": 0.03 + 0.05 * u[3],
            "ce_recovered": 0.99 - 0.01 * u[0],
            "crowding_mean": 0.43 + 0.01 * u[1],
            "crowding_p05": 0.31,
            "crowding_p25": 0.37,
            "crowding_median": 0.41 + 0.02 * u[1],
            "crowding_p75": 0.47,
            "crowding_p95": 0.66,
            "crowding_max": 0.93 + 0.05 * u[2],
            "delta_ce_zero": 7.9 + u[1],
            "delta_ce_mean": 5.1 + u[2],
            "kl": 0.03 + 0.1 * u[3],
            "best_step": 2960 - 40 * (layer % 2),
        }
        for layer, u in enumerate(noise)
    ]


def density(n_layers: int) -> dict:
    """Firing rates of 512 latents a layer around 1 token in 64, seen on 65,536 tokens."""
    rng = np.random.default_rng(4)
    edges = np.arange(-20, 1) / 4
    rates = np.clip(rng.normal(-1.8, 0.5, size=(n_layers, 490)), edges[0], 0)
    return {"log10_edges": edges.tolist(), "counts": [np.histogram(row, edges)[0].tolist() for row in rates]}


def history_rows(n_layers: int, n_evaluations: int) -> list[dict]:
    """Training history that falls towards the values of `sae_rows`."""
    rows = []
    for step in np.linspace(50, 3000, n_evaluations).round().astype(int).tolist():
        for row in sae_rows(n_layers):
            left = float(np.exp(-step / 500))
            rows.append(
                {
                    "step": step,
                    "tokens": step * 1024,
                    "layer": row["layer"],
                    "l0": 8.0 + 3 * left,
                    "fvu": row["fvu"] + 0.6 * left,
                    "mse": row["mse"] * (1 + 9 * left),
                    "dead": row["dead"] + 0.3 * left * (1 - left),
                    "loss": row["mse"] * (1 + 9 * left) + 0.001,
                }
            )
    return rows


def predictions(n_answers: int) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Out-of-fold scores of the method and the baseline: calibrated and overconfident, two answers a group."""
    rng = np.random.default_rng(2)
    latent = rng.normal(size=n_answers)
    labels = (rng.uniform(size=n_answers) < 1 / (1 + np.exp(0.7 - 3 * latent))).astype(int)
    groups = np.arange(n_answers) // 2
    noisy = latent + 0.35 * rng.normal(size=n_answers)
    return {
        METHOD: (labels, 1 / (1 + np.exp(0.7 - 3 * latent)), groups),
        BASELINE: (labels, 1 / (1 + np.exp(0.5 - 5 * noisy)), groups),
    }


def example(label: int, n_layers: int, n_tracks: int) -> dict:
    """One answer with tracks of every length; some die, some coast over a layer, some live to the end."""
    rng = np.random.default_rng(3 + label)
    tracks = []
    for _ in range(n_tracks):
        birth = int(rng.integers(n_layers))
        last = int(rng.integers(birth, n_layers))
        layers = [layer for layer in range(birth, last + 1) if layer in (birth, last) or rng.uniform() > 0.15]
        tracks.append(
            {
                "birth": birth,
                "death": -1 if last == n_layers - 1 else last,
                "layers": layers,
                "features": rng.integers(512, size=len(layers)).tolist(),
                "activations": (rng.gamma(1.2, 2.0, size=len(layers)) * (1 + np.array(layers))).tolist(),
            }
        )
    question = "In which city was Talvo Merrin born?"
    return {
        "question": question,
        "answer": " Orsk" if label else " Belmora",
        "label": label,
        "expected": ["Belmora"],
        "score": 0.83 if label else 0.04,
        "tracks": tracks,
    }


def report_inputs(n_layers: int = 6, n_evaluations: int = 30, n_answers: int = 600) -> ReportInputs:
    """The inputs of a complete, good run."""
    phases = [
        ("extract", "done", 21.4, 310 * 2**20, 900 * 2**20, "262,144 tokens"),
        ("train", "done", 83.0, 19 * 2**20, 1400 * 2**20, ""),
        ("answer", "skipped", 30.9, 2 * 2**20, 700 * 2**20, "up to date"),
        ("track", "done", 9.3, 41 * 2**20, 800 * 2**20, ""),
        ("detect", "done", 44.2, 3 * 2**20, 650 * 2**20, "5 folds, 2 repeats"),
    ]
    keys = ("name", "status", "seconds", "output_bytes", "peak_bytes", "detail")
    kinds = (("often", 800, 4), ("seldom", 500, 420), ("never", 40, 560), ("misconception", 30, 570))
    return ReportInputs(
        config_name="demo",
        command="jaxsae run --config=configs/demo.py --workdir=runs/demo",
        created="2031-05-04T10:20:30+00:00",
        config={"seed": 0, "sae": {"k": 8, "n_latents": 512}, "questions": {"prompt": "Q: {question}\nA:"}},
        host={"machine": "x86_64", "cores": 2, "versions": {"jax": "0.10.2", "numpy": "2.4.6"}},
        model={"name": "demo_gpt2", "n_layers": n_layers, "d_model": 128, "n_vocab": 2711, "n_parameters": 1234567},
        sae_spec={
            "architecture": "topk",
            "n_latents": 512,
            "k": 8,
            "tokens": 3072000,
            "steps": 3000,
            "batch": 1024,
            "dead_tokens": 614400,
        },
        phases=[dict(zip(keys, phase, strict=True)) for phase in phases],
        sae=sae_rows(n_layers),
        held_out_tokens=65_536,
        density=density(n_layers),
        crowding_random=0.262,
        history=history_rows(n_layers, n_evaluations),
        detection=[detection_row(*detector) | CHOSEN.get(detector[0], {}) for detector in DETECTORS],
        canary={"auroc": 0.497, "ci_low": 0.472, "ci_high": 0.521},
        by_category=[
            {
                "detector": name,
                "category": category,
                "kind": "hallucinated here against all right answers",
                "n_right": 1370,
                "n_wrong": wrong,
                "auroc": auroc,
                "ci_low": auroc - 0.03,
                "ci_high": auroc + 0.03,
            }
            for name, auroc in ((METHOD, 0.91), (BASELINE, 0.86))
            for category, _, wrong in kinds
        ],
        differences=[
            {
                "name": "method - best_baseline",
                "difference": 0.028,
                "ci_low": 0.017,
                "ci_high": 0.0391,
                "definition": "the stack with tracks over the best of length and log-prob family",
            },
            {
                "name": "tracks over stack",
                "difference": 0.003,
                "ci_low": -0.0021,
                "ci_high": 0.0079,
                "definition": "(log-prob + probe + tracks) over (log-prob + probe)",
            },
        ],
        ablations=[
            {"family": family, "kind": kind, "difference": gain, "ci_low": gain - 0.004, "ci_high": gain + 0.004}
            for family, gains in (("prompt", (0.011, 0.007)), ("concepts", (0.001, -0.002)))
            for kind, gain in zip(("added", "removed"), gains, strict=True)
        ],
        curves=curve_rows(),
        counts={
            "rows": 2924,
            "groups": 1560,
            "right": 1370,
            "wrong": 1554,
            "empty": 3,
            "choices_tried": 61,
            "by_category": {name: {"right": right, "wrong": wrong} for name, right, wrong in kinds},
        },
        predictions=predictions(n_answers),
        method=METHOD,
        best_baseline=BASELINE,
        pass_difference="method - best_baseline",
        tracks_difference="tracks over stack",
        examples=[example(0, n_layers, 18), example(1, n_layers, 70)],
        disk_bytes={"activations": 310 * 2**20, "saes": 19 * 2**20, "features.npz": 41 * 2**20, "answers.jsonl": 2100},
        notes=["Position 0 is left out of the SAE measures."],
    )


@pytest.fixture
def make_inputs():
    """Build a complete run's inputs, with the given fields replaced."""

    def make(*, n_layers: int = 6, n_evaluations: int = 30, n_answers: int = 600, **changes) -> ReportInputs:
        return dataclasses.replace(report_inputs(n_layers, n_evaluations, n_answers), **changes)

    return make


@pytest.fixture(scope="session")
def complete_inputs() -> ReportInputs:
    """The inputs of a complete run, the same for every test."""
    return report_inputs()
