"""Bad input through the command line: one line that names the file and the way out, exit 2, earlier results whole."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from jaxsae import artifacts
from jaxsae.artifacts import resolve_path
from jaxsae.pipeline import stages

ASSET = resolve_path("package://jaxsae/assets/demo_gpt2")


@pytest.fixture
def fresh(finished, tmp_path):
    """Return a run in a folder that does not exist yet."""
    return type(finished)(tmp_path / "fresh", finished.questions)


@pytest.fixture
def model(tmp_path):
    """Return a copy of the demo's language model to damage."""
    return shutil.copytree(ASSET, tmp_path / "model", ignore=shutil.ignore_patterns("corpus*", "questions*"))


def flip_byte(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def rewrite_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def rewrite_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CORPORA = {
    "empty.txt": (b"", r"the corpus .*empty\.txt holds no document: every line is empty"),
    "blank.txt": (b" \n\n\t\n", r"the corpus .*blank\.txt holds no document"),
    "bytes.txt": (
        b"One.\nTwo \xff three.\n",
        r"bytes\.txt line 2 is not valid UTF-8 \(byte 0xff at column 5\); convert",
    ),
    "short.txt": (b"Too short.\n", r"the corpus gives less than one context of 64 tokens; add text or lower corpus\."),
    "torn.txt.gz": (b"\x1f\x8b\x08\x00\x00", r"torn\.txt\.gz cannot be read after line 0: "),
    "fields.jsonl": (b'{"txt": "a"}\n', r'fields\.jsonl line 1: expected an object with a non-empty string "text"'),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken\.jsonl line 2 is not JSON"),
    "corpus.pdf": (b"%PDF", r"the corpus .*corpus\.pdf does not end in one of \.txt"),
}


@pytest.mark.parametrize("name", list(CORPORA))
def test_corpus_that_cannot_be_used__is_named(fresh, refuses, tmp_path, name):
    content, words = CORPORA[name]
    (tmp_path / name).write_bytes(content)
    refuses(fresh, "extract", words, corpus__path=tmp_path / name)
    assert not fresh.workdir.exists()


def test_corpus_that_is_missing__is_named(fresh, refuses, tmp_path):
    words = rf"corpus\.path {tmp_path}/nope\.txt does not exist"
    refuses(fresh, "extract", words, corpus__path=tmp_path / "nope.txt")
    refuses(fresh, "run", words, corpus__path=tmp_path / "nope.txt")
    words = r"neither corpus\.path nor corpus\.name is set; give the corpus to use"
    refuses(fresh, "extract", words, corpus__path="none")
    assert not fresh.workdir.exists()


def test_context_beyond_the_models__is_refused(fresh, refuses):
    words = r"corpus\.context is 128, but .*demo_gpt2 reads 64 tokens at most"
    refuses(fresh, "extract", words, corpus__context=128)
    assert not fresh.workdir.exists()


def test_store_beyond_the_disk__is_refused_before_the_first_write(fresh, refuses, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20 * 2**20))
    refuses(fresh, "extract", r"activations needs 24\.\d MiB.*20\.0 MiB")
    assert not fresh.workdir.exists()


def damage_missing_tensor(model):
    rewrite_tensors(model, lambda tensors: tensors.pop("transformer.h.3.mlp.c_fc.bias"))


def damage_shape(model):
    def change(tensors):
        tensors["transformer.h.3.mlp.c_fc.bias"] = tensors["transformer.h.3.mlp.c_fc.bias"][:-2]

    rewrite_tensors(model, change)


def damage_numbers(model):
    def change(tensors):
        tensors["transformer.ln_f.weight"][7] = np.nan

    rewrite_tensors(model, change)


def damage_tokenizer(model):
    """Take the last word from the model, not from the tokenizer."""
    n_vocab = json.loads((model / "config.json").read_text())["vocab_size"]

    def change(tensors):
        tensors["transformer.wte.weight"] = np.ascontiguousarray(tensors["transformer.wte.weight"][:-1])

    rewrite_tensors(model, change)
    rewrite_json(model / "config.json", vocab_size=n_vocab - 1)


MODELS = {
    "missing tensor": (damage_missing_tensor, r"model lacks tensor h\.3\.mlp\.c_fc\.bias, which its config\.json asks"),
    "wrong shape": (
        damage_shape,
        r"transformer\.h\.3\.mlp\.c_fc\.bias has shape \[510\], its config\.json asks for \[512\]",
    ),
    "not a number": (damage_numbers, r"transformer\.ln_f\.weight holds NaN or infinite values"),
    "truncated": (
        lambda model: os.truncate(model / "model.safetensors", 100_000),
        r"model\.safetensors is damaged or truncated",
    ),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), r"model holds no model\.safetensors"),
    "no config": (lambda model: (model / "config.json").unlink(), r"config\.json is missing; a model folder holds"),
    "another family": (
        lambda model: rewrite_json(model / "config.json", model_type="mamba"),
        r"model_type = 'mamba' is not supported",
    ),
    "no tokenizer": (
        lambda model: [path.unlink() for path in model.glob("tokenizer*")],
        r"model has no tokenizer files; text cannot be read without tokenizer\.json",
    ),
    "torn tokenizer": (
        lambda model: os.truncate(model / "tokenizer.json", 1000),
        r"model: the tokenizer cannot be read",
    ),
    "another tokenizer": (
        damage_tokenizer,
        r"model: the tokenizer does not fit: its largest id is (\d+), the model's \d+",
    ),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_model_folder_that_cannot_be_used__is_named(fresh, refuses, model, name):
    damage, words = MODELS[name]
    damage(model)
    refuses(fresh, "extract", words, model__path=model)
    assert not fresh.workdir.exists()


def test_model_whose_residuals_overflow__is_named_with_layer(fresh, refuses, model):
    def change(tensors):
        tensors["transformer.h.2.mlp.c_proj.bias"][:] = 3e38
        tensors["transformer.h.3.mlp.c_proj.bias"][:] = 3e38

    rewrite_tensors(model, change)
    words = r"the residual stream of demo_gpt2 is NaN or infinite after layer 3 in context 0 \(shard 0\)"
    refuses(fresh, "extract", words, model__path=model)


QUESTIONS = {
    "duplicate id": (
        lambda rows: rows[2].update(id=rows[0]["id"]),
        r"questions\.jsonl line 3 repeats the id '.*' of line 1; ids must differ",
    ),
    "no group": (lambda rows: rows[1].pop("group"), r"questions\.jsonl line 2 lacks the field 'group'; it has id,"),
    "no answers": (lambda rows: rows[1].update(answers=[]), r"questions\.jsonl line 2: 'answers' is empty"),
    "answer of marks": (lambda rows: rows[3].update(answers=["?!"]), r"line 4: the answer '\?!' holds no letter"),
    "number for text": (lambda rows: rows[1].update(question=3), r"line 2: 'question' must be a string, got 3"),
    "none": (lambda rows: rows.clear(), r"questions\.jsonl holds no question"),
}


@pytest.mark.parametrize("name", list(QUESTIONS))
def test_questions_that_cannot_be_used__are_named(fresh, refuses, tmp_path, name):
    change, words = QUESTIONS[name]
    rows = [json.loads(line) for line in fresh.questions.read_text().splitlines()[:5]]
    change(rows)
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refuses(fresh, "answer", words, questions__path=path)
    assert not fresh.workdir.exists()


def test_prompt_beyond_the_context__is_named(fresh, refuses):
    words = r"question \S+ has \d+ tokens in its prompt; with questions\.max_new_tokens 8 that is more than the 64 that"
    refuses(fresh, "answer", words, questions__prompt="a b c d " * 20 + "{question}")
    assert not fresh.workdir.exists()


def test_prompt_without_a_place_for_the_question__is_refused(fresh, refuses):
    refuses(fresh, "answer", r"questions\.prompt must hold \{question\}, got 'Hello'", questions__prompt="Hello")
    assert not fresh.workdir.exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", r"fresh/activations/meta\.json is missing: run jaxsae extract"),
        ("track", r"fresh/answers\.jsonl is missing: run jaxsae answer"),
        ("detect", r"fresh/answers\.jsonl is missing: run jaxsae answer"),
        ("evaluate", r"fresh/metrics\.json is missing: run jaxsae detect"),
    ],
)
def test_stage_whose_input_is_missing__names_the_stage_to_run(fresh, refuses, command, words):
    refuses(fresh, command, words)
    assert not fresh.workdir.exists()


def test_store_that_lacks_shards__is_refused_and_the_way_out_works(finished, refuses, tmp_path, capsys):
    run = finished.copy(tmp_path / "run", without=("train", "answer", "track", "detect", "evaluate"))
    shard = run.workdir / "activations" / "resid.zarr" / "c" / "0" / "2" / "0"
    done, whole = run.workdir / "activations" / "done" / "2.json", shard.read_bytes()
    shard.unlink()
    refuses(run, "train", r"activations lacks 1 of 4 shards \(first 2\); run jaxsae extract")
    shard.write_bytes(whole[:500] + b"\0\1\2\3" + whole[504:])
    words = rf"{shard} is damaged \(.*; delete {done} if it exists and run jaxsae extract: it computes only what is mis"
    refuses(run, "train", words)
    done.unlink()
    assert run("extract") == 0
    assert shard.read_bytes() == whole
    assert run("extract", "--dry-run") == 0
    assert capsys.readouterr().out == "extract: up to date\n"


def test_meta_of_the_store_that_was_changed__is_named(finished, refuses, tmp_path):
    run = finished.copy(tmp_path / "run", without=("train", "answer", "track", "detect", "evaluate"))
    rewrite_json(run.workdir / "activations" / "meta.json", n_layers=5)
    words = r"meta\.json is damaged: its sha256 does not match its content; remove .*activations and run jaxsae extract"
    refuses(run, "train", words)


@pytest.fixture(scope="module")
def tracked(finished, tmp_path_factory):
    """A run up to the tracks; the tests that damage it put things back."""
    return finished.copy(tmp_path_factory.mktemp("tracked") / "run", without=("track", "detect", "evaluate"))


def test_checkpoint_file_that_was_changed__is_named_and_the_way_out_works(tracked, refuses, caplog):
    caplog.set_level("INFO", logger="absl")
    folder = tracked.workdir / "saes" / "checkpoints" / "80"
    path = next(path for path in sorted((folder / "best").rglob("*")) if path.name == "3.0.0")
    whole = path.read_bytes()
    flip_byte(path, len(whole) // 2)
    manifest = tracked.workdir / "saes" / "manifests" / "80.json"
    way_out = f"delete {folder} and {manifest}, then run jaxsae train again: it goes on from step 60"
    refuses(tracked, "track", rf"{path} is damaged \(its sha256 is not the manifest's\); {way_out}")
    path.unlink()
    refuses(tracked, "track", rf"{path} is missing; {way_out}")
    shutil.rmtree(folder)
    manifest.unlink()
    evaluation = tracked.workdir / "saes" / "evaluation.json"
    measured = evaluation.read_bytes()
    assert tracked("train") == 0
    assert "from step 60" in caplog.text
    assert path.read_bytes() == whole
    assert evaluation.read_bytes() == measured


def test_suite_without_a_description__is_named(tracked, refuses):
    path = tracked.workdir / "saes" / "suite.json"
    whole = path.read_text()
    path.write_text("{")
    refuses(tracked, "track", r"suite\.json is not readable JSON \(.*\); run jaxsae train")
    path.write_text(whole)


@pytest.mark.parametrize(
    ("file", "command", "words"),
    [
        (
            "answers.jsonl",
            "detect",
            r"answers\.jsonl line \d+ (is not readable JSON|lacks).*; run jaxsae answer( --redo)?$",
        ),
        ("features.npz", "detect", r"features\.npz is damaged at \w+ \(.*\); run jaxsae track$"),
        ("tracks.npz", "detect", r"tracks\.npz is damaged at \w+ \(.*\); run jaxsae track$"),
        ("metrics.json", "evaluate", r"metrics\.json is not readable JSON \(.*\); run jaxsae detect$"),
        ("predictions.csv", "evaluate", r"predictions\.csv is damaged \(.*\); run jaxsae detect$"),
        ("saes/evaluation.json", "evaluate", r"evaluation\.json is not readable JSON \(.*\); run jaxsae train$"),
        ("manifests/detect.json", "detect", r"detect\.json is not readable JSON .*; delete it and run jaxsae detect$"),
    ],
)
def test_file_that_was_changed__is_named_with_the_stage_to_run(finished, refuses, tmp_path, file, command, words):
    run = finished.copy(tmp_path / "run")
    flip_byte(run.workdir / file, (run.workdir / file).stat().st_size // 2)
    refuses(run, command, words)


def test_tracks_of_other_answers__are_refused(finished, refuses, tmp_path):
    run = finished.copy(tmp_path / "run", without=("detect", "evaluate"))
    path = run.workdir / "tracks.npz"
    arrays = artifacts.read_npz(path, rebuild="")
    artifacts.write_npz(path, arrays | {"ids": arrays["ids"][::-1]})
    refuses(run, "detect", r"tracks\.npz and features\.npz are of different answers; run jaxsae track")


@pytest.mark.parametrize(("label", "words"), [(0, "0 hallucinated and 240 right"), (1, "240 hallucinated and 0 right")])
def test_answers_of_one_class__are_refused(finished, refuses, tmp_path, label, words):
    run = finished.copy(tmp_path / "run", without=("detect", "evaluate"))
    path = run.workdir / "answers.jsonl"
    path.write_text(re.sub(r'"label": [01]', f'"label": {label}', path.read_text()))
    refuses(run, "detect", rf"detection needs answers of both kinds, got {words} in 240; add questions of which")


def fail_to_replace(monkeypatch, number):
    """Let the last step of writing tracks.npz fail; nothing else is written before it."""
    replace = os.replace

    def fail(source, target):
        if str(target).endswith("tracks.npz"):
            raise OSError(number, os.strerror(number), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)


def test_disk_that_is_full__ends_in_one_line_and_leaves_earlier_results(finished, refuses, tmp_path, monkeypatch):
    run = finished.copy(tmp_path / "run")
    fail_to_replace(monkeypatch, errno.ENOSPC)
    words = r"No space left on device: '.*tracks\.npz'; what was finished before is whole: free some space and run the"
    refuses(run, "track", words, tracking__gate="after")
    refuses(run, "run", words, tracking__gate="after")


def test_other_errors_of_the_system__are_no_full_disk(finished, tmp_path, monkeypatch):
    run = finished.copy(tmp_path / "run")
    fail_to_replace(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        run("track", tracking__gate="after")


def write_lock(workdir, **content):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / ".lock").write_text(json.dumps(content))


def test_lock_of_a_living_process__is_respected_and_named(fresh, capsys):
    write_lock(fresh.workdir, host=socket.gethostname(), pid=os.getppid())
    assert fresh("extract") == 2
    line = capsys.readouterr().err
    words = rf"{fresh.workdir} is in use by process {os.getppid()} on {socket.gethostname()}; wait for it, or delete"
    assert re.search(words, line)
    assert [path.name for path in fresh.workdir.iterdir()] == [".lock"]


def test_lock_of_another_host__is_respected_and_named(fresh, capsys):
    write_lock(fresh.workdir, host="node17", pid=2**22 + 1)
    assert fresh("extract") == 2
    assert f"is in use by process {2**22 + 1} on node17; wait for it" in capsys.readouterr().err
    assert (fresh.workdir / ".lock").exists()


def test_lock_that_names_nobody__is_respected(fresh, capsys):
    fresh.workdir.mkdir()
    (fresh.workdir / ".lock").write_text("")
    assert fresh("extract") == 2
    assert re.search(
        rf"{fresh.workdir}/\.lock cannot be read; if no jaxsae runs in .*, delete it", capsys.readouterr().err
    )


def test_lock_of_a_dead_process__is_named_and_taken_over(tmp_path, caplog):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(20)
    write_lock(tmp_path, host=socket.gethostname(), pid=process.pid)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".file.123.partial").write_text("half")
    with stages.lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "deep"]
    assert f".lock was left by process {process.pid}, which is gone; taking it over" in caplog.text
    assert not any((tmp_path / "deep").iterdir())
    assert not (tmp_path / ".lock").exists()


def test_lock__leaves_no_empty_folder(tmp_path):
    with stages.lock(tmp_path / "new"):
        assert (tmp_path / "new" / ".lock").exists()
    assert not any(tmp_path.iterdir())
