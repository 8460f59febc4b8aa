"""Twelve settings of the tracker on the demo's answers, as a grid, beside the demo's own.

    jaxsae run --config=configs/demo.py --workdir=runs/demo
    jaxsae sweep --config=configs/sweeps/demo.py --workdir=runs/demo

The demo keeps 8 latents a layer, as many as its SAEs have active: settings track 3 or all of them. 2 min 36 s on 2 CPU
cores with other work. Expected: chosen inside validation, AUROC .490 [.470, .510], which is chance; the best of the 24
by the test rows shows .513, an optimism of .023 [.012, .046].
"""

from pathlib import Path

from jaxsae.config import SweepAxis, read


def get_config():
    config = read(Path(__file__).parents[1] / "demo.py")
    config.sweep.axes = (
        SweepAxis("tracking.top_k", (3, 8), "k"),
        SweepAxis("tracking.association_threshold", (0.3, 0.5, 0.8), "threshold"),
        SweepAxis("tracking.max_missed_layers", (0, 1), "missed"),
    )
    config.detection.trees = 50  # twice as fast as the published 100, and as good on 4,800 answers
    return config
