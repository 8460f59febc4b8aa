"""What a sweep tries: named settings, every combination of axes, or what a search proposes.

A trial is the run's config with some fields of `tracking` and `detection` changed. All trials share splits, seed and
resamples, so that their numbers differ by what was changed alone.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsae import config as settings
from jaxsae.artifacts import InputError, fingerprint
from jaxsae.config import RunConfig, SweepAxis, SweepRange, SweepSetting

SWEPT = ("tracking.", "detection.")
SHARED = (
    "detection.folds",
    "detection.repeats",
    "detection.split_by",
    "detection.bootstrap",
    "detection.curves",
)  # the same for all trials
DIGITS = 4  # of the numbers that a search proposes: they can be read, and tried again
START_TRIALS = 10  # drawn at random before a search goes by what it found; Optuna's default


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting to try: its name, the config with it, and what others reported for it."""

    name: str
    config: RunConfig
    changes: Mapping[str, Any]
    published: Mapping[str, float | int]
    is_reconstructed: bool
    is_named: bool

    @property
    def key(self) -> str:
        """Return a digest of the settings of `tracking` and `detection`; trials of equal keys are one."""
        return fingerprint(self.config.select("tracking", "detection"))

    @property
    def tracks_key(self) -> str:
        """Return a digest of what its tracks depend on."""
        return fingerprint(self.config.select("tracking"))


def make_trial(config: RunConfig, setting: SweepSetting, *, kept: Mapping[str, Any], is_named: bool = True) -> Trial:
    """Return the trial of a setting.

    Args:
        kept: the run's own features.keep and features.positions, by dotted name.
        is_named: the user named it; the names of others say what they change.

    Raises:
        InputError: the setting changes what no setting may, needs what the run did not keep, or is out of range.
    """
    for name in setting.changes:
        if not name.startswith(SWEPT) or name in SHARED:
            why = "is the same for all settings" if name in SHARED else "needs the features made again"
            raise InputError(
                f"setting {setting.name} changes {name}, which {why}; a sweep changes fields of tracking and detection"
            )
    asked = {**config.select("tracking"), **setting.changes}
    keep, positions = kept["features.keep"], tuple(kept["features.positions"])
    if isinstance(asked["tracking.top_k"], int) and asked["tracking.top_k"] > keep:
        raise InputError(
            f"setting {setting.name} tracks {asked['tracking.top_k']} latents a layer (tracking.top_k), the run kept "
            f"{keep}; run jaxsae track with --config.features.keep={asked['tracking.top_k']}, or lower it here"
        )
    if asked["tracking.position"] not in positions:
        raise InputError(
            f"setting {setting.name} tracks position {asked['tracking.position']}, the run kept "
            f"{', '.join(positions)}; run jaxsae track with it in features.positions, or leave it out here"
        )
    of_run = dataclasses.replace(config, features=settings.read_section(kept, "features"))
    try:
        changed = settings.change(of_run, setting.changes)
    except InputError as error:
        raise InputError(f"setting {setting.name}: {error}") from None
    return Trial(setting.name, changed, setting.changes, setting.published, setting.is_reconstructed, is_named)


def listed_trials(config: RunConfig, *, kept: Mapping[str, Any]) -> list[Trial]:
    """Return the named settings and, where nothing is searched, every combination of the axes, in their order.

    A combination that equals an earlier trial is left out.

    Raises:
        InputError: two settings have one name or are the same, an axis has no values or is a range without a search.
    """
    trials = [make_trial(config, setting, kept=kept) for setting in config.sweep.settings]
    by_name, by_key = {trial.name: trial for trial in trials}, {trial.key: trial for trial in trials}
    if len(by_name) < len(trials):
        raise InputError(f"sweep.settings has two settings of one name in {', '.join(t.name for t in trials)}")
    for trial in trials:
        if by_key[trial.key] is not trial:
            raise InputError(f"sweep.settings {trial.name} and {by_key[trial.key].name} set the same; leave one out")
    check_axes(config)
    if config.sweep.trials is None and config.sweep.axes:
        axes = [axis for axis in config.sweep.axes if isinstance(axis, SweepAxis)]
        for values in itertools.product(*(axis.values for axis in axes)):
            changes = {axis.name: value for axis, value in zip(axes, values, strict=True)}
            trial = propose_trial(config, changes, kept=kept)
            by_key.setdefault(trial.key, trial)
    if not by_key and config.sweep.trials is None:
        raise InputError("the config sweeps nothing; name settings in sweep.settings or axes in sweep.axes")
    return list(by_key.values())


def check_axes(config: RunConfig) -> None:
    """Raise InputError unless each axis has values, a name of its own and, if it is a range, a search."""
    names = [axis.name for axis in config.sweep.axes]
    for axis in config.sweep.axes:
        if names.count(axis.name) > 1:
            raise InputError(f"sweep.axes names {axis.name} twice; give all its values once")
        if isinstance(axis, SweepAxis) and not axis.values:
            raise InputError(f"the axis {axis.name} has no values; give some, or leave it out")
        if isinstance(axis, SweepRange) and config.sweep.trials is None:
            raise InputError(
                f"{axis.name} is a range, which a grid has no end of; set sweep.trials for a search, or give an axis"
            )
        if isinstance(axis, SweepRange) and not (axis.low < axis.high and (axis.low > 0 or not axis.is_log)):
            raise InputError(
                f"the range of {axis.name} is {axis.low} to {axis.high}, expected low below high"
                + (" and above 0 on a logarithmic scale" if axis.is_log else "")
            )
    if config.sweep.trials is not None and not names:
        raise InputError(f"sweep.trials is {config.sweep.trials} and sweep.axes is empty; say what the search varies")


def propose_trial(config: RunConfig, changes: Mapping[str, Any], *, kept: Mapping[str, Any]) -> Trial:
    """Return the trial of a point of the axes, named by them: "top_k=4, gate=after"; raises as `make_trial` does."""
    labels = {axis.name: axis.label for axis in config.sweep.axes}
    return make_trial(config, SweepSetting(name_of(changes, labels), changes), kept=kept, is_named=False)


def name_of(changes: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Return what is changed: "k=4, gate=after"."""
    return ", ".join(f"{label_of(name, labels)}={value}" for name, value in changes.items())


def label_of(name: str, labels: Mapping[str, str]) -> str:
    """Return a field's label, or its name without its section."""
    return labels.get(name) or name.partition(".")[2]


class Search:
    """A search for each outer fold of each repeat, each by what the inner validation of its fold alone has said.

    One search for all folds would have seen every label before the last proposal, and what it proposes would be a
    choice made on the rows that it is judged by. All searches start with the same `START_TRIALS` random trials; what
    they propose later depends on seed and values, and on nothing else.
    """

    def __init__(self, axes: Sequence[SweepAxis | SweepRange], *, n_searches: int, seed: int) -> None:
        """Start `n_searches` searches.

        Raises:
            InputError: Optuna is not installed.
        """
        optuna = _optuna()
        self.axes = axes
        self._distributions = {axis.name: _distribution(optuna, axis) for axis in axes}
        samplers = [optuna.samplers.TPESampler(seed=seed, n_startup_trials=START_TRIALS) for _ in range(n_searches)]
        self._studies = [optuna.create_study(direction="maximize", sampler=sampler) for sampler in samplers]
        self._asked: list[Any] = []

    def propose(self) -> list[dict[str, Any]]:
        """Return each search's next proposal, as changes by dotted name."""
        self._asked = [study.ask(self._distributions) for study in self._studies]
        return [{axis.name: _value(axis, trial.params[axis.name]) for axis in self.axes} for trial in self._asked]

    def learn(self, values: Sequence[float]) -> None:
        """Tell each search what its last proposal reached in the inner validation of its fold."""
        for study, trial, value in zip(self._studies, self._asked, values, strict=True):
            study.tell(trial, value)


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise InputError(
            "sweep.trials asks for a search, which needs Optuna: launch/install sweep; or unset it for a grid"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(optuna: Any, axis: SweepAxis | SweepRange) -> Any:
    if isinstance(axis, SweepAxis):  # by place, as Optuna takes no tuples
        return optuna.distributions.CategoricalDistribution(tuple(range(len(axis.values))))
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return optuna.distributions.IntDistribution(axis.low, axis.high, log=axis.is_log)
    return optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.is_log)


def _value(axis: SweepAxis | SweepRange, proposed: Any) -> Any:
    if isinstance(axis, SweepAxis):
        return axis.values[proposed]
    return (
        proposed if isinstance(proposed, int) else float(np.format_float_positional(proposed, DIGITS, fractional=False))
    )
