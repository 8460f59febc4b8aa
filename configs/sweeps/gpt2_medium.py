"""The published tuning grid of GhostTrack on GPT-2 medium: four settings of the tracker.

    jaxsae run --config=configs/sweeps/gpt2_medium.py --workdir=runs/gpt2_medium_sweep \
        --config.corpus.path=corpus.txt --config.questions.path=questions.jsonl
    jaxsae sweep --config=configs/sweeps/gpt2_medium.py --workdir=runs/gpt2_medium_sweep

or, on a run of configs/gpt2_medium_reference.py, whose features hold 50 latents where this needs 100,
`jaxsae track --config=configs/sweeps/gpt2_medium.py --workdir=DIR` first, which reads the answers again.

Published: k and the cost below which a pair matches (.4 is stricter than .5), AUROC, accuracy and F1 on 45 test rows.
The settings of relaxed_alignment were not published: its name says what was meant, the numbers are ours.
Not run here: the model's weights could not be had. With 1,000 answers expect about 10 s of tracking for each setting of
50 latents, four times that for 100, and 10 s for each forest.
"""

from pathlib import Path

from jaxsae.config import SweepSetting, read


def get_config():
    config = read(Path(__file__).parents[1] / "gpt2_medium_reference.py")
    config.features.keep = 100
    config.sweep.settings = (
        SweepSetting("baseline", _tracked(50, 0.5), {"auroc": 0.7122, "accuracy": 0.733, "f1": 0.57}),
        SweepSetting("high_precision", _tracked(30, 0.6), {"auroc": 0.6511, "accuracy": 0.689, "f1": 0.46}),
        SweepSetting("high_recall", _tracked(100, 0.4), {"auroc": 0.4389, "accuracy": 0.60, "f1": 0.25}),
        SweepSetting(
            "relaxed_alignment",
            {**_tracked(50, 0.8), "tracking.semantic_weight": 0.4},
            {"auroc": 0.4389, "accuracy": 0.511, "f1": 0.21},
            is_reconstructed=True,
        ),
    )
    config.sweep.published_rows = 45
    return config


def _tracked(top_k, threshold):
    return {"tracking.top_k": top_k, "tracking.association_threshold": threshold}
