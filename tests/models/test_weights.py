"""Reading and writing model folders: every tensor accounted for, every damage named."""

import importlib
import json
import os
import subprocess
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxsae import models
from jaxsae.artifacts import InputError
from jaxsae.models import checkpoints, decoder, gpt2, weights

TOKEN_IDS = np.random.default_rng(0).integers(0, 37, (2, 11))
C_FC = "transformer.h.1.mlp.c_fc.weight"


def edit(folder, change):
    """Rewrite the tensors of a folder after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def shard(folder):
    """Split the weights into two files with an index, as transformers writes large models."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / part)
    index = {"metadata": {}, "weight_map": {name: part for part, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def assert_same_params(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("tied", [True, False])
def test_save__load_gives_the_same_config_and_weights_bit_for_bit(tmp_path, make_params, tied):
    config = gpt2.GPT2Config(
        vocab_size=37, n_positions=19, n_embd=24, n_layer=3, n_head=4, n_inner=40, tie_word_embeddings=tied,
        activation_function="relu", layer_norm_epsilon=1e-3, eos_token_id=(3, 5), bos_token_id=None,
    )  # fmt: skip
    params = make_params(config)
    weights.save(tmp_path / "deep" / "model", config, params)
    lm = models.load(tmp_path / "deep" / "model")
    assert lm.config == config
    assert_same_params(lm.params, params)
    assert (lm.tokenizer, lm.revision, lm.bos_id, lm.eos_id) == (None, None, None, 3)


@pytest.mark.parametrize("tied", [True, False])
def test_save__transformers_loads_it_to_equal_logits(write_model, tied):
    folder, _ = write_model(tie_word_embeddings=tied, activation_function="gelu", scale_attn_by_inverse_layer_idx=True)
    reference, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        expected = reference.eval()(torch.tensor(TOKEN_IDS)).logits.numpy()
    np.testing.assert_allclose(models.load(folder).logits(TOKEN_IDS), expected, atol=2e-5, rtol=2e-5)


def test_save__names_the_weight_that_does_not_fit_and_writes_nothing(tmp_path, make_params):
    config = gpt2.GPT2Config(vocab_size=37, n_positions=19, n_embd=24, n_layer=3, n_head=4)
    params = make_params(config)
    params["wpe"]["weight"] = params["wpe"]["weight"][:7]
    with pytest.raises(InputError, match=r"\[7, 24\] at wpe.weight, its config asks for \[19, 24\]"):
        weights.save(tmp_path / "model", config, params)
    del params["wpe"]
    with pytest.raises(InputError, match=r"nothing at wpe.weight"):
        weights.save(tmp_path / "model", config, params)
    assert not (tmp_path / "model").exists()


def test_load__shards_equal_the_single_file(write_model):
    folder, _ = write_model()
    whole = models.load(folder)
    shard(folder)
    assert_same_params(models.load(folder).params, whole.params)


def test_load__takes_names_without_prefix_mask_buffers_and_a_copy_of_the_tied_head(write_model):
    folder, _ = write_model()
    expected = models.load(folder).params

    def as_written_by_older_code(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 19, 19), bool))
            tensors[f"h.{layer}.attn.masked_bias"] = np.float32([-10000.0])
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    edit(folder, as_written_by_older_code)
    assert_same_params(models.load(folder).params, expected)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_load__widens_16_bit_files_exactly(write_model, stored):
    folder, _ = write_model()
    exact = load_file(folder / "model.safetensors")[C_FC]
    edit(folder, lambda tensors: tensors.update({name: value.astype(stored) for name, value in tensors.items()}))
    found = models.load(folder).params["blocks"]["mlp"]["c_fc"]["weight"]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[1].T, exact.astype(stored).astype(np.float32))


def test_load__bfloat16_stores_dot_operands_rounded_and_computes_as_forward_does(write_model):
    folder, config = write_model(tie_word_embeddings=False)
    exact, rounded = models.load(folder), models.load(folder, dtype="bfloat16")
    assert rounded.params["blocks"]["attn"]["c_attn"]["weight"].dtype == jnp.bfloat16
    assert rounded.params["lm_head"]["weight"].dtype == jnp.bfloat16
    assert rounded.params["wte"]["weight"].dtype == rounded.params["blocks"]["ln_1"]["weight"].dtype == jnp.float32
    on_the_fly = decoder.residuals(config, exact.params, TOKEN_IDS, dtype="bfloat16")
    np.testing.assert_allclose(rounded.residuals(TOKEN_IDS), on_the_fly, atol=2e-2, rtol=2e-2)
    assert np.abs(rounded.residuals(TOKEN_IDS) - exact.residuals(TOKEN_IDS)).max() > 1e-4


def test_load__replicates_over_a_mesh(write_model):
    folder, _ = write_model()
    mesh = jax.make_mesh((1, 1), ("layer", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    lm = models.load(folder, mesh=mesh)
    assert all(leaf.sharding.mesh == mesh and leaf.is_fully_replicated for leaf in jax.tree.leaves(lm.params))
    np.testing.assert_allclose(lm.logits(TOKEN_IDS), models.load(folder).logits(TOKEN_IDS), atol=1e-6)


def test_load__fingerprint_follows_config_weights_and_dtype_but_not_the_folder(write_model):
    folder, _ = write_model("one")
    other, _ = write_model("two")
    first = models.load(folder).fingerprint
    assert len(first) == 64
    assert models.load(other).fingerprint == first
    assert models.load(folder, dtype="bfloat16").fingerprint != first
    edit_config(other, layer_norm_epsilon=1e-4)
    assert models.load(other).fingerprint != first
    changed, _ = write_model("three", seed=1)
    assert models.load(changed).fingerprint != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(C_FC), r"lacks tensor h\.1\.mlp\.c_fc\.weight, which"),
        (lambda t: [t.pop(n) for n in list(t) if ".h.2." in n], r"lacks tensors h\.2\..* and 7 more, which"),
        (lambda t: t.update({"transformer.h.3.ln_1.bias": np.zeros(24, "f4")}), r"holds tensor h\.3\.ln_1\.bias"),
        (lambda t: t.update({"score.weight": np.zeros((2, 24), "f4")}), r"holds tensor score\.weight"),
        (lambda t: t.update({"wte.weight": t["transformer.wte.weight"]}), r"tensor wte\.weight a second time"),
        (lambda t: t.update({C_FC: t[C_FC].T.copy()}), r"h\.1\.mlp\.c_fc\.weight has shape \[40, 24\].* \[24, 40\]"),
        (lambda t: t.update({C_FC: t[C_FC].astype("f8")}), r"h\.1\.mlp\.c_fc\.weight has dtype F64, expected"),
        (lambda t: t[C_FC].__setitem__((3, 5), np.nan), r"h\.1\.mlp\.c_fc\.weight holds NaN or infinite"),
        (lambda t: t[C_FC].__setitem__((3, 5), -np.inf), r"h\.1\.mlp\.c_fc\.weight holds NaN or infinite"),
        (lambda t: t.update({"lm_head.weight": 2 * t["transformer.wte.weight"]}), r"lm_head\.weight differs from wte"),
    ],
)
def test_load__names_the_tensor_that_is_wrong(write_model, change, message):
    folder, _ = write_model()
    edit(folder, change)
    with pytest.raises(InputError, match=message) as caught:
        models.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load__an_untied_model_needs_its_head(write_model):
    folder, _ = write_model(tie_word_embeddings=False)
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"lacks tensor lm_head\.weight"):
        models.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_load__names_a_truncated_file(write_model, keep):
    folder, _ = write_model()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged or truncated") as caught:
        models.load(folder)
    assert "\n" not in str(caught.value)


def test_load__names_a_missing_shard_and_one_outside_the_folder(write_model):
    folder, _ = write_model()
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"names the shard 'model-00002-of-00002\.safetensors', which is not in"):
        models.load(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(InputError, match=r"names the shard '\.\./x\.safetensors'"):
        models.load(folder)
    index.write_text("{}")
    with pytest.raises(InputError, match=r"index\.json has no weight_map"):
        models.load(folder)


def test_load__says_what_a_folder_without_safetensors_holds(write_model):
    folder, _ = write_model()
    (folder / "model.safetensors").rename(folder / "weights.pt")
    with pytest.raises(InputError, match=r"holds no model\.safetensors .*only weights\.pt, .*: convert it"):
        models.load(folder)
    (folder / "small.gguf").touch()
    with pytest.raises(InputError, match=r"holds no model\.safetensors .*; give the path of small\.gguf itself"):
        models.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config\.json is missing"),
        ("{", r"config\.json is not readable JSON"),
        ("[1]", r"config\.json holds a JSON list"),
        ("{}", r"config\.json: model_type = None is not supported; it is one of gpt2"),
        ('{"model_type": "mamba"}', r"model_type = 'mamba' is not supported"),
        ('{"model_type": ["gpt2"]}', r"model_type = \['gpt2'\] is not supported"),
        ('{"model_type": "gpt2", "n_layer": "3"}', r"config\.json: n_layer = '3' is not a positive integer"),
    ],
)
def test_load__names_what_is_wrong_with_the_config(write_model, text, message):
    folder, _ = write_model()
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        models.load(folder)


def test_load__reads_a_folder_inside_a_package_without_importing_it(tmp_path, write_model, monkeypatch):
    folder, config = write_model()
    package = tmp_path / "site" / "weights_of_mine"
    (package / "assets").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    folder.rename(package / "assets" / "tiny")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    lm = models.load("package://weights_of_mine/assets/tiny")
    assert (lm.config, lm.name) == (config, "package://weights_of_mine/assets/tiny")
    assert "weights_of_mine" not in sys.modules
    with pytest.raises(InputError, match="package weights_of_mine has no 'assets/huge'"):
        models.load("package://weights_of_mine/assets/huge")
    with pytest.raises(InputError, match=r"the path '\.\./x' leaves the package"):
        models.load("package://weights_of_mine/../x")


@pytest.mark.parametrize("package", ["no_such_package_here", "not-a-name", "json.decoder", ""])
def test_load__names_a_package_that_is_not_there(package):
    with pytest.raises(InputError, match=f"package://{package}/x: no package '{package}' is installed here"):
        models.load(f"package://{package}/x")


@pytest.mark.parametrize("source", ["/no/such/folder", "./missing", "a/b/c"])
def test_load__a_path_that_is_no_folder_is_named(source):
    with pytest.raises(InputError, match=f"{source} is not a folder"):
        models.load(source)


def test_load__a_hub_name_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"nobody/nothing is no local folder, .* at revision 'v2' \(") as caught:
        models.load("nobody/nothing", revision="v2")
    assert "\n" not in str(caught.value)


def test_load__records_the_commit_of_a_hub_model(tmp_path, write_model, monkeypatch):
    import huggingface_hub

    folder, _ = write_model()
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder.rename(tmp_path / commit)
    asked = {}

    def snapshot_download(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    lm = models.load("someone/tiny-gpt2", revision="main")
    assert (lm.name, lm.revision) == ("someone/tiny-gpt2", commit)
    assert (asked["name"], asked["revision"]) == ("someone/tiny-gpt2", "main")
    assert not any(pattern.endswith(".bin") for pattern in asked["patterns"])


def test_load__takes_one_file_of_a_hub_model_and_records_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    commit, asked = "0123456789abcdef0123456789abcdef01234567", []
    path = tmp_path / commit / "quantised" / "small.gguf"
    path.parent.mkdir(parents=True)

    def hf_hub_download(name, file, *, revision):
        asked.append((name, file, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert checkpoints.locate("someone/tiny:quantised/small.gguf", revision="main") == (path, commit)
    assert asked == [("someone/tiny", "quantised/small.gguf", "main")]
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"the Hugging Face Hub did not give its file small\.gguf \(") as caught:
        models.load("nobody/nothing:small.gguf")
    assert "\n" not in str(caught.value)


def test_load__eos_ids_come_from_config_and_generation_config(write_model):
    folder, _ = write_model(eos_token_id=(3, 50256))
    path = folder / "generation_config.json"
    for written, expected in ((None, {3}), ([5, 3], {3, 5}), (7, {3, 7}), ([99], {3})):
        path.write_text(json.dumps({"eos_token_id": written, "do_sample": True}))
        assert models.load(folder).eos_ids == frozenset(expected)
    path.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id = '</s>' is neither a token id nor"):
        models.load(folder)


@pytest.mark.parametrize("sharding", ["replicated", "split"])
def test_load__holds_little_more_than_the_weights(tmp_path, measure_peak, sharding):
    config = gpt2.GPT2Config(vocab_size=30_011, n_positions=64, n_embd=768, n_layer=6, n_head=8)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), decoder.abstract_params(config))
    weights.save(tmp_path, config, params)
    found = measure_peak(tmp_path, sharding)
    assert found["held"] > 250e6
    assert found["peak"] <= found["held"] + 1.2 * found["largest"]


def test_load__refuses_a_revision_of_a_local_folder_and_an_unknown_dtype(write_model):
    folder, _ = write_model()
    with pytest.raises(InputError, match="revision = 'main' is for models of the Hub"):
        models.load(folder, revision="main")
    with pytest.raises(InputError, match="dtype is 'float16'; use one of float32, bfloat16"):
        models.load(folder, dtype="float16")


def test_importing_the_folder_loads_neither_transformers_nor_the_hub_nor_torch():
    code = (
        "import sys, jaxsae.models; "
        "print(sorted({'transformers', 'huggingface_hub', 'torch', 'sklearn'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"
