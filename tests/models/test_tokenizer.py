"""Tokenizers of model folders and of .gguf metadata: the ids of their references, and what does not fit is refused."""

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from gguf import TokenType
from tokenizers import pre_tokenizers, trainers
from transformers.tokenization_utils_base import generate_merges

from jaxsae import models
from jaxsae.artifacts import InputError
from jaxsae.models.tokenizer import from_gguf


def test_from_folder__reads_and_writes_text(write_model, train_tokenizer):
    folder, _ = write_model(vocab_size=300)
    exact = train_tokenizer(folder, 270)
    tokenizer = models.load(folder).tokenizer
    text = "Hello world. The dog ran.\nÄh?"
    assert tokenizer.encode(text) == exact.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == exact.token_to_id("<|endoftext|>") == 0


def test_from_folder__vocab_and_merges_are_enough(tmp_path, write_model, train_tokenizer):
    folder, _ = write_model(vocab_size=300)
    exact = train_tokenizer(tmp_path / "elsewhere", 270)
    exact.model.save(str(folder))
    assert not (folder / "tokenizer.json").exists()
    tokenizer = models.load(folder).tokenizer
    assert tokenizer.encode("Hello world. The cat") == exact.encode("Hello world. The cat").ids


@pytest.mark.parametrize("special", [(), ("<|endoftext|>",)])
def test_from_folder__a_file_with_no_end_of_text_token_gets_none_invented(write_model, train_tokenizer, special):
    folder, _ = write_model(vocab_size=270)
    train_tokenizer(folder, 270, special)
    tokenizer = models.load(folder).tokenizer
    assert len(tokenizer) == 270
    assert tokenizer.eos_token_id == (0 if special else None)


def test_from_folder__that_is_no_bpe_is_followed_to_the_letter(write_model):
    folder, _ = write_model()
    words = tokenizers.models.WordLevel({"the": 0, "cat": 1, "sat": 2, "[UNK]": 3}, unk_token="[UNK]")
    exact = tokenizers.Tokenizer(words)
    exact.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    exact.save(str(folder / "tokenizer.json"))
    assert models.load(folder).tokenizer.encode("the cat sat down") == [0, 1, 2, 3]


def test_from_folder__with_ids_beyond_the_vocabulary_does_not_fit(write_model, train_tokenizer):
    folder, _ = write_model(vocab_size=269)
    train_tokenizer(folder, 270)
    with pytest.raises(InputError, match="tokenizer does not fit: its largest id is 269, the model's 268"):
        models.load(folder)


def test_from_folder__that_encodes_everything_to_nothing_does_not_fit(write_model):
    folder, _ = write_model()
    exact = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"qqq": 0}, merges=[]))
    exact.save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match="tokenizer does not fit: it encodes every text to no token"):
        models.load(folder)


def test_from_folder__byte_level_that_does_not_give_a_text_back_does_not_fit(write_model, train_tokenizer):
    folder, _ = write_model(vocab_size=300)
    exact = train_tokenizer(folder, 270)
    exact.normalizer = tokenizers.normalizers.Lowercase()
    exact.save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer does not fit: 'Déjà vu.*comes back from its tokens as 'déjà vu"):
        models.load(folder)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"model": {"type": "X"}})])
def test_from_folder__a_damaged_file_is_one_line(write_model, text):
    folder, _ = write_model()
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="the tokenizer cannot be read") as caught:
        models.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def bpe(texts):
    """Return tokens and merges of a small byte-level BPE."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"],
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([*texts * 3, "1234 123 12  1 it's 999 333  x"], trainer)
    vocabulary = backend.get_vocab()
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    return tuple(sorted(vocabulary, key=vocabulary.get)), tuple(merges)


def byte_level_keys(split, tokens, merges):
    types = [TokenType.CONTROL if token.startswith("<|") else TokenType.NORMAL for token in tokens]
    keys = {"model": "gpt2", "pre": split, "tokens": list(tokens), "merges": [" ".join(m) for m in merges]}
    keys |= {"token_type": [int(kind) for kind in types], "bos_token_id": 0, "eos_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def read(keys, n_vocab=None):
    """Return the tokenizer of a file's metadata, for a model of as many ids where `n_vocab` does not say."""
    return from_gguf(Path("model.gguf"), keys, n_vocab or len(keys["tokenizer.ggml.tokens"]))


def reference_of(split, tokens, merges):
    """Return transformers' own class for a split, or for those it has none its GPT-2 with the split of llama.cpp."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    own = transformers.Qwen2Tokenizer if split == "qwen2" else transformers.GPT2Tokenizer
    reference = own(vocab=vocabulary, merges=list(merges))
    if split == "smollm":
        reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return reference


@pytest.mark.parametrize("split", ["gpt-2", "qwen2", "smollm"])
def test_from_gguf__byte_level_gives_transformers_ids(bpe, texts, split):
    tokens, merges = bpe
    found, reference = read(byte_level_keys(split, tokens, merges)), reference_of(split, tokens, merges)
    for text in texts:
        expected = reference.encode(text, add_special_tokens=False)
        assert found.encode(text) == expected, text
        if split != "qwen2":
            assert found.decode(expected) == text
    assert found.encode("a<|endoftext|>b") == [tokens.index("a"), 0, tokens.index("b")]
    assert (found.bos_token_id, found.eos_token_id, len(found)) == (0, 0, len(tokens))


def test_from_gguf__splits_differ_where_they_should(bpe):
    splits = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
    found = {split: read(byte_level_keys(split, *bpe)).tokenize("x  1234 it'S") for split in splits}
    assert found["smollm"][:6] == ["x", "ĠĠ", "1", "2", "3", "4"]
    assert found["gpt-2"][2] != "1"
    assert "".join(found["llama-bpe"]).startswith("xĠĠ")
    assert [token for token in found["qwen2"] if token.isdigit()] == ["1", "2", "3", "4"]


def test_from_gguf__llama_bpe_takes_a_whole_word_that_no_merge_leads_to(bpe):
    tokens, merges = bpe
    keys = {split: byte_level_keys(split, (*tokens, "zebra"), merges) for split in ("llama-bpe", "qwen2")}
    assert read(keys["llama-bpe"]).encode("zebra") == [0, len(tokens)]
    assert len(read(keys["qwen2"]).encode("zebra")) > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "viking"}, r"tokenizer\.ggml\.pre = 'viking' is not supported; it is one of codeshell, .*qwen2"),
        ({"pre": None}, r"tokenizer\.ggml\.pre = None is not supported"),
        ({"merges": None}, r"tokenizer\.ggml\.merges has nothing, expected a list"),
        ({"merges": ["a qqq"]}, r"the merge 'a qqq' is not of two tokens to a third"),
        ({"token_type": [1, 1]}, r"tokenizer\.ggml\.token_type has 2 entries, expected \d+, one a token"),
        ({"bos_token_id": 9999}, r"tokenizer\.ggml\.bos_token_id = 9999, but the file has tokens 0 to \d+"),
    ],
)
def test_from_gguf__names_what_cannot_be_read(bpe, change, message):
    keys = byte_level_keys("gpt-2", *bpe) | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(InputError, match=rf"model\.gguf: .*{message}"):
        read({key: value for key, value in keys.items() if value is not None})


def test_from_gguf__that_does_not_fit_the_model_is_refused(bpe):
    tokens, merges = bpe
    with pytest.raises(InputError, match=rf"does not fit: its largest id is {len(tokens) - 1}, the model's 98"):
        read(byte_level_keys("gpt-2", tokens, merges), 99)
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.tokens holds 'a' twice"):
        read(byte_level_keys("gpt-2", (*tokens, "a"), merges), 999)


def sentencepiece_keys(texts):
    """Return a vocabulary as Llama 2's: unknown, control and byte tokens, then pieces whose scores fall."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    backend.train_from_iterator([f" {text}" for text in texts if text.isascii() and "<" not in text], trainer)
    pieces = backend.get_vocab()
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learnt = sorted(pieces, key=pieces.get)
    tokens, types = [*head, *learnt], [2, 3, 3, *[6] * 256, *[1] * len(learnt)]
    scores = [0.0] * len(head) + [-float(rank) for rank in range(len(learnt))]
    keys = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    keys |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def test_from_gguf__sentencepiece_gives_transformers_ids(texts):
    keys = sentencepiece_keys(texts)
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    n_head = 259
    pieces = {token: index for token, index in vocabulary.items() if index >= n_head}
    merges = generate_merges(pieces, dict(zip(tokens, scores, strict=True)))
    found, reference = read(keys), transformers.LlamaTokenizer(vocab=vocabulary, merges=merges)
    for text in texts:
        if text and not text.startswith(" ") and "<s>" not in text:
            expected = reference.encode(text, add_special_tokens=False)
            assert found.encode(text) == [1, *expected], text
            assert found.decode(expected) == text
    assert len(found.tokenize("The capital of France")) < 12


def test_from_gguf__sentencepiece_puts_a_space_before_every_text(texts):
    keys = sentencepiece_keys(texts)
    with_space = read(keys)
    assert "".join(with_space.tokenize("  hi")) == "▁▁▁hi"
    assert with_space.decode(with_space.encode("  hi", add_special_tokens=False)) == "  hi"
    without = read(keys | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})
    assert "".join(without.tokenize("  hi")) == "▁▁hi"
    assert without.encode("é")[-2:] == [3 + 0xC3, 3 + 0xA9]
    ended = read(keys | {"tokenizer.ggml.add_eos_token": True}).encode("hi")
    assert (ended[0], ended[-1]) == (1, 2)


def test_from_gguf__chat_template_is_the_files(bpe):
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    found = read(byte_level_keys("gpt-2", *bpe) | {"tokenizer.chat_template": template})
    assert found.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
