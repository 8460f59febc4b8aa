"""`jaxsae export` and `jaxsae import`: a suite goes out and comes back; a run goes on with SAEs it did not train."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxsae import artifacts, cli, sae
from jaxsae.artifacts import InputError
from jaxsae.pipeline import detect, exchange
from jaxsae.sae import exchange as layouts

ASSET = "package://jaxsae/assets/demo_gpt2"
L, D, F = 6, 128, 16  # the demo's language model, and few latents


def write_sae(folder, seed=0, *, k=4, d=D, f=F):
    """Write one SAE in sparsify's layout, whose folder's name says where it belongs."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(f, d)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    arrays = {"encoder.weight": rows, "W_dec": rows, "encoder.bias": np.zeros(f), "b_dec": rng.normal(size=d)}
    folder.mkdir(parents=True)
    safetensors.numpy.save_file({name: x.astype(np.float32) for name, x in arrays.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "k": k, "d_in": d}))
    return folder


@pytest.fixture
def source(tmp_path):
    """Return a folder with one SAE for each layer of the demo's language model."""
    for layer in range(L):
        write_sae(tmp_path / "source" / f"h.{layer}", layer)
    return tmp_path / "source"


@pytest.fixture
def imports(tmp_path):
    """Return a function that imports into `tmp_path/run` and returns the exit code."""

    def run(source, *flags):
        where = [f"--workdir={tmp_path}/run", f"--model={ASSET}", "--dtype=float32", "--verbosity=-1"]
        return cli.run(["jaxsae", "import", str(source), *where, *flags])

    return run


@pytest.fixture
def fails(tmp_path, imports, capsys):
    """Return a check that an import ends with 2 and one line, and makes no workdir."""

    def check(source, words, *flags):
        assert imports(source, *flags) == 2
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == 1, said.err
        assert re.search(rf"^jaxsae: .*{words}", said.err), said.err
        assert not (tmp_path / "run").exists()

    return check


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """Return the folders that `export` writes of the small run."""
    out = tmp_path_factory.mktemp("exported") / "saes"
    assert cli.run(["jaxsae", "export", f"--workdir={finished.workdir}", f"--out={out}"]) == 0
    return out


def test_export__writes_a_folder_per_layer(finished, exported):
    assert sorted(path.name for path in exported.iterdir()) == [f"blocks.{i}.hook_resid_post" for i in range(L)]
    suite = sae.load(finished.workdir / "saes")
    for layer, folder in enumerate(sorted(exported.iterdir())):
        config = json.loads((folder / "cfg.json").read_text())
        assert (config["architecture"], config["k"], config["d_in"]) == ("topk", suite.k, D)
        metadata = config["metadata"]
        assert (metadata["model_name"], metadata["hook_name"]) == ("demo_gpt2", f"blocks.{layer}.hook_resid_post")
        assert (metadata["context_size"], metadata["prepend_bos"]) == (64, True)
        tensors = safetensors.numpy.load_file(folder / "sae_weights.safetensors")
        np.testing.assert_array_equal(tensors["b_dec"], suite.b_dec[layer])


def test_run__with_its_own_saes_from_outside__has_the_same_tracks_and_is_reported(
    finished, exported, tmp_path, imports, capsys
):
    run = finished.copy(tmp_path / "run", without=("train", "track", "evaluate"))
    (run.workdir / "manifests" / "features.json").unlink()
    assert imports(exported) == 0
    assert_equal(sae.load(run.workdir / "saes"), sae.load(finished.workdir / "saes"))
    assert [run(stage) for stage in ("track", "evaluate")] == [0, 0]
    for name in ("features.npz", "tracks.npz"):
        assert_equal(
            artifacts.read_npz(run.workdir / name, rebuild=""), artifacts.read_npz(finished.workdir / name, rebuild="")
        )
    assert "not measured" in (run.workdir / "report.md").read_text()
    capsys.readouterr()
    assert run("train") == 2
    assert re.search(
        r"saes holds SAEs with \w+ .*; use a new --workdir, or jaxsae train --redo", capsys.readouterr().err
    )


def test_import__keeps_each_layer_s_weights_and_says_where_they_are_from(source, tmp_path, imports):
    assert imports(source) == 0
    suite = sae.load(tmp_path / "run" / "saes")
    assert (suite.architecture, suite.k, suite.W_enc.shape) == ("topk", 4, (L, D, F))
    for layer in range(L):
        tensors = safetensors.numpy.load_file(source / f"h.{layer}" / "sae.safetensors")
        np.testing.assert_array_equal(suite.W_enc[layer], tensors["encoder.weight"].T)
        np.testing.assert_array_equal(suite.b_dec[layer], tensors["b_dec"])
    about = artifacts.read_json(tmp_path / "run" / "saes" / "suite.json", rebuild="")
    assert (about["imported"]["layout"], about["imported"]["layers"]["5"]["site"]) == ("sparsify", "h.5")
    evaluation = artifacts.read_json(tmp_path / "run" / "saes" / "evaluation.json", rebuild="")
    assert [row[name] for row in evaluation["rows"] for name in detect._SAE_KEYS[1:]] == [None] * 6 * L
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["saes"]


def test_import__of_hooks_before_the_blocks__leaves_the_embedding_out(source, tmp_path, imports, monkeypatch):
    """The hooks are those of the published SAEs of GPT-2 small: before each block, and after the last."""
    said = []
    monkeypatch.setattr(exchange.logging, "warning", lambda text, *words: said.append(text % words))
    write_sae(source / "embed_tokens", 77)
    for name, hook in [
        ("embed_tokens", "blocks.0.hook_resid_pre"),
        *((f"h.{layer}", f"blocks.{layer + 1}.hook_resid_pre") for layer in range(L - 1)),
        (f"h.{L - 1}", f"blocks.{L - 1}.hook_resid_post"),
    ]:
        one = layouts.read("sparsify", source / name / "sae.safetensors")
        layouts.write_saelens(tmp_path / "moved" / hook, one, layer=0, model="gpt2-small")
        path = tmp_path / "moved" / hook / "cfg.json"
        path.write_text(path.read_text().replace("blocks.0.hook_resid_post", hook))
    assert imports(tmp_path / "moved") == 0
    found = sae.load(tmp_path / "run" / "saes")
    for layer in range(L):
        tensors = safetensors.numpy.load_file(source / f"h.{layer}" / "sae.safetensors")
        np.testing.assert_array_equal(found.b_dec[layer], tensors["b_dec"])
    assert said[0] == f"the SAEs say that they are of gpt2-small; taken for {ASSET}"


def test_import__of_other_saes__is_another_suite_to_later_stages(source, tmp_path, imports):
    assert imports(source) == 0
    evaluation = tmp_path / "run" / "saes" / "evaluation.json"
    first = evaluation.read_bytes()
    shutil.rmtree(evaluation.parent)
    shutil.rmtree(source / "h.3")
    write_sae(source / "h.3", 33)
    assert imports(source) == 0
    assert evaluation.read_bytes() != first


def test_import__that_dies__leaves_nothing(source, tmp_path, imports, monkeypatch):
    def fail(folder, suite, *, about):
        (folder / "suite.json").write_text("half")
        raise OSError(5, "broken")

    monkeypatch.setattr(exchange, "write_suite", fail)
    with pytest.raises(OSError, match="broken"):
        imports(source)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    (tmp_path / "run" / "saes.partial").mkdir(parents=True)
    (tmp_path / "run" / "saes.partial" / "of a killed process").touch()
    assert imports(source) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["saes"]


def test_import__refuses_layers_that_do_not_fit_the_model(source, fails):
    shutil.rmtree(source / "h.2")
    shutil.rmtree(source / "h.4")
    fails(
        source, r"source has no SAE of layers 2, 4; tracks go through all 6 layers of package://.*: give one for each"
    )
    for layer in (2, 4, 6, 7):
        write_sae(source / f"h.{layer}")
    fails(source, r"source has SAEs of layers 6, 7, package://.* has layers 0 to 5; give the model .* with --model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d": D - 1}, f"h.3/sae.safetensors reads a residual stream of width {D - 1}, that of .* has {D}"),
        ({"f": F + 1}, f"h.3/sae.safetensors has n_latents {F + 1}, the SAE of layer 0 {F}; a suite has one"),
        ({"k": 5}, "h.3/sae.safetensors has k 5, the SAE of layer 0 4; a suite has one"),
    ],
)
def test_import__refuses_saes_that_do_not_fit_each_other(source, fails, change, words):
    shutil.rmtree(source / "h.3")
    write_sae(source / "h.3", **change)
    fails(source, words)


def test_import__refuses_two_of_a_layer_and_one_of_none(source, fails):
    write_sae(source / "h.3" / "seed1")
    fails(source, "layer 3 has two SAEs, .*h.3/sae.safetensors and .*h.3/seed1/sae.safetensors; give a folder with one")
    shutil.rmtree(source / "h.3")
    write_sae(source / "somewhere")
    fails(source, "nothing says which layer .*somewhere/sae.safetensors belongs to; name its folder layer_N, or give")


def test_import__takes_layer_for_a_single_sae_alone(source, fails):
    fails(source, "--layer=3 is for one SAE, .*source holds 6; leave it out", "--layer=3")
    fails(source / "h.2", r"--layer=3, but .* is of layer 2 \(h.2\); leave --layer out", "--layer=3")
    alone = write_sae(source / "somewhere")
    fails(alone, "somewhere has no SAE of layers 0, 1, 2, 4, 5; tracks go", "--layer=3")


def test_import__warns_where_decoder_rows_are_not_of_unit_length(source, imports, monkeypatch):
    said = []
    monkeypatch.setattr(exchange.logging, "warning", lambda text, *words: said.append(text % words))
    path = source / "h.2" / "sae.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["W_dec"][3] *= 2
    safetensors.numpy.save_file(tensors, path)
    assert imports(source) == 0
    assert said[0].startswith("decoder rows of layers 2 are 1 to 2 long, not 1: activations")


def test_import__refuses_to_replace_saes(source, tmp_path, imports, capsys):
    assert imports(source) == 0
    before = sae.load(tmp_path / "run" / "saes")
    capsys.readouterr()
    assert imports(source) == 2
    assert re.search("run/saes holds SAEs already; use a new --workdir, or delete the folder", capsys.readouterr().err)
    assert_equal(sae.load(tmp_path / "run" / "saes"), before)


def test_export__refuses_a_folder_with_something_in_it_and_a_run_without_saes(finished, tmp_path):
    (tmp_path / "there").touch()
    with pytest.raises(InputError, match="exists already; name a new folder with --out"):
        exchange.export_suite(finished.workdir, tmp_path)
    with pytest.raises(InputError, match=r"run/saes/suite.json is missing; run jaxsae train, or jaxsae import"):
        exchange.export_suite(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export__with_a_damaged_checkpoint__leaves_nothing(finished, tmp_path):
    run = finished.copy(tmp_path / "run", without=("extract",))
    weights = sorted((run.workdir / "saes" / "checkpoints").glob("*/best/W_dec/3*"))[-1]
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"best/W_dec/3.* is damaged"):
        exchange.export_suite(run.workdir, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
