"""The published tuning grid of GhostTrack on Phi-2: four settings of the tracker.

    jaxsae run --config=configs/sweeps/phi2.py --workdir=runs/phi2_sweep \
        --config.corpus.path=corpus.txt --config.questions.path=questions.jsonl
    jaxsae sweep --config=configs/sweeps/phi2.py --workdir=runs/phi2_sweep

or, on a run of configs/phi2.py, whose features hold 50 latents where this needs 200,
`jaxsae track --config=configs/sweeps/phi2.py --workdir=DIR` first, which reads the answers again.

Published: k and the cost below which a pair matches (.2 is stricter than .5), AUROC and accuracy. The number of test
rows was not: all accuracies are multiples of 1/150. The settings of high_specificity were not published either: its
name says what was meant, the numbers are ours.
Not run here: the model's weights could not be had. With 1,000 answers expect about 15 s of tracking for 50 latents, and
four and sixteen times that for 100 and 200.
"""

from pathlib import Path

from jaxsae.config import SweepSetting, read


def get_config():
    config = read(Path(__file__).parents[1] / "phi2.py")
    config.features.keep = 200
    config.sweep.settings = (
        SweepSetting("baseline", _tracked(50, 0.5), {"auroc": 0.6735, "accuracy": 0.70}),
        SweepSetting("sensitive", _tracked(100, 0.3), {"auroc": 0.6957, "accuracy": 0.66}),
        SweepSetting(
            "high_specificity",
            {**_tracked(30, 0.6), "tracking.birth_threshold": 1.0},
            {"auroc": 0.6205, "accuracy": 0.653},
            is_reconstructed=True,
        ),
        SweepSetting("ultra_sensitive", _tracked(200, 0.2), {"auroc": 0.6686, "accuracy": 0.653}),
    )
    config.sweep.published_rows = 150
    return config


def _tracked(top_k, threshold):
    return {"tracking.top_k": top_k, "tracking.association_threshold": threshold}
