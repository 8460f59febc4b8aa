"""The sizes of a run before it runs: the language model's shape, from its config alone, and what the settings derive.

In: a config. Out: `Shape` and `Job`. No weights are read, and of the network at most a config.json.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsae import activations, data, sae
from jaxsae.artifacts import InputError, resolve_path
from jaxsae.config import CorpusConfig, ModelConfig, QuestionsConfig, RunConfig
from jaxsae.models import checkpoints, decoder, families, published, tokenizer
from jaxsae.pipeline.answer import load_questions, put
from jaxsae.pipeline.stages import tree_bytes

Number = int | float
CHARS_PER_TOKEN = 4.46  # GPT-2's tokenizer on paragraphs of the English Wikipedia
_SAMPLE_CHARS = 200_000  # of the corpus, to count its characters per token
_COUNTED_CHARS = 64_000_000  # read of a corpus before its size is estimated from its files' sizes
_SAMPLE_QUESTIONS = 200  # put into prompts, to count their tokens
_ASSUMED_QUESTIONS, _ASSUMED_PROMPT_TOKENS = 1000, 32
# Questions of the published sets.
_SET_SIZES = {
    "truthfulqa": 790,
    "halueval": 10_000,
    "triviaqa": 11_313,
    "nq_open": 3610,
    "popqa": 14_267,
    "known_1000": 1209,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of a language model decides sizes and times.

    Attributes:
        source: where the numbers are from, in words.
        d_mlp: width of the widest matrix of a block.
        n_heads: heads of queries.
        n_block_weights: weights of all blocks that enter dots.
        n_parameters: all of them, tied matrices once.
        n_bytes: the parameters' bytes in the compute dtype.
        tokenizer: if it is at hand.
    """

    name: str
    source: str
    dtype: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_vocab: int
    n_positions: int
    n_block_weights: int
    n_parameters: int
    n_bytes: int
    tokenizer: Any = None

    def forward_flops(self, n_tokens: Number, context: int) -> Number:
        """Return the operations of the blocks, every token attending to `context` positions as the program does."""
        return n_tokens * (2 * self.n_block_weights + 4 * self.n_layers * context * self.d_model)

    def head_flops(self, n_tokens: Number) -> Number:
        """Return the operations of the logits."""
        return n_tokens * 2 * self.d_model * self.n_vocab

    def forward_moved(self, n_tokens: Number, context: int) -> Number:
        """Return the bytes that norms, activations and softmax read and write in float32."""
        return n_tokens * self.n_layers * 4 * (16 * self.d_model + 6 * self.d_mlp + 6 * self.n_heads * context)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run's derived sizes.

    Attributes:
        n_tokens: of the corpus, whole contexts.
        prompt_tokens: of a question's prompt, on average.
        layers_per_device, latents_per_device, rows_per_device: of the SAEs and of a batch.
        stream: of the shuffle buffer, where activations are streamed.
        notes: what was assumed, one sentence each.
    """

    shape: Shape
    config: RunConfig
    recipe: sae.Recipe
    n_tokens: int
    n_questions: int
    prompt_tokens: Number
    n_devices: int
    layers_per_device: int
    latents_per_device: int
    rows_per_device: int
    stream: activations.StreamSizes | None = None
    notes: tuple[str, ...] = ()

    @property
    def sae_parameters(self) -> int:
        """Return the numbers in one layer's SAE, of which a device has its latents' share."""
        d_model, n_latents = self.shape.d_model, self.latents_per_device
        return 2 * d_model * n_latents + n_latents + d_model

    @property
    def answer_tokens(self) -> int:
        """Return the tokens of an answer, at most."""
        return self.config.questions.max_new_tokens

    @property
    def text_tokens(self) -> Number:
        """Return the tokens of all prompts and answers, at most."""
        return self.n_questions * (self.prompt_tokens + self.answer_tokens)


def read_shape(config: ModelConfig) -> Shape:
    """Return the shape of the config's model, from its own config.json, or as it was published.

    A path is looked at first; one that is not there yet, as of a package that is to be installed, gives way to the
    published shape of `model.name`. A name is looked for in the Hub's local cache, among the published shapes, and only
    then on the Hub, which may take half a minute to be out of reach.

    Raises:
        InputError: none of them has it, or the model is not supported.
    """
    known = published.find(config.name)
    if config.path is not None and known is not None and not _is_here(config.path):
        return _shape(config, known.fields, f"published shape of {config.name}; {config.path} is not here yet")
    if config.path is not None:
        return _shape_at(config, resolve_path(config.path))
    if not config.name:
        raise InputError("model.path and model.name are both unset; give a folder or a Hugging Face name")
    cached = _cached_config(config.name, config.revision)
    if cached is not None:
        return _shape_at(config, cached.parent)
    if known is not None:
        return _shape(config, known.fields, f"published shape of {config.name}")
    return _shape_at(config, _download_config(config.name, config.revision).parent)


def _is_here(path: str) -> bool:
    try:
        return resolve_path(path).exists()
    except InputError:  # a package that is not installed
        return False


def _shape_at(config: ModelConfig, path: Path) -> Shape:
    """Read a folder's config.json, weights or none beside it, or a .gguf file's metadata; and the tokenizer there."""
    if path.suffix == checkpoints.GGUF_SUFFIX and path.is_file():
        with checkpoints.open_checkpoint(path) as checkpoint:
            return _shape(config, checkpoint.fields, f"metadata of {path.name}", checkpoint.make_tokenizer)
    if not path.is_dir():
        raise InputError(f"model.path {path} is neither a model's folder nor a .gguf file")
    fields = checkpoints.read_object(path / checkpoints.CONFIG_FILE)
    return _shape(config, fields, f"{path}/config.json", lambda n_vocab: tokenizer.from_folder(path, n_vocab))


def _cached_config(name: str, revision: str | None) -> Path | None:
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _download_config(name: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the shape of {name} is not known here and the Hugging Face Hub did not give it ({reason}); give a folder "
            f"with its config.json as model.path, or one of {', '.join(published.PUBLISHED)}"
        ) from None


def _shape(
    config: ModelConfig, fields: Any, source: str, make_tokenizer: Callable[[int], Any] = lambda n_vocab: None
) -> Shape:
    family = families.of(fields.get("model_type"))
    try:
        own = family.read_config(fields)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    leaves = [
        (tuple(entry.key for entry in path), leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(decoder.abstract_params(own))
    ]
    operands = {path: shape for path, shape in leaves if family.is_dot_operand(path)}
    in_blocks = [shape for path, shape in operands.items() if path[0] == "blocks"]
    width = np.dtype(config.dtype).itemsize
    return Shape(
        name=config.name or source,
        source=source,
        dtype=config.dtype,
        n_layers=own.n_layers,
        d_model=own.d_model,
        d_mlp=max(max(shape[1:]) for shape in in_blocks),
        n_heads=max(1, own.d_model // own.d_head),
        n_vocab=own.n_vocab,
        n_positions=own.n_positions,
        n_block_weights=sum(math.prod(shape) for shape in in_blocks),
        n_parameters=sum(math.prod(shape) for _, shape in leaves),
        n_bytes=sum(math.prod(shape) * (width if path in operands else 4) for path, shape in leaves),
        tokenizer=make_tokenizer(own.n_vocab),
    )


def make_job(config: RunConfig, shape: Shape, *, devices: int) -> Job:
    """Derive the run's sizes.

    Raises:
        InputError: corpus or questions cannot be read, or the settings do not fit the model or the devices.
    """
    context = config.corpus.context
    if context > shape.n_positions:
        raise InputError(f"corpus.context is {context}, but {shape.name} reads {shape.n_positions} tokens at most")
    chars_per_token = _chars_per_token(config.corpus, shape)
    n_tokens, said = _count_tokens(config.corpus, chars_per_token)
    n_contexts = n_tokens // context
    n_held_out = max(1, round(config.train.held_out * n_contexts))
    n_train = (n_contexts - n_held_out) * (context - 1)
    recipe = sae.make_recipe(
        config.sae,
        config.train,
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        batches_per_epoch=n_train // config.train.batch,
    )
    n_questions, prompt_tokens, asked = _count_questions(config.questions, shape.tokenizer, chars_per_token)
    on_data, on_latent = config.mesh.data, config.mesh.latent
    on_layer = config.mesh.layer or max(1, min(devices // (on_data * on_latent), shape.n_layers))
    n_devices = on_layer * on_data * on_latent
    if n_devices > devices:
        raise InputError(
            f"mesh.layer {on_layer} x mesh.data {on_data} x mesh.latent {on_latent} takes {n_devices} devices, the "
            f"plan has {devices}; set --devices={n_devices}"
        )
    stream = None
    if config.activations.source == "stream":
        stream = activations.size_stream(
            n_train_tokens=n_train,
            rows_per_context=context - 1,
            batch=config.train.batch,
            buffer_tokens=config.train.buffer_tokens,
            replace=config.activations.replace,
            forward_batch=config.activations.batch,
            layer_shards=on_layer,
            data_shards=on_data,
            latent_shards=on_latent,
        )
    return Job(
        shape=shape,
        config=config,
        recipe=recipe,
        n_tokens=n_contexts * context,
        n_questions=n_questions,
        prompt_tokens=prompt_tokens,
        n_devices=n_devices,
        layers_per_device=math.ceil(shape.n_layers / on_layer),
        latents_per_device=math.ceil(recipe.n_latents / on_latent),
        rows_per_device=math.ceil(config.train.batch / on_data),
        stream=stream,
        notes=tuple(note for note in (said, asked) if note),
    )


def _chars_per_token(config: CorpusConfig, shape: Shape) -> Number:
    """Return the corpus's characters per token: counted on its beginning where corpus and tokenizer are at hand."""
    if shape.tokenizer is None or config.path is None:
        return CHARS_PER_TOKEN
    n_chars = n_tokens = 0
    for document in data.read_documents(config.path):
        n_chars += len(document)
        n_tokens += 1 + len(shape.tokenizer.encode(document, add_special_tokens=False))  # documents are divided by one
        if n_chars >= _SAMPLE_CHARS:
            break
    return n_chars / n_tokens


def _count_tokens(config: CorpusConfig, chars_per_token: Number) -> tuple[int, str]:
    """Return the tokens that the run would use, and what was assumed."""
    if config.path is None:
        if config.n_tokens is None:
            raise InputError("the corpus is not known: give corpus.path, or corpus.n_tokens to plan for")
        return config.n_tokens, ""
    n_chars = _count_chars(config.path, None if config.n_tokens is None else config.n_tokens * chars_per_token)
    n_tokens = round(n_chars / chars_per_token * config.context / (config.context - 1))  # each context begins with BOS
    if config.n_tokens is not None and n_tokens >= config.n_tokens:
        return config.n_tokens, ""
    said = f"the corpus has about {n_tokens:,} tokens, of {chars_per_token:.2f} characters each"
    return n_tokens, said + ("" if config.n_tokens is None else f", fewer than corpus.n_tokens {config.n_tokens:,}")


def _count_chars(path: str, enough: Number | None) -> Number:
    """Count the corpus's characters, up to `enough`; beyond 64 million they are extrapolated from the files' sizes."""
    n_chars = 0
    for document in data.read_documents(path):
        n_chars += len(document)
        if enough is not None and n_chars >= enough:
            return n_chars
        if n_chars >= _COUNTED_CHARS:
            files = resolve_path(path)
            packed = 3.5 if files.suffix in (".gz", ".xz") else 1.0  # prose shrinks to a third or a quarter
            return max(n_chars, packed * tree_bytes(files))
    return n_chars


def _count_questions(config: QuestionsConfig, tokenizer: Any, chars_per_token: Number) -> tuple[int, Number, str]:
    """Return the number of answers, the mean tokens of their prompts, and what was assumed. Nothing is downloaded."""
    each = 2 if config.answers == "given" else 1  # a right one and a wrong one
    if config.path is None:
        known = _SET_SIZES.get(config.name or "", _ASSUMED_QUESTIONS)
        n = config.n_questions or known
        said = f"questions.path is not set: {n:,} questions with prompts of {_ASSUMED_PROMPT_TOKENS} tokens"
        return each * n, _ASSUMED_PROMPT_TOKENS, said
    questions, format = load_questions(config)
    asked = data.make_prompter(format, prompt=config.prompt, shots=config.shots, stop=config.stop, chat=config.chat)
    some = questions[:: math.ceil(len(questions) / _SAMPLE_QUESTIONS)]
    if tokenizer is not None:
        length = float(np.mean([len(put(question, asked, tokenizer).prompt_ids) for question in some]))
    else:
        n_chars = float(np.mean([len(asked.template) + len(question.question) for question in some]))
        length = 1 + n_chars / chars_per_token
    return each * len(questions), length, ""
