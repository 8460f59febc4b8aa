"""A run that streams its activations: the same pipeline without a store, and exact after an interruption."""

import json
import os
import signal

import numpy as np
import pytest

from jaxsae.pipeline.stages import STAGES
from jaxsae.sae.train import Trainer

STREAM = {"activations__source": "stream"}
ITEMS = ("best", "last", "train")


def train(run, **changes):
    return run("train", **STREAM, **changes)


@pytest.fixture(scope="module")
def streamed(finished, tmp_path_factory):
    run = type(finished)(tmp_path_factory.mktemp("streamed") / "run", finished.questions)
    assert train(run) == 0
    return run


def arrays(run):
    """Return the bytes of the last checkpoint's arrays."""
    folder = run.workdir / "saes" / "checkpoints" / "80"
    files = (path for item in ITEMS for path in (folder / item).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name[0].isdigit()}


def fvu(run):
    rows = json.loads((run.workdir / "saes" / "evaluation.json").read_text())["rows"]
    return np.array([row["fvu"] for row in rows])


def test_stream__writes_no_activations_and_measures_saes_as_good_as_the_store_s(finished, streamed):
    assert sorted(path.name for path in streamed.workdir.iterdir()) == ["logs", "manifests", "saes"]
    np.testing.assert_allclose(fvu(streamed), fvu(finished), rtol=0.1)
    about = json.loads((streamed.workdir / "saes" / "suite.json").read_text())
    of_store = json.loads((finished.workdir / "saes" / "suite.json").read_text())
    assert about["corpus_fingerprint"] == of_store["corpus_fingerprint"]
    assert about["settings"]["activations.source"] == "stream"


class Killed(BaseException):
    """What ends the run at once: nothing is saved any more."""


def signal_itself():
    os.kill(os.getpid(), signal.SIGTERM)


def die():
    raise Killed


def test_stream__interrupted_and_then_killed_between_checkpoints__ends_bit_for_bit_the_same(
    streamed, tmp_path, monkeypatch
):
    run, advance = type(streamed)(tmp_path / "run", streamed.questions), Trainer._advance

    def at(step, act):
        monkeypatch.setattr(Trainer, "_advance", lambda self: (self.step == step and act(), advance(self)))

    at(33, signal_itself)
    assert train(run) == 143
    assert saved_steps(run) == [20, 34]
    at(50, die)
    with pytest.raises(Killed):
        train(run)
    assert saved_steps(run) == [34, 40]
    (run.workdir / ".lock").unlink(missing_ok=True)
    monkeypatch.setattr(Trainer, "_advance", advance)
    assert train(run) == 0
    assert arrays(run) == arrays(streamed)


def saved_steps(run):
    return sorted(int(path.stem) for path in (run.workdir / "saes" / "manifests").iterdir())


def test_run__while_streaming__has_no_extract(finished, streamed, capsys):
    assert streamed("run", "--dry-run", **STREAM) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [name for name in STAGES if name != "extract"]
    assert lines[0] == "train: up to date"


def test_extract__while_streaming__says_that_there_is_nothing_to_extract(streamed, refuses):
    refuses(streamed, "extract", r"activations\.source is stream: nothing to extract", **STREAM)


@pytest.mark.parametrize(
    "changes",
    [{"corpus__n_tokens": 8192}, {"activations__replace": 0.25}, {"train__buffer_tokens": 2048}],
    ids=lambda changes: next(iter(changes)),
)
def test_train__on_another_stream_is_refused(streamed, refuses, changes):
    refuses(streamed, "train", r"was made by another train: .*use a new --workdir", **STREAM, **changes)
