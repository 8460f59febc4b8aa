import itertools
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxsae import models
from jaxsae.artifacts import Question
from jaxsae.data import read_documents, read_questions, world
from jaxsae.models import decoder, gpt2
from jaxsae.pipeline import demo_lm

TINY = demo_lm.Recipe(n_layer=2, n_embd=12, n_head=3, context=16, batch=5, n_steps=4, n_warmup=1)
N_SAMPLED = 50  # questions of each class of the shipped model


@pytest.fixture(scope="module")
def tiny_world():
    return world.generate(7, n_subjects=4, n_values=3)


@pytest.fixture(scope="module")
def tiny_folder(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo_lm")
    demo_lm.train(folder, tiny_world, TINY, seed=1)
    return folder


def test_train__writes_the_same_bytes_twice(tiny_world, tiny_folder, tmp_path):
    demo_lm.train(tmp_path, tiny_world, TINY, seed=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "corpus.txt.gz",
        "questions.jsonl",
    }
    assert all((tmp_path / name).read_bytes() == (tiny_folder / name).read_bytes() for name in names)
    demo_lm.train(tmp_path, tiny_world, TINY, seed=2)
    assert (tmp_path / "model.safetensors").read_bytes() != (tiny_folder / "model.safetensors").read_bytes()


def test_train__writes_what_the_ordinary_readers_read(tiny_world, tiny_folder):
    lm = models.load(tiny_folder)
    assert (lm.n_layers, lm.d_model, lm.n_positions) == (2, 12, 16)
    assert lm.bos_id == lm.eos_id == lm.tokenizer.bos_token_id == 256
    assert list(read_documents(tiny_folder / "corpus.txt.gz")) == list(tiny_world.documents)
    assert read_questions(tiny_folder / "questions.jsonl") == list(tiny_world.questions)


def test_make_tokenizer__has_one_token_for_each_word_and_loses_no_text(tiny_world, tiny_folder):
    tokenizer = models.load(tiny_folder).tokenizer
    for question in tiny_world.questions:
        words = re.findall(r" ?\w+|[^\w\s]", f"{question.question} {question.answers[0]}.")
        ids = tokenizer.encode("".join(words), add_special_tokens=False)
        assert [tokenizer.decode([i]) for i in ids] == words
    for text in ("Zürich, 東京 🙂\n\tx  y", " " + tiny_world.documents[0]):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_draw_batches__tells_all_documents_in_each_pass_in_another_order(tiny_world):
    tokenizer = demo_lm.make_tokenizer(tiny_world)
    batches = demo_lm._draw_batches(tiny_world.documents, tokenizer, TINY, 3)
    n_tokens = sum(len(tokenizer.encode(text).ids) for text in tiny_world.documents)
    n_batches = n_tokens // (TINY.batch * (TINY.context - 1))
    passes = [np.concatenate(list(itertools.islice(batches, n_batches))) for _ in range(2)]
    words = np.bincount(tokenizer.encode(" ".join(tiny_world.documents)).ids, minlength=tokenizer.get_vocab_size())
    for ids in passes:
        seen = np.bincount(ids.ravel(), minlength=tokenizer.get_vocab_size())
        assert seen[:256].sum() > 0.8 * words[:256].sum()
        assert seen[257:].sum() > 0.8 * words[257:].sum()
    assert not np.array_equal(*passes)


def test_fit__learns_a_batch_that_it_sees_again_and_again():
    recipe = demo_lm.Recipe(n_layer=2, n_embd=16, n_head=2, context=8, batch=3, n_steps=120, n_warmup=5)
    config = gpt2.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    batch = np.random.default_rng(0).integers(1, 11, (3, 8)).astype(np.int32)
    params = demo_lm.fit(config, recipe, itertools.repeat(batch), seed=0)
    predicted = np.asarray(decoder.logits(config, params, batch)[:, :-1].argmax(-1))
    before = np.asarray(decoder.logits(config, decoder.init(config, jax.random.key(0)), batch)[:, :-1].argmax(-1))
    assert (predicted[:, 1:] == batch[:, 2:]).mean() == 1.0
    assert (before[:, 1:] == batch[:, 2:]).mean() < 0.5


def test_describe__counts_classes_and_ranks_by_the_first_token():
    categories = ["often"] * 10 + ["seldom"] * 2 + ["never"] * 4 + ["misconception"] * 4
    wrong = np.array([False] * 10 + [False, True] + [True] * 4 + [True] * 4)
    questions = tuple(Question(str(i), f"what {i}", ("x",), f"g{i // 2}", c) for i, c in enumerate(categories))
    doubts = np.r_[np.linspace(0.1, 0.2, 11), 0.9, [0.8] * 4, [0.12] * 4]  # misconceptions sit among the right ones
    resid = np.random.default_rng(0).normal(size=(20, 2, 1, 3)).astype(np.float32)
    answers = tuple("red" if not is_wrong else "tea" for is_wrong in wrong)
    text = demo_lm.describe(demo_lm.Survey(questions, answers, wrong, 1 - doubts, resid))
    rows = {line[:36].strip(): line[36:].split() for line in text.splitlines()}
    assert text.splitlines()[1].split() == ["often", "5", "1.000", "0.85", "0.000"]
    assert text.splitlines()[2].split() == ["seldom", "1", "0.500", "0.45", "0.111"]
    assert text.splitlines()[4].split() == ["misconception", "2", "0.000", "0.88", "0.444"]
    assert "facts with a right answer: 6, with a wrong one: 5" in text
    ties = (8 + 0.5) / 11  # right answers that are as doubtful as 0.12 or more, a tie as one half
    assert rows["1 - p(first token)"] == [f"{x:.3f}" for x in ((5 + 4 * (1 - ties)) / 9, 1 - ties, 1.0)]
    assert rows["answer length, words"] == ["0.500"] * 3


def _header_accuracies():
    rows = re.findall(r"^ +(often|seldom|never|misconception) +\d+ +(\d\.\d+)", demo_lm.__doc__, flags=re.M)
    return {category: float(accuracy) for category, accuracy in rows}


def test_shipped_model__answers_as_its_header_says():
    lm = models.load("package://jaxsae/assets/demo_gpt2")
    questions = read_questions("package://jaxsae/assets/demo_gpt2/questions.jsonl")
    header = _header_accuracies()
    assert set(header) == set(world.SHARES)
    for category, accuracy in header.items():
        rows = [question for question in questions if question.category == category]
        sample = rows[:: len(rows) // N_SAMPLED][:N_SAMPLED]
        right = 1 - demo_lm.ask(lm, sample).is_wrong.mean()
        # four standard errors of a sample of this size, and half of the header's last digit
        assert abs(right - accuracy) <= 4 * (accuracy * (1 - accuracy) / N_SAMPLED) ** 0.5 + 0.01
    assert header["often"] >= 0.95


def test_shipped_files__are_the_world_of_the_seed_and_small():
    made = world.generate(demo_lm.SEED)
    assert read_questions(demo_lm.ASSET / "questions.jsonl") == list(made.questions)
    assert list(read_documents(demo_lm.ASSET / "corpus.txt.gz")) == list(made.documents)
    assert (demo_lm.ASSET / "tokenizer.json").read_text() == demo_lm.make_tokenizer(made).to_str(pretty=True) + "\n"
    assert sum(path.stat().st_size for path in demo_lm.ASSET.iterdir()) <= 8e6


def test_main__refuses_what_it_cannot_use(tmp_path):
    command = [sys.executable, "-m", "jaxsae.pipeline.demo_lm"]
    extra = subprocess.run([*command, "more"], capture_output=True, text=True, check=False)
    assert (extra.returncode, extra.stderr) == (2, "expected flags only, got more; see --help\n")
    missing = subprocess.run(
        [*command, "--only_measure", f"--out={tmp_path}/nowhere"], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert re.fullmatch(r"[^\n]*nowhere is not a folder[^\n]*\n", missing.stderr)
