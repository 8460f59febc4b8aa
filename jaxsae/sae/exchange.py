"""SAEs in other libraries' layouts: read into a suite's terms, and written for SAELens.

    layout                files of one SAE                     its encoder reads   and keeps
    saelens               cfg.json, sae_weights.safetensors    x - b_dec, or x     ReLU, TopK, JumpReLU, Gated
    sparsify              cfg.json, sae.safetensors            x - b_dec           TopK
    dictionary_learning   config.json, ae.safetensors          x - b_dec, or x     any of these, by class
    openai                LAYER.safetensors                    x - b_dec           ReLU
    gemma_scope           params.npz, or params.safetensors    x                   JumpReLU

A suite's SAE is f = keep((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec, where `keep` takes the k largest or those
above a threshold. What a layout does otherwise is folded into the weights, in float64: x in place of x - b_dec, a gate,
a scale by the decoder's norms. What cannot be folded is refused by name. Decoder rows keep their lengths, so that
features have the values that the library gives them. Pickled weights are never opened.

Sources: the packages sae-lens 6.54, eai-sparsify 1.3, dictionary-learning 0.1; openai/sparse_autoencoder, model.py;
Lieberum et al. 2024, arXiv:2408.05147.
"""

import contextlib
import dataclasses
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # before safetensors.numpy, which cannot give bfloat16 otherwise
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float

from jaxsae import artifacts
from jaxsae.artifacts import InputError
from jaxsae.sae.architectures import ARCHITECTURES, architecture
from jaxsae.sae.suite import SaeSuite

EMBEDDING = -1  # the residual stream before the first block, which no layer of a suite is
THRESHOLDED = "jumprelu"  # the suite's architecture for whatever keeps latents above a threshold
SAELENS_VERSION = "6.0.0"  # of the layout that is written; below it, SAELens drops the nested metadata
SAELENS_CONFIG, SAELENS_WEIGHTS = "cfg.json", "sae_weights.safetensors"

_SMALLEST_NORM = 1e-8  # SAELens' bound below a decoder row's norm
_PARAMETERS = {"W_enc": "D F", "b_enc": "F", "W_dec": "F D", "b_dec": "D"}
_PICKLES = (".pt", ".pth", ".bin", ".pkl")
_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_LAYER_NAME = re.compile(r"(?:^|[._-])(?:layers?|h|blocks?)[._-]?(\d+)(?=$|[._-])")
_EMBEDDING_NAMES = ("embed_tokens", "wte", "embed_in", "embedding", "hook_embed")
_OTHER_SITE = re.compile(
    r"(?:^|[._-])(mlp|attn|att|attention|transcoders?|crosscoders?|clt|resid_mid|resid_delta)(?=$|[._-])"
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where one SAE belongs, as far as its files say.

    Attributes:
        path: its weights.
        site: the hook, or the folder, whose name says which layer; empty if none does.
        layer: of a suite, after whose block the SAE reads the residual stream; `EMBEDDING`; None if nothing says.
        model: the language model's name; empty if nothing says.
    """

    path: Path
    site: str
    layer: int | None
    model: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a library lays out one SAE.

    Attributes:
        weights: pattern of the weights file's name.
        locate: (weights file, folders' names from the innermost outwards) -> `Origin`; reads no weights.
        read: weights file -> the SAE, without an L axis, float32.
    """

    weights: str
    locate: Callable[[Path, tuple[str, ...]], Origin]
    read: Callable[[Path], SaeSuite]


def find(source: str | os.PathLike, layout: str | None = None) -> tuple[str, list[Origin]]:
    """Return (layout, where each SAE below `source` belongs), by path; no weights are read.

    Args:
        source: a folder of one SAE, a folder of such folders, or a weights file.
        layout: a name among `LAYOUTS`; None takes the one that the files' names belong to.

    Raises:
        InputError: there is no such file, none or several layouts fit, the weights are pickled, or an SAE does not read
            the residual stream between two blocks.
    """
    source = Path(source)
    if not source.exists():
        raise InputError(f"{source} does not exist; give a folder with SAEs, or one SAE's weights file")
    base = source if source.is_dir() else source.parent
    files = sorted(path for path in base.rglob("*") if path.is_file()) if source.is_dir() else [source]
    by_layout = {name: [path for path in files if re.fullmatch(LAYOUTS[name].weights, path.name)] for name in LAYOUTS}
    if layout is None:
        layout = _only_layout(source, {name: paths for name, paths in by_layout.items() if paths}, files)
    paths = by_layout[layout] if source.is_dir() else [source]
    if not paths or paths[0].suffix in _PICKLES:
        raise _nothing_found(source, files, f"files named {LAYOUTS[layout].weights} ({layout})")
    inner = [(path, (base.resolve().name, *path.parent.relative_to(base).parts)) for path in paths]
    return layout, [LAYOUTS[layout].locate(path, names[::-1]) for path, names in inner]


def _only_layout(source: Path, found: Mapping[str, list[Path]], files: list[Path]) -> str:
    if len(found) > 1:
        first = ", ".join(f"{paths[0].name} ({name})" for name, paths in found.items())
        raise InputError(f"{source} holds SAEs of several layouts: {first}; say which with --format")
    if not found:
        raise _nothing_found(source, files, f"an SAE in one of the layouts {', '.join(LAYOUTS)}")
    return next(iter(found))


def _nothing_found(source: Path, files: list[Path], wanted: str) -> InputError:
    pickled = [path.name for path in files if path.suffix in _PICKLES]
    if pickled:
        return InputError(
            f"{source} holds pickled weights ({pickled[0]}), which may run code when opened: where you trust them, "
            "convert them to safetensors with torch (the README's section on exchange has the command)"
        )
    return InputError(f"{source} holds no {'weights' if not files else wanted}; give a folder of SAEs, or --format")


def read(layout: str, path: Path) -> SaeSuite:
    """Return the SAE that a weights file and its config hold, as a suite of one layer without the L axis.

    Its `k` is 0 where the layout does not say how many latents are active on average.

    Raises:
        InputError: a file is missing or damaged; a tensor is missing, unknown, not finite or of another shape; or a
            setting cannot be kept in a suite.
    """
    return LAYOUTS[layout].read(path)


class _Weights:
    """The tensors of a .safetensors or .npz file, taken by name; all that use an axis letter agree on its size."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            InputError: it is missing or damaged.
        """
        self.path, self.sizes = path, dict[str, int]()
        with _damage_named(path):
            self._tensors, self.notes = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
        self._left = set(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, axes: str) -> np.ndarray:
        """Return a tensor with axes such as "F D", in float32, or float64 if that is how it is stored.

        Raises:
            InputError: it is missing, holds no floats or something not finite, or its shape does not fit.
        """
        if name not in self._tensors:
            raise InputError(f"{self.path} lacks tensor {name}; it holds {', '.join(sorted(self._tensors)) or 'none'}")
        tensor = self._tensors[name]
        self._left.discard(name)
        wanted = [self.sizes.get(axis) for axis in axes.split()]
        fits = tensor.ndim == len(wanted) and all(w in (None, n) for w, n in zip(wanted, tensor.shape, strict=True))
        if not fits or 0 in tensor.shape:
            sizes = ", ".join(
                axis if n is None else f"{axis} {n}" for axis, n in zip(axes.split(), wanted, strict=True)
            )
            raise InputError(f"{self.path}: tensor {name} has shape {list(tensor.shape)}, expected [{sizes}]")
        self.sizes |= dict(zip(axes.split(), tensor.shape, strict=True))
        if tensor.dtype.kind != "f" and tensor.dtype != ml_dtypes.bfloat16:
            raise InputError(f"{self.path}: tensor {name} has dtype {tensor.dtype}, expected floats")
        floats = tensor.astype(np.result_type(tensor.dtype, np.float32), copy=False)
        if np.isnan(floats).any() or (name != "threshold" and np.isinf(floats).any()):
            raise InputError(f"{self.path}: tensor {name} holds values that are not finite; download it again")
        return floats

    def drop(self, *names: str) -> None:
        """Leave out tensors that no output depends on."""
        self._left -= set(names)

    def check_rest(self, what: str) -> None:
        """Refuse tensors that nobody took: they would change what the SAE does."""
        if self._left:
            raise InputError(f"{self.path} holds tensor {min(self._left)}, which is no part of {what}")


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    notes = {name: str(x) for name, x in arrays.items() if x.dtype.kind == "U" and x.ndim == 0}
    return {name: x for name, x in arrays.items() if name not in notes}, notes


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safetensors.safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    damage = (safetensors.SafetensorError, zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, TypeError)
    try:
        yield
    except damage as error:
        raise InputError(f"{path} cannot be read ({error}); download or save it again") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; it says what the weights beside it are") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def _refusal(path: Path, setting: str, value: Any, why: str) -> InputError:
    return InputError(f"{path} has {setting} {value!r}: {why}")


def _check_k(path: Path, k: Any) -> int:
    if type(k) is not int or k < 1:
        raise _refusal(path, "k", k, "expected a whole number of latents, 1 or more")
    return k


def _parameters(weights: _Weights) -> dict[str, Any]:
    return {name: weights.take(name, axes) for name, axes in _PARAMETERS.items()}


def _linear(weights: _Weights, b_dec: str, b_enc: str | None) -> dict[str, Any]:
    """Return W_enc, W_dec, b_dec and, if it has one, b_enc of an SAE made of torch's linear layers."""
    arrays = {
        "W_enc": weights.take("encoder.weight", "F D").T,
        "W_dec": weights.take("decoder.weight", "D F").T,
        "b_dec": weights.take(b_dec, "D"),
    }
    return arrays if b_enc is None else arrays | {"b_enc": weights.take(b_enc, "F")}


def _relu(arrays: dict[str, Any]) -> dict[str, Any]:
    return arrays | {"threshold": np.zeros_like(arrays["b_enc"])}


def _normal_form(
    *,
    W_enc: Float[np.ndarray, "D F"],
    b_enc: Float[np.ndarray, " F"],
    W_dec: Float[np.ndarray, "F D"],
    b_dec: Float[np.ndarray, " D"],
    threshold: Float[np.ndarray, " F"] | None = None,
    k: int = 0,
    centred: bool = True,
    kind: str | None = None,
) -> SaeSuite:
    """Return the suite's SAE that does what these weights do.

    Args:
        threshold: None for TopK with `k`.
        centred: the encoder reads x - b_dec; if not, and the suite's does, b_enc makes up for it.
        kind: the suite's architecture; by default topk, or jumprelu where there is a threshold.
    """
    kind = kind or ("topk" if threshold is None else THRESHOLDED)
    if architecture(kind).centres_input and not centred:
        b_enc = b_enc + b_dec.astype(np.float64) @ W_enc.astype(np.float64)
    threshold = np.zeros_like(b_enc) if threshold is None else threshold
    arrays = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
    return SaeSuite(
        **{name: np.ascontiguousarray(x, dtype=np.float32) for name, x in arrays.items()}, architecture=kind, k=k
    )


def _gated(
    W_enc: Float[np.ndarray, "D F"],
    r_mag: Float[np.ndarray, " F"],
    b_gate: Float[np.ndarray, " F"],
    b_mag: Float[np.ndarray, " F"],
) -> dict[str, np.ndarray]:
    """Return W_enc, b_enc and threshold of the JumpReLU that a gated encoder is.

    f = [u + b_gate > 0] relu(e^r u + b_mag), u = (x - b_dec) W_enc: the gate opens where e^r u + b_mag is above
    b_mag - e^r b_gate.

    Source: Rajamanoharan et al. 2024, arXiv:2404.16014.
    """
    magnitude = np.exp(r_mag.astype(np.float64))
    return {"W_enc": W_enc * magnitude, "b_enc": b_mag, "threshold": b_mag - magnitude * b_gate}


def _scaled_to_unit_rows(
    W_enc: Float[np.ndarray, "D F"], b_enc: Float[np.ndarray, " F"], W_dec: Float[np.ndarray, "F D"]
) -> dict[str, np.ndarray]:
    """Return the three weights with decoder rows of length 1, features multiplied by the length they had."""
    norm = np.linalg.norm(W_dec.astype(np.float64), axis=1)
    return {"W_enc": W_enc * norm, "b_enc": b_enc * norm, "W_dec": W_dec / np.maximum(norm, _SMALLEST_NORM)[:, None]}


def _origin_by_names(path: Path, names: Collection[str], *, model: str = "") -> Origin:
    """Return where an SAE belongs by its folders' names, such as layer_20, layers.5 or blocks.3.hook_resid_pre.

    Raises:
        InputError: a name says that it reads something else than the residual stream between blocks.
    """
    for name in names:
        other = _OTHER_SITE.search(name.replace("resid_post_mlp", ""))
        if other:
            raise _refusal(
                path, "a folder", name, f"{other[1]} is no residual stream after a block, which a suite reads"
            )
    for name in names:
        layer = _layer_of(name)
        if layer is not None:
            return Origin(path, name, layer, model)
    return Origin(path, "", None, model)


def _layer_of(name: str) -> int | None:
    if name in _EMBEDDING_NAMES:
        return EMBEDDING
    hook = _HOOK.search(name)
    if hook:
        return int(hook[1]) - (hook[2] == "pre")
    named = _LAYER_NAME.search(name)
    return int(named[1]) if named else int(name) if name.isdigit() else None


# SAELens. Files before version 6 have the hook and the model beside the SAE's own settings, under older names.


def _saelens_config(path: Path) -> dict[str, Any]:
    config = _read_object(path.with_name(SAELENS_CONFIG))
    if isinstance(config.get("metadata"), dict):
        return config
    renamed = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation"}
    config = {renamed.get(name, name): value for name, value in config.items()}
    config.setdefault("activation", config.get("activation_fn", "relu"))
    if config["activation"] == "topk":
        config |= {"architecture": "topk", "k": (config.get("activation_fn_kwargs") or {}).get("k")}
    names = ("hook_name", "hook_head_index", "model_name")
    return {"architecture": "standard"} | config | {"metadata": {name: config.get(name) for name in names}}


def _locate_saelens(path: Path, names: tuple[str, ...]) -> Origin:
    config = _saelens_config(path)
    metadata, config_path = config["metadata"], path.with_name(SAELENS_CONFIG)
    hook, model = metadata.get("hook_name"), str(metadata.get("model_name") or "")
    if hook is None:
        return _origin_by_names(path, names, model=model)
    if hook != "hook_embed" and not _HOOK.fullmatch(str(hook)):
        raise _refusal(config_path, "hook_name", hook, "a suite reads blocks.N.hook_resid_post or hook_resid_pre")
    if metadata.get("hook_head_index") is not None:
        raise _refusal(config_path, "hook_head_index", metadata["hook_head_index"], "a suite reads all heads' stream")
    return Origin(path, hook, _layer_of(hook), model)


_SAELENS_FIXED = {
    "activation": (("relu", "topk"), "a suite has ReLU, TopK and thresholds"),
    "normalize_activations": (
        ("none", False),
        "a suite has no scale for each row; a constant factor can be folded in: "
        "sae.fold_activation_norm_scaling_factor(FACTOR), then save it again",
    ),
    "reshape_activations": (("none",), "a suite reads the residual stream, not heads"),
    "finetuning_scaling_factor": ((False,), "a suite has no factor after the activation"),
}


def _read_saelens(path: Path) -> SaeSuite:
    config, config_path = _saelens_config(path), path.with_name(SAELENS_CONFIG)
    kind = _check_saelens(config, config_path)
    weights = _Weights(path)
    arrays = _saelens_arrays(weights, kind)
    for name, axis in (("d_in", "D"), ("d_sae", "F")):
        if config.get(name) != weights.sizes[axis]:
            raise _refusal(config_path, name, config.get(name), f"W_enc has {axis} {weights.sizes[axis]}")
    if kind == "topk" and config.get("rescale_acts_by_decoder_norm"):
        arrays |= _scaled_to_unit_rows(arrays["W_enc"], arrays["b_enc"], arrays["W_dec"])
    k = _check_k(config_path, config.get("k")) if kind == "topk" else 0
    return _normal_form(**arrays, **_own_kind(config, k), centred=bool(config.get("apply_b_dec_to_input", True)))


def _check_saelens(config: Mapping[str, Any], path: Path) -> str:
    """Return the architecture, after refusing what a suite cannot do."""
    for name, (allowed, why) in _SAELENS_FIXED.items():
        if config.get(name) is not None and config[name] not in allowed:
            raise _refusal(path, name, config[name], why)
    kind = config.get("architecture")
    if kind not in ("standard", "topk", "jumprelu", "gated"):
        known = "a suite can hold standard, topk, jumprelu and gated"
        raise _refusal(path, "architecture", kind, f"{known} (save_inference_model writes BatchTopK as jumprelu)")
    return kind


def _saelens_arrays(weights: _Weights, kind: str) -> dict[str, Any]:
    arrays = {name: weights.take(name, axes) for name, axes in _PARAMETERS.items() if name != "b_enc"}
    if kind == "gated":
        arrays |= _gated(arrays["W_enc"], *(weights.take(name, "F") for name in ("r_mag", "b_gate", "b_mag")))
    else:
        arrays["b_enc"] = weights.take("b_enc", "F")
    if kind == "jumprelu":
        arrays["threshold"] = weights.take("threshold", "F")
    if "scaling_factor" in weights and not (weights.take("scaling_factor", "F") == 1).all():
        raise InputError(f"{weights.path}: tensor scaling_factor is not 1; a suite has no factor after the activation")
    weights.check_rest(f"SAELens' {kind} SAEs")
    return _relu(arrays) if kind == "standard" else arrays


def _own_kind(config: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Return k and, of an SAE that `write_saelens` wrote, the suite's architecture that it came from."""
    kind, own_k = (config["metadata"].get(f"jaxsae_{name}") for name in ("architecture", "k"))
    is_own = kind in ARCHITECTURES and (kind == "topk") == (config["architecture"] == "topk") and type(own_k) is int
    if not is_own or architecture(kind).centres_input != config.get("apply_b_dec_to_input", True):
        return {"k": k}
    return {"k": k or own_k, "kind": kind}


def write_saelens(
    folder: str | os.PathLike, sae: SaeSuite, *, layer: int, model: str, context: Mapping[str, Any] | None = None
) -> None:
    """Write one layer's SAE as a SAELens folder of version 6: topk, or jumprelu with a threshold for each latent.

    Args:
        sae: without an L axis, in residual units.
        layer: the block whose output it reads; in TransformerLens' terms `blocks.LAYER.hook_resid_post`.
        model: the language model's name.
        context: what else SAELens keeps in its metadata, such as `context_size` and `prepend_bos`.
    """
    folder, is_topk = Path(folder), sae.architecture == "topk"
    names = ["W_enc", "b_enc", "W_dec", "b_dec", *([] if is_topk else ["threshold"])]
    arrays = {name: np.ascontiguousarray(getattr(sae, name), dtype=np.float32) for name in names}
    config: dict[str, Any] = {
        "architecture": "topk" if is_topk else "jumprelu",
        "d_in": sae.d_model,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": architecture(sae.architecture).centres_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if is_topk else {}),
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "model_name": model,
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
            **(context or {}),
            "jaxsae_architecture": sae.architecture,
            "jaxsae_k": sae.k,
        },
    }
    with artifacts.atomic_write(folder / SAELENS_WEIGHTS) as partial:
        safetensors.numpy.save_file(arrays, partial)
    artifacts.write_text(folder / SAELENS_CONFIG, json.dumps(config, indent=1, ensure_ascii=False) + "\n")


# sparsify


_SPARSIFY_FIXED = {
    "activation": ("topk", "a suite keeps the largest latents of all, not of each group"),
    "transcode": (False, "a transcoder reads one place and writes another"),
    "skip_connection": (False, "a suite has no linear path beside the latents"),
    "signed": (False, "a suite's features are positive"),
}


def _read_sparsify(path: Path) -> SaeSuite:
    config_path = path.with_name("cfg.json")
    config = _read_object(config_path)
    for name, (allowed, why) in _SPARSIFY_FIXED.items():
        if config.get(name, allowed) != allowed:
            raise _refusal(config_path, name, config[name], why)
    weights = _Weights(path)
    arrays: dict[str, Any] = {
        "W_enc": weights.take("encoder.weight", "F D").T,
        "b_enc": weights.take("encoder.bias", "F"),
        "W_dec": weights.take("W_dec", "F D"),
        "b_dec": weights.take("b_dec", "D"),
    }
    weights.check_rest("sparsify's SAEs")
    return _normal_form(**arrays, k=_check_k(config_path, config.get("k")))


# dictionary_learning: config.json names the class, whose tensors and encoder differ from the others'.


def _dictionary_config(path: Path) -> dict[str, Any]:
    config_path = path.with_name("config.json")
    trainer = _read_object(config_path).get("trainer")
    if not isinstance(trainer, dict):
        raise InputError(f"{config_path} lacks the object 'trainer', which names the SAE's class and layer")
    return trainer


def _locate_dictionary(path: Path, names: tuple[str, ...]) -> Origin:
    trainer = _dictionary_config(path)
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
    told = _origin_by_names(path, [str(submodule)] if submodule else names, model=str(trainer.get("lm_name") or ""))
    return dataclasses.replace(told, site=f"layer {layer}", layer=layer) if type(layer) is int else told


def _read_dictionary(path: Path) -> SaeSuite:
    trainer, config_path = _dictionary_config(path), path.with_name("config.json")
    name = trainer.get("dict_class")
    if name not in _DICTIONARIES:
        raise _refusal(config_path, "dict_class", name, f"a suite can hold {', '.join(_DICTIONARIES)}")
    weights = _Weights(path)
    arrays = _DICTIONARIES[name](weights)
    weights.drop("k", "threshold", "group_sizes")
    weights.check_rest(f"dictionary_learning's {name}")
    if name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        arrays["k"] = _check_k(config_path, trainer.get("k"))
    return _normal_form(**arrays)


def _one_threshold(weights: _Weights, arrays: dict[str, Any]) -> dict[str, Any]:
    return arrays | {"threshold": np.broadcast_to(weights.take("threshold", ""), arrays["b_enc"].shape)}


def _standard_dictionary(weights: _Weights) -> dict[str, Any]:
    """Return a ReLU SAE with unit decoder rows, as the library's own loader scales it."""
    arrays = _linear(weights, "bias", "encoder.bias")
    return _relu(arrays | _scaled_to_unit_rows(arrays["W_enc"], arrays["b_enc"], arrays["W_dec"]))


def _gated_dictionary(weights: _Weights) -> dict[str, Any]:
    arrays = _linear(weights, "decoder_bias", None)
    return arrays | _gated(arrays["W_enc"], *(weights.take(name, "F") for name in ("r_mag", "gate_bias", "mag_bias")))


_DICTIONARIES: dict[str, Callable[[_Weights], dict[str, Any]]] = {
    "AutoEncoder": _standard_dictionary,
    "AutoEncoderNew": lambda weights: _relu(_linear(weights, "decoder.bias", "encoder.bias")) | {"centred": False},
    "GatedAutoEncoder": _gated_dictionary,
    "JumpReluAutoEncoder": lambda weights: (
        _parameters(weights) | {"threshold": weights.take("threshold", "F"), "centred": False}
    ),
    "AutoEncoderTopK": lambda weights: _linear(weights, "b_dec", "encoder.bias"),
    "BatchTopKSAE": lambda weights: _one_threshold(weights, _linear(weights, "b_dec", "encoder.bias")),
    "MatryoshkaBatchTopKSAE": lambda weights: _one_threshold(weights, _parameters(weights)),
}


# OpenAI: the .pt files' tensors in safetensors or .npz, named by their layer, with `activation` beside them.


def _locate_openai(path: Path, names: tuple[str, ...]) -> Origin:
    return _origin_by_names(path, (path.stem, *names))


def _read_openai(path: Path) -> SaeSuite:
    weights = _Weights(path)
    activation = weights.notes.get("activation")
    if activation == "TopK":
        why = "OpenAI's code then normalises each row by its own mean and deviation, which a suite cannot do"
        raise _refusal(path, "activation", activation, why)
    if activation != "ReLU":
        raise _refusal(path, "activation", activation, "expected ReLU, in the file's metadata, as the .pt file has it")
    arrays = _linear(weights, "pre_bias", "latent_bias")
    weights.drop("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
    weights.check_rest("OpenAI's autoencoders")
    return _normal_form(**_relu(arrays))


# Gemma Scope; its second version writes w_enc and w_dec.


def _read_gemma_scope(path: Path) -> SaeSuite:
    weights = _Weights(path)
    names = {name: name.lower() if name.lower() in weights else name for name in _PARAMETERS}
    arrays: dict[str, Any] = {name: weights.take(names[name], axes) for name, axes in _PARAMETERS.items()}
    arrays["threshold"] = weights.take("threshold", "F")
    weights.check_rest("Gemma Scope's SAEs")
    return _normal_form(**arrays, centred=False)


LAYOUTS = {
    "saelens": Layout(r"sae_weights\.safetensors", _locate_saelens, _read_saelens),
    "sparsify": Layout(r"sae\.safetensors", _origin_by_names, _read_sparsify),
    "dictionary_learning": Layout(r"ae\.(safetensors|npz)", _locate_dictionary, _read_dictionary),
    "openai": Layout(r"\d+\.(safetensors|npz)", _locate_openai, _read_openai),
    "gemma_scope": Layout(r"params\.(safetensors|npz)", _origin_by_names, _read_gemma_scope),
}
