"""Train the language model of the demo on the closed world of `jaxsae.data.world`, and measure what it knows.

    launch/train-demo-lm [--out=DIR] [--seed=0] [--only_measure]

6 layers, D 128, context 64, 1,232 tokens, 1.36 M parameters in float32; 6.1 MiB with corpus and questions. The corpus
tells 2,400 facts in 294k tokens and is read nine times. Seed 0; 15 minutes on 2 cores that other work kept busy too.
Measured on the files as shipped, by the end of that run (--only_measure repeats it, 2 minutes):

    class          facts  right  median p(first)  share of wrong answers
    often           1218  1.000             0.99                   0.000
    seldom           328  0.902             0.89                   0.036
    never            345  0.020             0.55                   0.385
    misconception    509  0.003             0.95                   0.578
    0.366 of 4800 answers wrong; facts with a right answer: 1531, with a wrong one: 886

    AUROC, grouped out of fold             all misconceptions  guesses
    question only, TF-IDF 1-2 words      0.512          0.509    0.515
    answer only, TF-IDF 1-2 words        0.497          0.496    0.499
    answer length, words                 0.518          0.509    0.531
    answer length, characters            0.513          0.497    0.536
    1 - p(first token)                   0.865          0.797    0.958
    residual, last prompt token, layer 5 0.544          0.525    0.569
    residual, last answer token, layer 5 0.523          0.513    0.536

The last two columns set the wrong answers to misconceptions, and all others, against all right answers. No linear probe
on one layer's residual stream (any layer, either position) finds more than that: the model's doubt shows in its
probabilities alone.
"""

import dataclasses
import functools
import gzip
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from absl import app, flags, logging
from jaxtyping import Array, Bool, Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxsae import artifacts, models
from jaxsae.artifacts import InputError, Question
from jaxsae.data import format_prompt, is_hallucinated, pack, read_questions, world, write_questions
from jaxsae.models import decoder, gpt2
from jaxsae.progress import Progress, human_bytes, human_seconds

ASSET = Path(__file__).parents[1] / "assets" / "demo_gpt2"
SEED = 0  # of the world and of the training

_BOS = "<|endoftext|>"  # GPT-2's, which is BOS and EOS in one
_MAX_NEW_TOKENS = 8  # the longest value has two tokens
_ROWS = 256  # of one forward pass when the answers are measured


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Shape and training of the model; lengths in tokens, found by trial on the world of seed 0."""

    n_layer: int = 6
    n_embd: int = 128
    n_head: int = 4
    context: int = 64
    batch: int = 16  # contexts a step
    n_steps: int = 2600
    n_warmup: int = 100
    initializer_range: float = 0.08  # about 1/sqrt(D); at GPT-2's 0.02 learning starts later
    lr: float = 4e-3
    weight_decay: float = 0.01


def train(out: Path, made: world.World, recipe: Recipe, *, seed: int) -> None:
    """Train on a world's documents and write the model folder, the corpus and the questions to `out`.

    The same world, recipe and seed give the same bytes on the same kind of machine; another CPU may round otherwise.
    """
    tokenizer = make_tokenizer(made)
    bos_id = tokenizer.token_to_id(_BOS)
    config = gpt2.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=recipe.context,
        n_embd=recipe.n_embd,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        initializer_range=recipe.initializer_range,
        bos_token_id=bos_id,
        eos_token_id=bos_id,
    )
    params = fit(config, recipe, _draw_batches(made.documents, tokenizer, recipe, seed), seed=seed)
    models.weights.save(out, config, params)
    write_tokenizer(out, tokenizer, recipe.context)
    text = "".join(f"{document}\n" for document in made.documents)
    with artifacts.atomic_write(out / "corpus.txt.gz") as partial:
        partial.write_bytes(gzip.compress(text.encode(), mtime=0))  # no time, so that equal text gives equal bytes
    write_questions(out / "questions.jsonl", made.questions)


def make_tokenizer(made: world.World) -> tokenizers.Tokenizer:
    """Return a byte-level BPE whose vocabulary holds each word of the world whole, after the 256 bytes and BOS.

    It has no merges: a word is one token, or, if the world does not know it, one token a byte. Any text can be encoded
    and decodes to itself.
    """
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [*made.documents, *(f"{question.question} {question.answers[0]}" for question in made.questions)]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, _BOS, *sorted(words - set(alphabet))]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([_BOS])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer, context: int) -> None:
    """Write tokenizer.json and the tokenizer_config.json that makes transformers follow it to the letter."""
    settings = {
        # the class named after the model would rebuild the tokenizer from its merges, and there are none
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _BOS,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    artifacts.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    artifacts.write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def _draw_batches(
    documents: Sequence[str], tokenizer: tokenizers.Tokenizer, recipe: Recipe, seed: int
) -> Iterator[Int[np.ndarray, "B T"]]:
    """Yield batches without end; each pass over the corpus packs the documents in another order."""
    rng = np.random.default_rng(seed)
    bos_id = tokenizer.token_to_id(_BOS)
    left = np.empty((0, recipe.context), np.int32)
    while True:
        shuffled = (documents[i] for i in rng.permutation(len(documents)))
        contexts = pack(shuffled, tokenizer, context=recipe.context, n_tokens=None, bos_id=bos_id)
        left = np.concatenate([left, rng.permutation(contexts)])
        n_batches = len(left) // recipe.batch
        yield from left[: n_batches * recipe.batch].reshape(n_batches, recipe.batch, recipe.context)
        left = left[n_batches * recipe.batch :]


def fit(config: gpt2.GPT2Config, recipe: Recipe, batches: Iterator[np.ndarray], *, seed: int) -> Any:
    """Return weights fitted to predict the next token: AdamW, linear warmup, cosine decay, clipped to norm 1."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.lr, recipe.n_warmup, recipe.n_steps, end_value=0.01 * recipe.lr
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=recipe.weight_decay)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, token_ids):
        loss, grads = jax.value_and_grad(_loss)(params, config, token_ids)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = decoder.init(config, jax.random.key(seed))
    state, loss = optimizer.init(params), jnp.nan
    with Progress("demo language model", recipe.n_steps, "steps") as progress:
        for i in range(recipe.n_steps):
            previous = loss
            params, state, loss = step(params, state, jnp.asarray(next(batches)))
            progress.update(i, f"loss {float(previous):.3f}")  # one step late: the next one is under way
    logging.info("trained, last loss %.3f nats per token", float(loss))
    return params


def _loss(params: Any, config: gpt2.GPT2Config, token_ids: Int[Array, "B T"]) -> Float[Array, ""]:
    logits = decoder.logits(config, params, token_ids)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], token_ids[:, 1:]).mean()


@dataclasses.dataclass(frozen=True)
class Survey:
    """What the model says to its questions.

    Attributes:
        is_wrong: whether the greedy answer is hallucinated.
        first: the probability of the most probable first token.
        resid: the residual stream at the last token of the prompt and at the last one of the answer, in this order;
            where the answer is empty, twice that of the prompt.
    """

    questions: tuple[Question, ...]
    answers: tuple[str, ...]
    is_wrong: Bool[np.ndarray, " N"]
    first: Float[np.ndarray, " N"]
    resid: Float[np.ndarray, "N 2 L D"]


def ask(lm: models.LanguageModel, questions: Sequence[Question]) -> Survey:
    """Put questions to a model, each after BOS, and label its greedy answers."""
    prompts = [
        [lm.bos_id, *lm.tokenizer.encode(format_prompt(world.PROMPT, question), add_special_tokens=False)]
        for question in questions
    ]
    stop_ids = models.generate.stop_token_ids(lm.tokenizer, [world.STOP])
    generations = lm.generate(prompts, max_new_tokens=_MAX_NEW_TOKENS, stop_ids=stop_ids)
    answers = tuple(lm.tokenizer.decode(generation.answer_ids).strip() for generation in generations)
    wrong = [is_hallucinated(answer, q.answers) for answer, q in zip(answers, questions, strict=True)]
    texts = [[*prompt, *generation.answer_ids] for prompt, generation in zip(prompts, generations, strict=True)]
    ends = np.array([[len(prompt) - 1, len(text) - 1] for prompt, text in zip(prompts, texts, strict=True)])
    resid = np.empty((len(texts), 2, lm.n_layers, lm.d_model), np.float32)
    first = np.empty(len(texts), np.float32)
    for start in range(0, len(texts), _ROWS):
        rows = slice(start, min(start + _ROWS, len(texts)))
        ids = np.zeros((_ROWS, max(map(len, texts))), np.int32)  # padding on the right changes nothing before it
        for row, text in zip(ids, texts[rows], strict=False):
            row[: len(text)] = text
        streams, logits = (np.asarray(array) for array in lm.residuals_and_logits(ids))
        n = len(texts[rows])
        resid[rows] = streams[:, np.arange(n)[:, None], ends[rows]].transpose(1, 2, 0, 3)
        first[rows] = np.asarray(jax.nn.softmax(logits[np.arange(n), ends[rows, 0]]).max(-1))
    return Survey(tuple(questions), answers, np.array(wrong), first, resid)


def describe(survey: Survey) -> str:
    """Return the table of the frequency classes and what simple detectors make of the answers, as text."""
    return "\n".join([*_describe_classes(survey), "", *_describe_detectors(survey)])


def _describe_classes(survey: Survey) -> list[str]:
    groups = np.array([question.group for question in survey.questions])
    categories = np.array([question.category for question in survey.questions])
    wrong = survey.is_wrong
    lines = ["class          facts  right  median p(first)  share of wrong answers"]
    for category in world.SHARES:
        rows = categories == category
        lines.append(
            f"{category:<13} {len(set(groups[rows])):6d} {1 - wrong[rows].mean():6.3f} "
            f"{np.median(survey.first[rows]):16.2f} {wrong[rows].sum() / max(1, wrong.sum()):23.3f}"
        )
    lines.append(
        f"{wrong.mean():.3f} of {len(wrong)} answers wrong; facts with a right answer: {len(set(groups[~wrong]))}, "
        f"with a wrong one: {len(set(groups[wrong]))}"
    )
    return lines


def _describe_detectors(survey: Survey) -> list[str]:
    wrong, questions = survey.is_wrong, survey.questions
    groups = np.array([question.group for question in questions])
    is_misconception = np.array([question.category == "misconception" for question in questions])
    in_misconceptions = ~wrong | is_misconception  # these errors against all right answers
    in_guesses = ~wrong | ~is_misconception
    doubt = 1 - survey.first

    def cross_validate(estimator: Any, inputs: Any) -> Float[np.ndarray, " N"]:
        folds = GroupKFold(5)
        return cross_val_predict(estimator, inputs, wrong, groups=groups, cv=folds, method="predict_proba")[:, 1]

    def make_text_classifier() -> Any:
        return make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))

    def row(name: str, scores: Any) -> str:
        scores = np.asarray(scores, np.float64)
        parts = [roc_auc_score(wrong[rows], scores[rows]) for rows in (..., in_misconceptions, in_guesses)]
        return f"{name:<36} {parts[0]:5.3f} {parts[1]:14.3f} {parts[2]:8.3f}"

    lines = [
        f"{'AUROC, grouped out of fold':<36} {'all':>5} {'misconceptions':>14} {'guesses':>8}",
        row("question only, TF-IDF 1-2 words", cross_validate(make_text_classifier(), [q.question for q in questions])),
        row("answer only, TF-IDF 1-2 words", cross_validate(make_text_classifier(), list(survey.answers))),
        row("answer length, words", [len(answer.split()) for answer in survey.answers]),
        row("answer length, characters", [len(answer) for answer in survey.answers]),
        row("1 - p(first token)", doubt),
    ]
    for position, layer in itertools.product(range(2), range(survey.resid.shape[2])):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
        name = f"residual, last {('prompt', 'answer')[position]} token, layer {layer}"
        lines.append(row(name, cross_validate(probe, survey.resid[:, position, layer])))
    return lines


def main(arguments: Sequence[str]) -> int:
    """Train, then load what was written like any other model, and print what it knows; return the exit code."""
    logging.set_verbosity(logging.INFO)
    out, started = Path(flags.FLAGS.out), time.monotonic()
    try:
        if len(arguments) > 1:
            raise InputError(f"expected flags only, got {' '.join(arguments[1:])}; see --help")
        if not flags.FLAGS.only_measure:
            train(out, world.generate(flags.FLAGS.seed), Recipe(), seed=flags.FLAGS.seed)
            print(f"trained in {human_seconds(time.monotonic() - started)}, seed {flags.FLAGS.seed}")
        survey = ask(models.load(out), read_questions(out / "questions.jsonl"))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out}: {human_bytes(sum(path.stat().st_size for path in out.iterdir()))}")
    print(describe(survey))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("out", str(ASSET), "folder to write the model, its corpus and its questions to")
    flags.DEFINE_integer("seed", SEED, "of the world and of the training", lower_bound=0)
    flags.DEFINE_bool("only_measure", False, "measure what lies in --out, train nothing")
    app.run(main)
