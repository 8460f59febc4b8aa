"""What a sweep tries: settings, grids and searches, and what it refuses before anything runs."""

import sys
from pathlib import Path

import pytest

from jaxsae import config as settings
from jaxsae.artifacts import InputError
from jaxsae.config import SweepAxis, SweepRange, SweepSetting
from jaxsae.pipeline.trials import START_TRIALS, Search, check_axes, listed_trials, name_of

CONFIGS = Path(__file__).parents[2] / "configs"
KEPT = {"features.keep": 8, "features.positions": ["last_prompt", "last_answer"]}
TOP_K, THRESHOLD, GATE = "tracking.top_k", "tracking.association_threshold", "tracking.gate"


def resolve(**sweep):
    config = settings.read(CONFIGS / "demo.py")
    for name, value in sweep.items():
        config.sweep[name] = value
    return settings.resolve(config)


def trials(*, kept=KEPT, **sweep):
    return listed_trials(resolve(**sweep), kept=kept)


def test_named_settings__change_what_they_say_and_nothing_else():
    found = trials(settings=(SweepSetting("as it is"), SweepSetting("few", {TOP_K: 3, GATE: "after"})))
    assert [trial.name for trial in found] == ["as it is", "few"]
    plain, few = (trial.config.flat() for trial in found)
    assert {name for name in plain if plain[name] != few[name]} == {TOP_K, GATE}
    assert (few[TOP_K], few[GATE]) == (3, "after")


def test_grid__is_every_combination_once_and_in_order():
    found = trials(axes=(SweepAxis(TOP_K, (3, 8)), SweepAxis(GATE, ("before", "after"))))
    assert [(trial.config.tracking.top_k, trial.config.tracking.gate) for trial in found] == [
        (3, "before"),
        (3, "after"),
        (8, "before"),
        (8, "after"),
    ]
    assert found[1].name == "top_k=3, gate=after"
    assert len({trial.key for trial in found}) == 4
    assert len({trial.tracks_key for trial in found}) == 4


def test_grid__beside_named_settings_leaves_out_what_these_try():
    found = trials(settings=(SweepSetting("mine", {TOP_K: 3}),), axes=(SweepAxis(TOP_K, (3, 5)),))
    assert [trial.name for trial in found] == ["mine", "top_k=5"]


def test_settings__of_detection_share_their_tracks():
    one, other = trials(axes=(SweepAxis("detection.trees", (10, 20)),))
    assert one.tracks_key == other.tracks_key
    assert one.key != other.key


REFUSED = {
    "more latents than kept": (
        {"settings": (SweepSetting("wide", {TOP_K: 9}),)},
        r"setting wide tracks 9 latents a layer \(tracking\.top_k\), the run kept 8; run jaxsae track with "
        r"--config\.features\.keep=9, or lower it here",
    ),
    "a position not kept": (
        {"settings": (SweepSetting("first", {"tracking.position": "first_answer"}),)},
        "setting first tracks position first_answer, the run kept last_prompt, last_answer; run jaxsae track with it",
    ),
    "another model": (
        {"settings": (SweepSetting("big", {"model.name": "gpt2"}),)},
        "setting big changes model.name, which needs the features made again; a sweep changes fields of tracking and",
    ),
    "other folds": (
        {"settings": (SweepSetting("ten", {"detection.folds": 10}),)},
        "setting ten changes detection.folds, which is the same for all settings",
    ),
    "no field": (
        {"settings": (SweepSetting("typo", {"tracking.topk": 3}),)},
        "setting typo: tracking.topk is no setting; the nearest is tracking.top_k",
    ),
    "a wrong type": (
        {"settings": (SweepSetting("text", {TOP_K: "3"}),)},
        "setting text: tracking.top_k is '3', expected int",
    ),
    "a truth for a number": ({"axes": (SweepAxis(THRESHOLD, (True,)),)}, "threshold is True, expected float"),
    "a wrong choice": ({"axes": (SweepAxis(GATE, ("never",)),)}, "tracking.gate is 'never', expected one of before"),
    "out of range": ({"axes": (SweepAxis(TOP_K, (0,)),)}, "tracking.top_k is 0, expected at least 1"),
    "one name twice": (
        {"settings": (SweepSetting("a", {TOP_K: 3}), SweepSetting("a", {TOP_K: 4}))},
        "two settings of one name in a, a",
    ),
    "one setting twice": (
        {"settings": (SweepSetting("a", {TOP_K: 3}), SweepSetting("b", {TOP_K: 3}))},
        "sweep.settings a and b set the same; leave one out",
    ),
    "one axis twice": ({"axes": (SweepAxis(TOP_K, (3,)), SweepAxis(TOP_K, (4,)))}, "names tracking.top_k twice"),
    "an empty axis": ({"axes": (SweepAxis(TOP_K, ()),)}, "the axis tracking.top_k has no values"),
    "a range in a grid": ({"axes": (SweepRange(TOP_K, 3, 8),)}, "tracking.top_k is a range, which a grid has no end"),
    "a range upside down": (
        {"axes": (SweepRange(TOP_K, 8, 3),), "trials": 4},
        "the range of tracking.top_k is 8 to 3, expected low below high",
    ),
    "a logarithm of nothing": (
        {"axes": (SweepRange(THRESHOLD, 0.0, 1.0, is_log=True),), "trials": 4},
        "is 0.0 to 1.0, expected low below high and above 0 on a logarithmic scale",
    ),
    "nothing": ({}, "the config sweeps nothing; name settings in sweep.settings or axes in sweep.axes"),
    "a search of nothing": ({"trials": 3}, "sweep.trials is 3 and sweep.axes is empty; say what the search varies"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_trials__refuse_in_one_line(case):
    sweep, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as error:
        trials(**sweep)
    assert "\n" not in str(error.value)


def test_published_grids__have_the_published_settings_and_mark_the_others():
    published = {
        "gpt2_medium": {"baseline": (50, 0.5), "high_precision": (30, 0.6), "high_recall": (100, 0.4)},
        "phi2": {"baseline": (50, 0.5), "sensitive": (100, 0.3), "ultra_sensitive": (200, 0.2)},
    }
    auroc = {
        "gpt2_medium": {
            "baseline": 0.7122,
            "high_precision": 0.6511,
            "high_recall": 0.4389,
            "relaxed_alignment": 0.4389,
        },
        "phi2": {"baseline": 0.6735, "sensitive": 0.6957, "high_specificity": 0.6205, "ultra_sensitive": 0.6686},
    }
    for name, grid in published.items():
        config = settings.resolve(settings.read(CONFIGS / "sweeps" / f"{name}.py"))
        found = listed_trials(config, kept=config.select("features"))
        set_by_us = {trial.name for trial in found if trial.is_reconstructed}
        assert {t.name: (t.changes[TOP_K], t.changes[THRESHOLD]) for t in found if t.name in grid} == grid
        assert {trial.name: trial.published["auroc"] for trial in found} == auroc[name]
        assert set_by_us == set(auroc[name]) - set(grid)
        assert found[0].key == resolve_key(config)  # the baseline is the config as it is


def resolve_key(config):
    return listed_trials(settings_with(config, SweepSetting("as it is")), kept=config.select("features"))[0].key


def settings_with(config, setting):
    return settings.change(config, {"sweep.settings": (setting,)})


def test_demo_sweep__needs_no_more_than_the_demo_keeps():
    config = settings.resolve(settings.read(CONFIGS / "sweeps" / "demo.py"))
    assert len(listed_trials(config, kept=config.select("features"))) == 12


def test_search__without_optuna_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match="needs Optuna: launch/install sweep; or unset it for a grid"):
        Search((SweepAxis(TOP_K, (3, 8)),), n_searches=1, seed=0)


AXES = (SweepAxis(GATE, ("before", "after")), SweepRange(TOP_K, 1, 8), SweepRange(THRESHOLD, 0.1, 1.0, is_log=True))


def proposals(values, *, seed=0, rounds=START_TRIALS + 6):
    """Return what searches propose, each told `values[search](changes)`."""
    search = Search(AXES, n_searches=len(values), seed=seed)
    found = []
    for _ in range(rounds):
        found.append(search.propose())
        search.learn([float(value(changes)) for value, changes in zip(values, found[-1], strict=True)])
    return found


def test_search__depends_on_seed_and_values_alone_and_each_on_its_own():
    pytest.importorskip("optuna")
    wide, narrow = (lambda changes: changes[TOP_K]), (lambda changes: -changes[TOP_K])
    first = proposals([wide, narrow])
    assert first == proposals([wide, narrow])
    assert [row[0] for row in first] == [
        row[0] for row in proposals([wide, wide])
    ]  # what the other is told is no matter
    assert first != proposals([wide, narrow], seed=1)
    assert [row[0] == row[1] for row in first[:START_TRIALS]] == [True] * START_TRIALS
    assert first[START_TRIALS:] != [row[::-1] for row in first[START_TRIALS:]]


def test_search__goes_where_values_are_high_and_proposes_numbers_that_can_be_read():
    pytest.importorskip("optuna")
    found = [row[0] for row in proposals([lambda changes: -abs(changes[THRESHOLD] - 0.4)], rounds=40)]
    late = [abs(changes[THRESHOLD] - 0.4) for changes in found[-10:]]
    early = [abs(changes[THRESHOLD] - 0.4) for changes in found[:START_TRIALS]]
    assert sum(late) / len(late) < sum(early) / len(early) / 2
    for changes in found:
        assert changes[GATE] in ("before", "after")
        assert 1 <= changes[TOP_K] <= 8
        assert 0.1 <= changes[THRESHOLD] <= 1
        assert len(str(changes[THRESHOLD]).replace("0.", "").strip("0")) <= 4
    assert name_of(found[0], {TOP_K: "k"}).startswith(f"gate={found[0][GATE]}, k={found[0][TOP_K]}, association_thr")


def test_axes__of_a_search_may_be_ranges():
    check_axes(resolve(axes=AXES, trials=3))
