"""How detectors are fitted and judged: the settings of `evaluate` and `fit_detector`."""

import dataclasses
from collections.abc import Sequence

from jaxsae.artifacts import InputError
from jaxsae.detection import statistics
from jaxsae.detection.baselines import DETECTORS, STACKS, TEXT_DETECTORS, parts_of
from jaxsae.detection.nesting import INNER
from jaxsae.detection.specs import Settings
from jaxsae.detection.tracks import CONTROLS, FAMILIES, FAMILY_DETECTORS, METHOD, method_choices


@dataclasses.dataclass(frozen=True)
class ProtocolConfig:
    """How detectors are fitted and judged.

    Attributes:
        folds: outer folds.
        inner: the inner folds of an outer one: its two "neighbours", or "all" others (twice the fits, worth it for a
            few hundred rows).
        repeats: times the rows are split anew.
        bootstrap: resamples of groups behind every interval, and permutations of labels behind every p-value.
        seed: of splits, forests, noise and resamples; the same seed gives the same numbers to the last bit.
        method: the detector that is compared with the best of length and the log-prob family; tracks_best is the
            classifier on track features that inner validation chooses.
        deploy: the detector that `fit_detector` fits; it may read neither text alone nor a control.
        detectors: what is reported, as far as its families of track features are among `families`.
        families: of track features that the method may choose and the stack with tracks reads: "metrics", "prompt",
            "profiles", "concepts", "late_births". The detectors of a family that is left out are not made.
        curves: those of them whose AUROC is also measured with fewer and with wrong labels; no stacks.
        sae_position: the kept position whose latents the SAE detectors read, or "max" over all of them.
        sae_penalty: their L1 penalty and that of the concepts' detector, as a fraction of the universal threshold.
        probe_c: inverse L2 penalties of the residual probes on standardised inputs, chosen between by inner validation.
        trees: of the reference forest; 100 in the published one.
        threshold: what the decision threshold makes largest in inner validation: "youden", "f1" or "accuracy".
        n_jobs: threads, -1 for one per core; no number depends on it.

    Raises:
        InputError: a value is out of its range.
    """

    folds: int = 5
    inner: str = "neighbours"
    repeats: int = 3
    bootstrap: int = 2000
    seed: int = 0
    method: str = METHOD
    deploy: str = "stack_tracks"
    detectors: tuple[str, ...] = DETECTORS
    families: tuple[str, ...] = FAMILIES
    curves: tuple[str, ...] = ()
    sae_position: str = "max"
    sae_penalty: float = 0.5
    probe_c: tuple[float, ...] = (0.001, 0.03)
    trees: int = 100
    threshold: str = "youden"
    n_jobs: int = -1

    def __post_init__(self) -> None:
        smallest = {"folds": 3, "repeats": 1, "bootstrap": 1, "seed": 0, "trees": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise InputError(f"detection.{name} is {getattr(self, name)}, expected at least {least}")
        if self.n_jobs < 1 and self.n_jobs != -1:
            raise InputError(f"detection.n_jobs is {self.n_jobs}, expected at least 1, or -1 for one per core")
        if not self.probe_c or min(self.probe_c) <= 0:
            raise InputError(f"detection.probe_c is {self.probe_c}, expected one or more numbers above 0")
        if self.sae_penalty <= 0:
            raise InputError(f"detection.sae_penalty is {self.sae_penalty}, expected a number above 0")
        _check_name("inner", self.inner, INNER)
        _check_name("threshold", self.threshold, statistics.THRESHOLDS)
        for name in self.detectors:
            _check_name("detectors", name, DETECTORS)
        for name in self.families:
            _check_name("families", name, FAMILIES)
        if not method_choices(self.families):
            raise InputError("detection.families is empty, expected one or more of " + ", ".join(FAMILIES))
        for name in self.curves:
            _check_name("curves", name, [name for name in self.judged if name not in STACKS])
        _check_name("method", self.method, self.judged)
        deployable = [name for name in self._made if name not in (*TEXT_DETECTORS, *CONTROLS)]
        _check_name("deploy", self.deploy, deployable)

    @property
    def settings(self) -> Settings:
        """Return what the estimators are made with."""
        families = tuple(name for name in FAMILIES if name in self.families)
        return Settings(
            self.trees, tuple(self.probe_c), self.sae_penalty, self.sae_position, families=families, seed=self.seed
        )

    @property
    def _made(self) -> tuple[str, ...]:
        """Name the detectors but for those of families that are left out."""
        left_out = {name for family in FAMILIES if family not in self.families for name in FAMILY_DETECTORS[family]}
        return tuple(name for name in DETECTORS if name not in left_out)

    @property
    def judged(self) -> tuple[str, ...]:
        """Name the detectors that are reported, in the order of `DETECTORS`."""
        return tuple(name for name in self._made if name in self.detectors)

    @property
    def parts(self) -> tuple[str, ...]:
        """Name the detectors that are no stack and have to be fitted, for their own sake or for a stack's."""
        wanted = {part for name in self.judged for part in parts_of(name, self.families)}
        return tuple(name for name in DETECTORS if name in wanted)


def _check_name(field: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(f"detection.{field} is {name!r}, expected one of {', '.join(known)}")
