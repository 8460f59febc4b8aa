"""Which module reads, names and computes a model, by the `model_type` of its config.json.

A family is a module with

- a frozen config dataclass, its `read_config(fields)` and `write_config(config)`; the config has `model_type`,
  `n_layers`, `d_model`, `n_vocab`, `n_positions`, `n_key_heads`, `d_head`, `tie_word_embeddings`, `bos_token_id` and
  `eos_token_id`;
- `Model(config, key)`, an nnx module with stacked `blocks`, each called as `block(x, config, index, sight, dtype)`, and
  the methods `embed(token_ids, positions, config)` and `unembed(x, config, dtype)`;
- `tensor_name(path)`, `is_dot_operand(path)`, `KNOWN_BUFFERS`, `BASE_PREFIX` and `TIED_TABLE`: how its weights are
  called in checkpoints, and which may be stored in the compute dtype; `IN_OUT_MODULES`, whose weights checkpoints
  have as [in, out], the transpose of what they are here.
"""

from types import ModuleType
from typing import Any

from jaxsae.artifacts import InputError
from jaxsae.models import gpt2, llama, phi

FAMILIES: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": llama,
    "phi": phi,
    "qwen2": llama,
    "qwen3": llama,
}


def of(model_type: Any) -> ModuleType:
    """Return the family of a `model_type`.

    Raises:
        InputError: it is not supported.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"model_type = {model_type!r} is not supported; it is one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
