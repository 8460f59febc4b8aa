"""GGUF files: metadata to config, tensors under Hugging Face's names and shapes, and what is refused."""

import json
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file

from jaxsae import models
from jaxsae.artifacts import InputError
from jaxsae.models import checkpoints, decoder, gpt2, llama, phi, weights
from jaxsae.models.config_fields import Rotary

EPSILON = 2.0**-18  # exact in the file's float32
LLAMA = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 19, "rms_norm_eps": EPSILON, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
PHI = {
    "vocab_size": 37, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 19, "layer_norm_eps": EPSILON, "rotary": Rotary(fraction=1 / 3),
}  # fmt: skip
GPT2 = {
    "vocab_size": 37, "n_positions": 19, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40,
    "layer_norm_epsilon": EPSILON, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": ("llama", llama.LlamaConfig(**LLAMA)),
    "llama, tied, biases": (
        "llama",
        llama.LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    ),
    "mistral": ("llama", llama.LlamaConfig(**LLAMA, model_type="mistral", sliding_window=7)),
    "qwen2": ("qwen2", llama.LlamaConfig(**LLAMA, model_type="qwen2", rotary=Rotary(theta=2.0**20))),
    "qwen3, wide heads": ("qwen3", llama.LlamaConfig(**LLAMA, model_type="qwen3", head_dim=10)),
    "gpt2": ("gpt2", gpt2.GPT2Config(**GPT2)),
    "gpt2, untied": ("gpt2", gpt2.GPT2Config(**GPT2, tie_word_embeddings=False)),
    "phi2": ("phi2", phi.PhiConfig(**PHI)),
}


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), decoder.abstract_params(config))


def permuted(tensor, n_heads):
    """Order rows as llama.cpp's converter does: coordinates i and i + C/2 of a head side by side."""
    halves = tensor.reshape(n_heads, 2, tensor.shape[0] // n_heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def converted(folder, architecture, config, *, fused=False):
    """Return a folder's tensors as llama.cpp's converter would store them, named by the package gguf."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.n_layers)
    tensors = load_file(folder / "model.safetensors")
    stored = {}
    for name, tensor in tensors.items():
        if architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
            tensor = permuted(tensor, config.num_attention_heads if "q_proj" in name else config.n_key_heads)
        if re.search(r"c_(attn|fc|proj)\.weight", name):
            tensor = tensor.T
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        stored[new] = np.ascontiguousarray(tensor)
    for layer in range(config.n_layers if fused else 0):
        for kind in ("weight", "bias"):
            parts = [stored.pop(f"blk.{layer}.attn_{part}.{kind}") for part in "qkv"]
            stored[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
    return stored


def metadata_of(architecture, config):
    if architecture == "gpt2":
        own = {
            "context_length": config.n_positions, "embedding_length": config.n_embd, "block_count": config.n_layer,
            "feed_forward_length": config.d_inner, "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }  # fmt: skip
    else:
        own = {
            "context_length": config.n_positions, "embedding_length": config.hidden_size,
            "block_count": config.n_layers, "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.n_key_heads,
            "rope.freq_base": config.rotary.theta,
        }  # fmt: skip
    if architecture == "phi2":
        own |= {"attention.layer_norm_epsilon": config.layer_norm_eps}
        own |= {"rope.dimension_count": int(config.d_head * config.rotary.fraction)}
    elif architecture != "gpt2":
        own |= {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.dimension_count": config.d_head}
        own |= {"attention.key_length": config.d_head, "attention.value_length": config.d_head}
        own |= {"attention.sliding_window": config.sliding_window} if config.sliding_window else {}
    return {f"{architecture}.{key}": value for key, value in own.items()} | {
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    }


def write_file(path, architecture, metadata, tensors, types=None):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        match value:
            case None:
                continue
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, tensor in tensors.items():
        kind = (types or {}).get(name)
        raw = tensor if kind is None else gguf.quants.quantize(tensor, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def write_gguf(tmp_path):
    """Return a function that writes a random model as a .gguf file and as a folder, and returns both paths.

    `metadata` replaces keys (None removes one), `change(tensors)` edits what is stored.
    """

    def write(case="llama", *, metadata=None, change=None, fused=False, types=None):
        architecture, config = CONFIGS[case]
        weights.save(tmp_path / "folder", config, random_params(config))
        tensors = converted(tmp_path / "folder", architecture, config, fused=fused)
        if change is not None:
            change(tensors)
        keys = metadata_of(architecture, config) | (metadata or {})
        return write_file(tmp_path / "model.gguf", architecture, keys, tensors, types), tmp_path / "folder"

    return write


def assert_same_model(one, other):
    assert one.config == other.config
    assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.parametrize("case", CONFIGS)
def test_load__gives_the_folders_config_and_weights_bit_for_bit(write_gguf, case):
    path, folder = write_gguf(case)
    assert_same_model(models.load(path), models.load(folder))


def test_load__takes_fused_queries_keys_and_values_apart(write_gguf):
    path, folder = write_gguf("phi2", fused=True)
    assert_same_model(models.load(path), models.load(folder))


@pytest.mark.parametrize("case", ["llama", "gpt2", "phi2"])
def test_load__reads_the_same_in_small_chunks_and_split_over_devices(write_gguf, monkeypatch, case):
    path, folder = write_gguf(case)
    mesh = jax.make_mesh((1, 2), ("layer", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    expected = models.load(folder)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 500)
    assert_same_model(models.load(path), expected)
    assert_same_model(models.load(path, mesh=mesh, sharding="split"), expected)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_load__dequantises_as_the_package_does(write_gguf, tmp_path, kind):
    wide = LLAMA | {"hidden_size": 32, "intermediate_size": 64}
    config, quantised = llama.LlamaConfig(**wide), GGMLQuantizationType[kind]
    weights.save(tmp_path / "folder", config, random_params(config))
    tensors = converted(tmp_path / "folder", "llama", config)
    types = {name: quantised for name, tensor in tensors.items() if tensor.ndim == 2}
    path = write_file(tmp_path / "model.gguf", "llama", metadata_of("llama", config), tensors, types)
    params = models.load(path).params
    for name, found in (
        ("ffn_down", params["blocks"]["mlp"]["down_proj"]),
        ("attn_v", params["blocks"]["self_attn"]["v_proj"]),
    ):
        exact = tensors[f"blk.1.{name}.weight"]
        expected = gguf.quants.dequantize(gguf.quants.quantize(exact, quantised), quantised)
        np.testing.assert_array_equal(found["weight"][1], expected)
        assert 0 < abs(expected - exact).max() < 0.2


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "MXFP4", "TQ1_0"]
)
def test_read__a_part_equals_the_part_of_the_whole(tmp_path, kind):
    quantised = GGMLQuantizationType[kind]
    n_bytes = gguf.quants.quant_shape_to_byte_shape((16, 512), quantised)[1]
    raw = np.random.default_rng(0).integers(0, 100, (16, n_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in metadata_of("llama", llama.LlamaConfig(**LLAMA)).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name in ("token_embd.weight", "blk.0.ffn_up.weight", "blk.0.attn_q.weight"):
        writer.add_tensor(name, raw, raw_dtype=quantised)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    whole = gguf.quants.dequantize(raw, quantised)
    with checkpoints.open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        up, query = (checkpoint.tensors[f"model.layers.0.{name}_proj.weight"] for name in ("mlp.up", "self_attn.q"))
        assert up.shape == query.shape == (16, 512)
        part = (slice(3, 8), slice(5, 300))
        np.testing.assert_array_equal(up.read(part), whole[part])
        np.testing.assert_array_equal(permuted(query.read((slice(0, 16), slice(0, 512))), 4), whole)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, Rotary(kind="linear", factor=2.0)),
        ({"llama.rope.scaling.factor": 2.0}, Rotary(kind="linear", factor=2.0)),
        ({"llama.rope.scaling.type": "none"}, Rotary()),
        ({"llama.rope.freq_base": None}, Rotary(theta=10_000.0)),
    ],
)
def test_load__reads_the_scaling_of_rotary_positions(write_gguf, metadata, expected):
    assert models.load(write_gguf(metadata=metadata)[0]).config.rotary == expected


def llama3_divisors(config, factor):
    """Return what llama.cpp's converter stores for Llama 3.1's scaling, by its own rule."""
    divisors = []
    for frequency in 1.0 / config.rotary.theta ** (np.arange(0, config.d_head, 2) / config.d_head):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1 if wavelength < 8192 / 4 else factor if wavelength > 8192 else between)
    return np.array(divisors, np.float32)


def test_load__finds_llama3s_scaling_in_the_stored_divisors(tmp_path):
    rotary = Rotary(theta=500_000.0, kind="llama3", factor=32.0)
    config = llama.LlamaConfig(**{**LLAMA, "hidden_size": 256}, rotary=rotary)
    weights.save(tmp_path / "folder", config, random_params(config))
    tensors = converted(tmp_path / "folder", "llama", config)
    tensors["rope_freqs.weight"] = llama3_divisors(config, 32.0)
    assert len({1.0, 32.0, *tensors["rope_freqs.weight"].tolist()}) > 3
    path = write_file(tmp_path / "a.gguf", "llama", metadata_of("llama", config), tensors)
    assert_same_model(models.load(path), models.load(tmp_path / "folder"))
    tensors["rope_freqs.weight"][-3:] = [7.0, 8.0, 9.0]
    path = write_file(tmp_path / "b.gguf", "llama", metadata_of("llama", config), tensors)
    with pytest.raises(InputError, match=r"b\.gguf: rope_freqs\.weight holds other divisors than Llama 3's .* of 32"):
        models.load(path)


@pytest.mark.parametrize(
    ("case", "metadata", "message"),
    [
        ("llama", {"llama.block_count": None}, r"lacks the metadata key llama\.block_count"),
        ("llama", {"llama.block_count": 0}, r"llama\.block_count = 0 is not a positive integer"),
        ("llama", {"llama.block_count": 4}, r"lacks tensors layers\.3\..*, which its metadata asks for"),
        ("llama", {"llama.block_count": 2}, r"holds tensors model\.layers\.2\..*|holds tensors layers\.2\."),
        ("llama", {"llama.vocab_size": 38}, r"llama\.vocab_size = 38 is not supported, expected 37"),
        ("llama", {"llama.expert_count": 8}, r"llama\.expert_count = 8 is not supported, expected 0"),
        ("llama", {"llama.feed_forward_length": 41}, r"has shape \[24, 40\], its metadata asks for \[24, 41\]"),
        ("llama", {"llama.attention.head_count": [4, 4, 2]}, r"attention\.head_count = \[4, 4, 2\] is not a positive"),
        ("llama", {"llama.logit_scale": 0.5}, r"llama\.logit_scale = 0\.5 is no metadata key that is understood"),
        ("llama", {"llama.attention.value_length": 8}, r"attention\.value_length = 8 is not supported, expected 6"),
        ("llama", {"llama.rope.dimension_count": 4}, r"rope\.dimension_count = 4 is not supported, expected 6"),
        ("llama", {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, r"gguf: .*'yarn'"),
        ("phi2", {"phi2.rope.scaling.type": "linear"}, r"phi2\.rope\.scaling\.type = 'linear' is not supported"),
        ("phi2", {"phi2.attention.head_count": 7}, r"embedding_length = 48 is not a multiple of .*head_count = 7"),
        ("llama", {"tokenizer.ggml.eot_token_id": "x"}, r"tokenizer\.ggml\.eot_token_id = 'x' is not a token id"),
        ("llama", {"split.count": 3}, r"is one of 3 parts; merge them with llama-gguf-split"),
        ("llama", {"tokenizer.ggml.model": "bert"}, r"tokenizer\.ggml\.model = 'bert' is not supported"),
        ("llama", {"tokenizer.ggml.model": "gpt2"}, r"tokenizer\.ggml\.tokens has nothing, expected a list"),
    ],
)  # fmt: skip
def test_load__names_the_metadata_key_that_is_wrong(write_gguf, case, metadata, message):
    path, _ = write_gguf(case, metadata=metadata)
    with pytest.raises(InputError, match=message) as caught:
        models.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), r"lacks tensor layers\.1\.mlp\.up_proj\.weight, which its metadata"),
        (lambda t: t.pop("token_embd.weight"), r"lacks tensor token_embd\.weight"),
        (lambda t: t.update({"blk.0.ffn_gate_inp.weight": np.ones((3, 24), "f4")}), r"holds tensor blk\.0\.ffn_"),
        (lambda t: t["blk.1.attn_q.weight"].__setitem__((3, 5), np.nan), r"tensor blk\.1\.attn_q\.weight holds NaN"),
    ],
)  # fmt: skip
def test_load__names_the_tensor_that_is_wrong(write_gguf, change, message):
    path, _ = write_gguf(change=change)
    with pytest.raises(InputError, match=message):
        models.load(path)


def test_load__refuses_another_architecture_by_name(tmp_path):
    path = write_file(tmp_path / "x.gguf", "mamba", {}, {"token_embd.weight": np.ones((3, 4), np.float32)})
    with pytest.raises(InputError, match=r"x\.gguf: architecture 'mamba' is not supported; it is one of gpt2, llama"):
        models.load(path)


def test_load__refuses_numbers_that_the_package_cannot_read(write_gguf):
    path, _ = write_gguf(change=lambda t: t.update({"output_norm.weight": np.arange(24, dtype=np.int32)}))
    with pytest.raises(InputError, match=r"tensor output_norm\.weight has the type I32, which the package gguf cannot"):
        models.load(path)


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 700, 3000, -1])
def test_load__names_a_truncated_file(write_gguf, keep):
    path, _ = write_gguf()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.gguf is no GGUF file, or damaged or truncated \(") as caught:
        models.load(path)
    assert "\n" not in str(caught.value)


def test_open__of_a_damaged_head_ends_in_one_line_or_not_at_all(write_gguf):
    path, _ = write_gguf(metadata={"tokenizer.ggml.tokens": ["a", "b", "c"], "general.name": "x"})
    sound, rng = path.read_bytes(), np.random.default_rng(0)
    messages = []
    for position in rng.integers(0, 1200, 150):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            with np.errstate(all="ignore"), checkpoints.open_checkpoint(path):
                pass
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert not any("\n" in message for message in messages)


def test_load__a_missing_file_is_named():
    for source in ("model.gguf", "some/where/model.gguf"):
        with pytest.raises(InputError, match=rf"{source} is missing or not a file; give the path of a \.gguf file"):
            models.load(source)
    with pytest.raises(InputError, match=r"package jaxsae has no 'model\.gguf'"):
        models.load("package://jaxsae/model.gguf")


def test_load__eos_ids_are_the_ends_of_text_and_of_turn(write_gguf):
    ids = {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 37}
    lm = models.load(write_gguf(metadata=ids)[0])
    assert (lm.eos_ids, lm.eos_id, lm.bos_id, lm.tokenizer) == (frozenset({2, 9}), 2, 1, None)


def test_load__makes_the_tokenizer_that_the_metadata_describe(write_gguf, tmp_path, train_tokenizer):
    exact = train_tokenizer(tmp_path / "elsewhere", 270)
    vocabulary = exact.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [" ".join(merge) for merge in json.loads(exact.to_str())["model"]["merges"]]
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": merges, "token_type": [3, *[1] * 269]}

    def widen(tensors):
        for name in ("token_embd.weight", "output.weight"):
            tensors[name] = np.resize(tensors[name], (270, 24))

    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    lm = models.load(write_gguf(metadata=metadata, change=widen)[0])
    text = "Hello world.<|endoftext|>The dog ran: déjà vu"
    assert lm.tokenizer.encode(text) == exact.encode(text).ids
    assert lm.tokenizer.decode(lm.tokenizer.encode(text)) == text
    assert lm.tokenizer.eos_token_id == 2
