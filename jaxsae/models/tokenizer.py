"""Tokenizers: from the files of a model folder or the metadata of a .gguf file, checked against the model's vocabulary.

What comes out is a tokenizer of transformers. A .gguf file names the way text is split before merging
(`tokenizer.ggml.pre`); the ways of llama.cpp's supported models are known here, and another one is an error, because a
wrong split changes the tokens without a sound.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsae.artifacts import InputError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)

# Types of tokens in a .gguf file.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def from_folder(folder: Path, n_vocab: int) -> Any:
    """Load the tokenizer of a model folder; without tokenizer.json or vocab.json + merges.txt it is None.

    Where transformers' class for the model would encode otherwise than tokenizer.json says (it rebuilds a GPT-2
    tokenizer from the vocabulary alone), tokenizer.json is followed.

    Raises:
        InputError: the files are damaged, or the tokenizer does not fit the model (see `check`).
    """
    has_json = (folder / "tokenizer.json").is_file()
    if not has_json and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return None
    transformers = _transformers()
    tokenizer = _read_folder(transformers.AutoTokenizer, folder)
    if has_json and not _agrees(tokenizer, folder / "tokenizer.json"):
        tokenizer = _read_folder(transformers.PreTrainedTokenizerFast, folder)
    check(folder, tokenizer, n_vocab)
    return tokenizer


def _transformers() -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or the import prints a line about torch
    import transformers

    return transformers


def _read_folder(tokenizer_class: Any, folder: Path) -> Any:
    try:
        return tokenizer_class.from_pretrained(str(folder), local_files_only=True)
    # tokenizers reports a damaged file as a plain Exception, transformers as whatever it tripped over.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {reason})") from None


def _agrees(tokenizer: Any, path: Path) -> bool:
    import tokenizers

    exact = tokenizers.Tokenizer.from_file(str(path))
    same_ids = all(
        tokenizer.encode(text, add_special_tokens=False) == exact.encode(text, add_special_tokens=False).ids
        for text in _probes(tokenizer)
    )
    return same_ids and len(tokenizer) == exact.get_vocab_size(with_added_tokens=True)


def _probes(tokenizer: Any) -> list[str]:
    """Return texts of which a working tokenizer encodes at least one: a sentence, and its own first tokens."""
    first_tokens = [tokenizer.decode([token_id]) for token_id in range(min(len(tokenizer), 32))]
    return ["The capital of France is Paris.", " ".join(first_tokens), *first_tokens]


def check(source: Path, tokenizer: Any, n_vocab: int) -> None:
    """Refuse a tokenizer that does not fit the model.

    Raises:
        InputError: an id is outside the model's vocabulary, nothing can be encoded, or a byte-level tokenizer with all
            bytes does not give a text back.
    """
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= n_vocab:
        raise InputError(
            f"{source}: the tokenizer does not fit: its largest id is {highest}, the model's {n_vocab - 1}"
        )
    if not any(tokenizer.encode(text, add_special_tokens=False) for text in _probes(tokenizer)):
        raise InputError(f"{source}: the tokenizer does not fit: it encodes every text to no token at all")
    text = "Déjà vu: 12 345 naïve  facts\n\tend 🙂."
    if _is_byte_level(tokenizer) and (found := _there_and_back(tokenizer, text)) != text:
        raise InputError(f"{source}: the tokenizer does not fit: {text!r} comes back from its tokens as {found!r}")


def _is_byte_level(tokenizer: Any) -> bool:
    from tokenizers import pre_tokenizers

    vocabulary = tokenizer.get_vocab()
    has_all_bytes = all(character in vocabulary for character in pre_tokenizers.ByteLevel.alphabet())
    return has_all_bytes and "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)


def _there_and_back(tokenizer: Any, text: str) -> str:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix(" ")  # some put one in front


def from_gguf(path: Path, metadata: Mapping[str, Any], n_vocab: int) -> Any:
    """Build the tokenizer that a .gguf file's metadata describe; None where they describe none.

    Args:
        path: the file, for messages.
        metadata: the values of the file's keys.

    Raises:
        InputError: the kind of tokenizer or its way of splitting text is not supported, its parts are missing or
            contradict each other, or it does not fit the model (see `check`).
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{path}: tokenizer.ggml.model = {kind!r} is not supported; it is one of gpt2, llama")
    tokens, types = _vocabulary(path, metadata)
    is_bytes = kind == "gpt2"
    backend = _byte_level(path, metadata, tokens) if is_bytes else _sentencepiece(path, metadata, tokens, types)
    _add_special(backend, tokens, types)
    adds_bos = not is_bytes or metadata["tokenizer.ggml.pre"] in _WHOLE_WORDS  # as llama.cpp does
    tokenizer = _wrap(path, metadata, backend, tokens, adds_bos=adds_bos)
    check(path, tokenizer, n_vocab)
    return tokenizer


def _vocabulary(path: Path, metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = _array(path, metadata, "tokens", None)
    types = _array(path, metadata, "token_type", len(tokens)) if "tokenizer.ggml.token_type" in metadata else None
    if len(set(tokens)) != len(tokens):
        double = next(token for index, token in enumerate(tokens) if token in tokens[:index])
        raise InputError(f"{path}: tokenizer.ggml.tokens holds {double!r} twice; convert the model again")
    return tokens, types if types is not None else [_NORMAL] * len(tokens)


def _array(path: Path, metadata: Mapping[str, Any], key: str, length: int | None) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or (length is not None and len(values) != length):
        found = f"{len(values)} entries" if isinstance(values, list) else "nothing"
        expected = "a list" if length is None else f"{length}, one a token"
        raise InputError(f"{path}: tokenizer.ggml.{key} has {found}, expected {expected}; convert the model again")
    return values


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> how text is split before merging: at a pattern (Llama 3, Qwen 2, Mistral Nemo), at GPT-2's
# (None), or at every digit and then at GPT-2's ("digits").
# Source: llama.cpp, src/llama-vocab.cpp, and the models' tokenizer.json.
_SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), None),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "digits"),
}
# A word that is a token is taken whole, even where no merges lead to it.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
# Qwen's tokenizer.json composes accents first; llama.cpp does not.
_COMPOSED = ("qwen2",)


def _byte_level(path: Path, metadata: Mapping[str, Any], tokens: Sequence[str]) -> Any:
    """Return the byte-level BPE tokenizer of GPT-2's kind, without special tokens."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    split_name = metadata.get("tokenizer.ggml.pre")
    if split_name not in list(_SPLITS):
        raise InputError(
            f"{path}: tokenizer.ggml.pre = {split_name!r} is not supported; it is one of {', '.join(sorted(_SPLITS))}; "
            "use the model's folder with tokenizer.json"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _array(path, metadata, "merges", None)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for merge in merges:
        if len(merge) != 2 or any(part not in vocabulary for part in (*merge, "".join(merge))):
            raise InputError(f"{path}: the merge {' '.join(merge)!r} is not of two tokens to a third; convert it again")
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split_name in _WHOLE_WORDS))
    split = _SPLITS[split_name]
    splits: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, "digits"))]
    if split == "digits":
        splits.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif split is not None:
        splits.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.normalizer = normalizers.NFC() if split_name in _COMPOSED else None
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(path: Path, metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Any:
    """Return the BPE tokenizer of Llama's and Mistral's kind: a space is "▁", unknown characters fall back to bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = _array(path, metadata, "scores", len(tokens))
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    merges = _merges(tokens, types, scores)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token=_token(path, tokens, "unknown", unknown), fuse_unk=True, byte_fallback=True
        )
    )
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece implies: any two tokens that make a third, the highest score first."""
    index = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _NORMAL}
    ranked = sorted(index, key=lambda token: -scores[index[token]])
    pairs = ((token[:cut], token[cut:]) for token in ranked for cut in range(1, len(token)))
    return [pair for pair in pairs if pair[0] in index and pair[1] in index]


def _token(path: Path, tokens: Sequence[str], name: str, token_id: Any) -> str:
    if type(token_id) is not int or not 0 <= token_id < len(tokens):
        raise InputError(
            f"{path}: tokenizer.ggml.{name}_token_id = {token_id!r}, but the file has tokens 0 to {len(tokens) - 1}"
        )
    return tokens[token_id]


def _add_special(backend: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Have control tokens and those added by the model's makers taken whole wherever they stand in a text."""
    import tokenizers

    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            tokenizers.AddedToken(token, normalized=False, special=is_special)
            for token, own in zip(tokens, types, strict=True)
            if own == kind and token
        ]
        (backend.add_special_tokens if is_special else backend.add_tokens)(added)


def _wrap(path: Path, metadata: Mapping[str, Any], backend: Any, tokens: Sequence[str], *, adds_bos: bool) -> Any:
    """Return the tokenizer of transformers with the file's special tokens and chat template.

    Args:
        adds_bos: whether the begin-of-sequence token is put in front where the file does not say.
    """
    from tokenizers import processors

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {
        name: _token(path, tokens, key, metadata[f"tokenizer.ggml.{key}_token_id"])
        for name, key in names.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    ends = [
        special.get(f"{end}_token") if metadata.get(f"tokenizer.ggml.add_{end}_token", default) else None
        for end, default in (("bos", adds_bos), ("eos", False))
    ]
    frame = [ends[0], "$A", ends[1]]
    backend.post_processor = processors.TemplateProcessing(
        single=[part for part in frame if part is not None],
        special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(ends) if token is not None],
    )
    template = metadata.get("tokenizer.chat_template")
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **special
    )
