"""Learn which answers are hallucinated, and judge every way of telling on the same terms.

In: the answers with labels, their features and track metrics, as NumPy. Out: a table of detectors with intervals, the
predictions behind it, and one fitted detector. No language model, SAE or jax here, and nothing is written but by
`FittedDetector.save`.
"""

from jaxsae.detection.baselines import DETECTORS
from jaxsae.detection.config import ProtocolConfig
from jaxsae.detection.detector import FittedDetector, fit_detector
from jaxsae.detection.protocol import Results, evaluate
from jaxsae.detection.tables import Family, Tables, build_tables
from jaxsae.detection.tidy import tidy

__all__ = [
    "DETECTORS",
    "Family",
    "FittedDetector",
    "ProtocolConfig",
    "Results",
    "Tables",
    "build_tables",
    "evaluate",
    "fit_detector",
    "tidy",
]
