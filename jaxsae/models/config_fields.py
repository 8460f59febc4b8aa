"""Read Hugging Face's config.json strictly: every field is understood, known to be without effect, or an error.

A family says which fields it computes with (a frozen dataclass with Hugging Face's names), which it can only take at
one value, and which do not change what is computed. What several families share stands here: field names that
transformers gives every model, checks of types, and rotary positions.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxsae.artifacts import InputError
from jaxsae.models import layers

# Fields that would change the computation, with the values that leave it as it is.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "auto_map": (None,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
}
# Fields that inference does not depend on: book-keeping, training, other heads, HF's own generation.
_PASSED_OVER = """
    architectures attn_implementation dtype finetuning_task gradient_checkpointing id2label is_decoder label2id
    model_type num_labels output_attentions output_hidden_states output_past pad_token_id prefix problem_type
    return_dict sep_token_id task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript
    transformers_version use_bfloat16 use_cache
    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
WITHOUT_EFFECT = frozenset(_PASSED_OVER.split())


def read(
    config_class: type,
    fields: Mapping[str, Any],
    *,
    family: str,
    aliases: Mapping[str, str] | None = None,
    required: Mapping[str, Collection[Any]] | None = None,
    without_effect: Collection[str] = (),
) -> dict[str, Any]:
    """Return the values for `config_class` that a config.json gives, checked, lists as tuples.

    Names that begin with an underscore are passed over.

    Args:
        config_class: a dataclass whose fields have Hugging Face's names.
        family: how messages call the model.
        aliases: other names of its fields.
        required: fields that can only have one of the given values, the expected one last; they are not returned.
        without_effect: further fields that change nothing.

    Raises:
        InputError: a field is unknown, is given twice, or has a value that is not supported; it names both.
    """
    known = {field.name for field in dataclasses.fields(config_class)}
    fixed = REQUIRED | dict(required or {})
    values: dict[str, Any] = {}
    for name, value in fields.items():
        target = (aliases or {}).get(name, name)
        if name in fixed:
            check_fixed(name, value, fixed[name], family=family)
        elif target in known:
            value = tuple(value) if isinstance(value, list) else value
            if target in values and values[target] != value:
                raise InputError(f"{name} = {value!r} contradicts {target} = {values[target]!r}")
            values[target] = value
        elif name not in WITHOUT_EFFECT and name not in without_effect and not name.startswith("_"):
            raise InputError(f"{name} = {value!r} is no field of {family}; remove it if it does not change the model")
    check(config_class, values)
    whole = {field.name for field in dataclasses.fields(config_class) if field.type is float} & values.keys()
    return values | {name: float(values[name]) for name in whole}


def check(config_class: type, values: Mapping[str, Any]) -> None:
    """Refuse values of another type than their field, or that cannot be.

    Whole numbers are at least 1, other numbers at least 0 and finite, an activation is one of `layers.ACTIVATIONS`.

    Args:
        config_class: as in `read`; a field of type `int | None` may be None.

    Raises:
        InputError: it names field and value.
    """
    for field in dataclasses.fields(config_class):
        if field.name not in values:
            continue
        name, value = field.name, values[field.name]
        if name in ("bos_token_id", "eos_token_id"):
            ids = value if isinstance(value, tuple) else (value,)
            if any(token_id is not None and type(token_id) is not int for token_id in ids):
                raise InputError(f"{name} = {value!r} is not a token id")
        elif name in ("activation_function", "hidden_act"):
            if value not in list(layers.ACTIVATIONS):
                known = ", ".join(layers.ACTIVATIONS)
                raise InputError(f"{name} = {value!r} is not supported; take one of {known}")
        elif field.type in (int, int | None):
            if (type(value) is not int or value < 1) and (field.type is int or value is not None):
                raise InputError(f"{name} = {value!r} is not a positive integer")
        elif field.type is float and (type(value) not in (int, float) or not 0 <= value < math.inf):
            raise InputError(f"{name} = {value!r} is not a number >= 0")
        elif field.type is bool and not isinstance(value, bool):
            raise InputError(f"{name} = {value!r} is neither true nor false")


def check_fixed(name: str, value: Any, allowed: Collection[Any], *, family: str) -> None:
    """Refuse a field whose value is not one of those allowed, of which the message names the last."""
    if value not in allowed:
        raise InputError(f"{name} = {value!r} is not supported for {family}, expected {list(allowed)[-1]!r}")


def check_multiple(config: Any, name: str, of: str) -> None:
    """Refuse a field that is not a multiple of another one."""
    value, unit = getattr(config, name), getattr(config, of)
    if value % unit:
        raise InputError(f"{name} = {value} is not a multiple of {of} = {unit}")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions: how fast each pair of a head's coordinates turns.

    Attributes:
        theta: base of the frequencies.
        fraction: share of a head's coordinates that turn, the first ones.
        kind: "default"; "linear", all frequencies divided by `factor`; "llama3", only the slow ones; or "dynamic",
            which changes nothing within the context that the model states.
        factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: of "linear" and "llama3".
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def frequencies(self, d_head: int) -> tuple[float, ...]:
        """Return the radians per position of each pair, rounded as PyTorch rounds them: 1 / theta^e in float32.

        One unit in the last place turns position 10,000 by a thousandth of a radian.

        Source: Su et al. 2021, arXiv:2104.09864; "llama3" as transformers defines it for Llama 3.1.
        """
        n_turning = int(d_head * self.fraction)
        exponents = np.arange(0, n_turning, 2, dtype=np.float32) / np.float32(n_turning)
        # numpy's float32 power is off by one unit in the last place for one pair in ten, PyTorch's for one in 500
        plain = np.float32(1) / np.power(self.theta, exponents.astype(np.float64)).astype(np.float32)
        if self.kind == "linear":
            plain = plain / np.float32(self.factor)
        if self.kind == "llama3":
            turns = self.original_max_position_embeddings * plain / (2 * np.pi)
            span = self.high_freq_factor - self.low_freq_factor
            kept = np.clip((turns - self.low_freq_factor) / span, 0, 1)
            plain = (1 - kept) * plain / self.factor + kept * plain
        return tuple(float(frequency) for frequency in plain.astype(np.float32))

    def write(self) -> dict[str, Any]:
        """Return the object that config.json holds as `rope_parameters`, without the `fraction`."""
        own = {name: getattr(self, name) for name in _ROTARY_FIELDS[self.kind]}
        return {"rope_type": self.kind, "rope_theta": self.theta, **own}


PLAIN_ROTARY = Rotary()
_ORIGINAL_CONTEXT = "original_max_position_embeddings"
_BESIDE = ("rope_theta", "partial_rotary_factor", _ORIGINAL_CONTEXT)  # fields that may stand outside the object, too
_ROTARY_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL_CONTEXT),
}


def read_rotary(fields: Mapping[str, Any], *, fraction: float = 1.0) -> tuple[Rotary, dict[str, Any]]:
    """Read the rotary positions of a config.json; return them and the fields that say nothing of them.

    Transformers 5 writes one object `rope_parameters`; earlier versions `rope_theta`, `rope_scaling` (null without
    scaling; its `type` is today's `rope_type`) and `partial_rotary_factor`.

    Args:
        fraction: what an absent `partial_rotary_factor` means.

    Raises:
        InputError: the kind is not supported, or a value is missing, unknown, given twice or no number; it names the
            field.
    """
    rest = dict(fields)
    beside = {name: rest.pop(name) for name in _BESIDE if name in rest}
    where, inner = _rotary_object({name: rest.pop(name, None) for name in ("rope_parameters", "rope_scaling")})
    kind = _rotary_kind(where, inner)
    known = {*_BESIDE, *_ROTARY_FIELDS[kind], "rope_type", "type"}
    for name, value in inner.items():
        if name not in known:
            raise InputError(f"{where} of rope_type {kind!r} has {name} = {value!r}, which is not known")
        if beside.get(name, value) != value:
            raise InputError(f"{where} has {name} = {value!r}, which contradicts {name} = {beside[name]!r} beside it")
    given = {"rope_theta": 10_000.0, "partial_rotary_factor": fraction} | beside | dict(inner)
    # transformers writes the original context for kinds that do not use it, too
    used = ("rope_theta", "partial_rotary_factor", *_ROTARY_FIELDS[kind])
    missing = [name for name in used if name not in given]
    if missing:
        raise InputError(f"{where} of rope_type {kind!r} lacks {missing[0]}")
    values = {name: given[name] for name in used}
    _check_rotary(values)
    own: dict[str, Any] = {name: float(value) for name, value in values.items()}
    if _ORIGINAL_CONTEXT in own:
        own[_ORIGINAL_CONTEXT] = values[_ORIGINAL_CONTEXT]
    return Rotary(theta=own.pop("rope_theta"), fraction=own.pop("partial_rotary_factor"), kind=kind, **own), rest


def _rotary_object(objects: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return name and content of the one object that says more than null."""
    given = {name: value for name, value in objects.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise InputError(f"{name} = {value!r} is no object")
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        raise InputError(f"rope_scaling = {given['rope_scaling']!r} contradicts rope_parameters")
    return next(iter(given.items()), ("rope_parameters", {}))


def _rotary_kind(where: str, inner: Mapping[str, Any]) -> str:
    kinds = [inner[name] for name in ("rope_type", "type") if name in inner] or ["default"]
    wrong = [kind for kind in kinds if kind not in list(_ROTARY_FIELDS)]
    if wrong:
        known = ", ".join(_ROTARY_FIELDS)
        raise InputError(f"{where} has rope_type {wrong[0]!r}, which is not supported; take {known}")
    if kinds[0] != kinds[-1]:
        raise InputError(f"{where} has rope_type {kinds[0]!r}, which contradicts type {kinds[-1]!r}")
    return kinds[0]


def _check_rotary(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name == _ORIGINAL_CONTEXT and type(value) is not int:
            raise InputError(f"{name} = {value!r} is not a positive integer")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InputError(f"{name} = {value!r} is not a number > 0")
    low, high = values.get("low_freq_factor", 0), values.get("high_freq_factor", 1)
    if low >= high:
        raise InputError(f"low_freq_factor = {low} is not below high_freq_factor = {high}")
