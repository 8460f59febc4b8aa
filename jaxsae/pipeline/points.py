"""One sweep of one run, and the file that each setting tried leaves: `sweep/NAME/points/KEY.npz`."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jaxsae import __version__, artifacts, detection
from jaxsae.artifacts import InputError
from jaxsae.config import RunConfig
from jaxsae.detection.sweep import Point
from jaxsae.detection.tracks import FAMILIES, FAMILY_DETECTORS
from jaxsae.pipeline.detect import protocol_of
from jaxsae.pipeline.families import PROMPT
from jaxsae.pipeline.trials import Trial

_NOT_FITTED = ("detection.bootstrap", "detection.curves")  # settings that no point depends on


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One sweep of one run.

    Attributes:
        inputs: sha256 of the files read.
        kept: what the run kept: the settings of its features, by dotted name.
    """

    config: RunConfig
    workdir: Path
    name: str
    inputs: dict[str, str]
    kept: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the outcome lies."""
        return self.workdir / "sweep" / self.name

    @property
    def protocol(self) -> detection.ProtocolConfig:
        """How detectors are judged, without what a setting changes."""
        return self.protocol_of(self.config)

    def protocol_of(self, config: RunConfig) -> detection.ProtocolConfig:
        """Return how a setting's detectors are fitted and judged; one thread each, as settings run side by side.

        Raises:
            InputError: a detector reads a family of features that the setting leaves out.
        """
        detectors, families = self.config.sweep.detectors, config.detection.families
        if PROMPT not in self.kept["features.positions"]:
            families = tuple(name for name in families if name != "prompt")
        for family in set(FAMILIES).difference(families):
            for name in set(FAMILY_DETECTORS[family]).intersection(detectors):
                raise InputError(
                    f"sweep.detectors names {name}, whose family {family} of features is left out; add it to "
                    "detection.families (prompt needs last_prompt among features.positions)"
                )
        return protocol_of(config, detectors=detectors, method=detectors[0], families=families, n_jobs=1)

    def identity(self, trial: Trial) -> dict[str, Any]:
        """Return what a point's numbers depend on."""
        fitted = trial.config.select("tracking", "detection", "seed")
        return {
            "settings": {name: value for name, value in fitted.items() if name not in _NOT_FITTED},
            "detectors": list(self.config.sweep.detectors),
            "inputs": self.inputs,
            "code_version": __version__,
        }

    def path(self, trial: Trial) -> Path:
        """Return where a trial's point lies."""
        return self.folder / "points" / f"{artifacts.fingerprint(self.identity(trial))[:16]}.npz"

    def write_point(self, trial: Trial, point: Point) -> None:
        """Write a trial's point with its identity."""
        identity = np.array(artifacts.fingerprint(self.identity(trial)))
        artifacts.write_npz(self.path(trial), {**point.arrays(), "identity": identity, "name": np.array(trial.name)})

    def read_point(self, trial: Trial) -> Point | None:
        """Return a trial's point, None where it has to be made: it is missing, damaged or of something else."""
        path = self.path(trial)
        if not path.exists():
            return None
        names = [field.name for field in dataclasses.fields(Point)]
        try:
            arrays = artifacts.read_npz(path, rebuild="it is made again", required=[*names, "identity"])
        except InputError as error:
            logging.warning("%s", error)
            return None
        if arrays["identity"].item() != artifacts.fingerprint(self.identity(trial)):
            return None
        return Point.from_arrays(arrays)
