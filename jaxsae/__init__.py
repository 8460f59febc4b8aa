"""Sparse autoencoders for every layer of a language model at once, and what they say about its hallucinations.

Importing jaxsae loads nothing heavy: a submodule is imported when its name is first used.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = (
    "activations",
    "artifacts",
    "config",
    "data",
    "detection",
    "features",
    "models",
    "report",
    "sae",
    "tracking",
)

__all__ = ["Detector", "__version__", *_SUBMODULES]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"jaxsae.{name}")
    if name == "Detector":
        return importlib.import_module("jaxsae.pipeline.score").Detector
    raise AttributeError(f"module 'jaxsae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
