"""What each stage of a run takes: operations and bytes of a few kinds, peak memory, disk.

Everything follows from a `Job`'s sizes. `Work` becomes a time by the rates of a machine.
"""

import dataclasses
import math
from collections.abc import Callable

import jax

from jaxsae import activations, models
from jaxsae.activations import store as stores
from jaxsae.pipeline.rates import SHARES, Rates
from jaxsae.pipeline.sizes import Job, Number, Shape
from jaxsae.pipeline.train import PCA_ROWS
from jaxsae.sae.architectures import architecture
from jaxsae.sae.train import INIT_ROWS
from jaxsae.tracking.links import BLOCK_BYTES

_STARTED_BYTES = 2**30  # resident beside a stage's arrays: Python, jax, programs, what earlier stages leave
_SHARDS_IN_MEMORY = 4  # one computed, two being written, one as it left the device


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage does, on one device: operations, numbers ranked, bytes, and seconds that no rate explains."""

    model_flops: Number = 0.0
    sae_flops: Number = 0.0
    moved_bytes: Number = 0.0
    ranked: Number = 0.0
    disk_bytes: Number = 0.0
    fixed_seconds: Number = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def seconds(self, rates: Rates) -> Number:
        """Return the time, as if the kinds of work came one after the other."""
        parts = (
            self.model_flops / (rates.model * SHARES["model"]),
            self.sae_flops / (rates.sae * SHARES["sae"]),
            self.moved_bytes / (rates.moved * SHARES["moved"]),
            self.ranked / (rates.ranked * SHARES["ranked"]),
            self.disk_bytes / (rates.disk * SHARES["disk"]),
        )
        return sum(parts) + self.fixed_seconds


@dataclasses.dataclass(frozen=True)
class Need:
    """What one stage takes; memory is its peak, disk what it leaves (its largest moment, where that is more).

    Attributes:
        host_bytes: memory of the process without its devices' arrays.
        device_bytes: memory of each device; on a CPU it is the process's too.
    """

    stage: str
    work: Work
    host_bytes: Number
    device_bytes: Number
    disk_bytes: Number


def needs(job: Job) -> list[Need]:
    """Return what each stage takes, in order."""
    return [stage(job) for stage in SOURCES[job.config.activations.source]]


def _forward_bytes(job: Job, rows: int, length: int, *, keeps: bool) -> Number:
    """Return the device memory of one forward pass beside the weights: a block's own, and kept residual streams."""
    shape = job.shape
    block = 4 * rows * length * (8 * shape.d_model + 3 * shape.d_mlp) + 8 * rows * shape.n_heads * length**2
    return block + (4 * rows * length * shape.d_model * shape.n_layers if keeps else 0)


def _model_load(shape: Shape) -> Work:
    return Work(moved_bytes=4 * shape.n_bytes, fixed_seconds=2.0)  # read, checked, placed; tokenizer and compilation


def _extract(job: Job) -> Need:
    shape, context = job.shape, job.config.corpus.context
    shard = shape.n_layers * stores.SHARD_TOKENS * shape.d_model * 2
    rows = min(job.config.activations.batch, math.ceil(stores.SHARD_TOKENS / context))
    kept = 2 * rows * context * shape.d_model * shape.n_layers  # bfloat16, the pass before while this one runs
    stored = activations.required_bytes(shape.n_layers, job.n_tokens, shape.d_model)
    work = Work(
        model_flops=shape.forward_flops(job.n_tokens, context),
        moved_bytes=shape.forward_moved(job.n_tokens, context) + 5 * stored,
        disk_bytes=stored,
        fixed_seconds=5e-6 * job.n_tokens,  # tokenising, on one core
    )
    return Need(
        "extract",
        _model_load(shape) + work,
        host_bytes=_STARTED_BYTES + _SHARDS_IN_MEMORY * shard + 50 * job.n_tokens + kept,
        device_bytes=shape.n_bytes + _forward_bytes(job, rows, context, keeps=True) + 2 * kept,
        disk_bytes=stored,
    )


def _train(job: Job) -> Need:
    """Train from the store: batches are gathered on the host."""
    settings, recipe, shape = job.config.train, job.recipe, job.shape
    batch_bytes = 2 * shape.n_layers * settings.batch * shape.d_model
    reading = Work(moved_bytes=4 * recipe.total_steps * batch_bytes, disk_bytes=0.5 * recipe.total_steps * batch_bytes)
    checkpoint = _checkpoint_bytes(job)
    return Need(
        "train",
        _training(job, checkpoint) + reading + _model_load(shape),
        host_bytes=_STARTED_BYTES + max(_reading_bytes(job), _sampling_bytes(job)),
        device_bytes=max(_train_device_bytes(job), _delta_ce_device_bytes(job)),
        disk_bytes=3 * checkpoint,  # two are kept, while a third is written
    )


def _train_streaming(job: Job) -> Need:
    """Train on what the language model computes meanwhile; a checkpoint has the buffer in it."""
    shape, stream = job.shape, _stream(job)
    width = (shape.n_layers, shape.d_model)
    checkpoint = _checkpoint_bytes(job) + stream.buffer_bytes(*width) * stream.layer_shards * stream.data_shards
    rows, context = stream.pass_contexts, job.config.corpus.context
    buffer = stream.buffer_bytes(*width) + stream.pass_bytes(*width, context)
    return Need(
        "train",
        _training(job, checkpoint) + forward_work(job) + _model_load(shape),
        host_bytes=_STARTED_BYTES + _sampling_bytes(job) + 50 * job.n_tokens,
        device_bytes=shape.n_bytes
        + max(
            _train_device_bytes(job) + buffer + _forward_bytes(job, rows, context, keeps=False),
            _delta_ce_device_bytes(job),
        ),
        disk_bytes=3 * checkpoint,
    )


def _stream(job: Job) -> activations.StreamSizes:
    assert job.stream is not None, "a job that streams has a buffer"
    return job.stream


def forward_work(job: Job) -> Work:
    """Return one device's part in the language model's forward passes of a streaming run: refills, held-out rows."""
    stream, settings, context = _stream(job), job.config.train, job.config.corpus.context
    n_refills = job.recipe.total_tokens / stream.refill_rows
    n_other = _n_evaluations(job) * settings.evaluate_tokens + 4 * PCA_ROWS
    n_tokens = (n_refills * stream.refill_contexts * context + n_other) / job.n_devices
    written = 2 * job.shape.n_layers * job.shape.d_model * n_tokens
    flops, moved = job.shape.forward_flops(n_tokens, context), job.shape.forward_moved(n_tokens, context)
    return Work(model_flops=flops, moved_bytes=moved + 5 * written, fixed_seconds=5e-6 * job.n_tokens)


def _n_evaluations(job: Job) -> int:
    """Return how often held-out rows are gone through: each evaluation, and the best SAEs once more at the end."""
    return math.ceil(job.recipe.total_steps / job.config.train.evaluate_every) + 1


def _training(job: Job, checkpoint: Number) -> Work:
    """All steps, evaluations and checkpoints, and what is measured at the end."""
    n_checkpoints = math.ceil(job.recipe.total_steps / job.config.train.checkpoint_every)
    saving = Work(disk_bytes=n_checkpoints * checkpoint, fixed_seconds=0.3 * n_checkpoints)
    steps = _scale(_train_step(job), job.recipe.total_steps) + _scale(_evaluation(job), _n_evaluations(job))
    return steps + saving + _pca(job) + _delta_ce(job) + Work(fixed_seconds=8.0)


def _scale(work: Work, times: Number) -> Work:
    return Work(*(times * part for part in dataclasses.astuple(work)))


def _train_step(job: Job) -> Work:
    """One step on the device with the most layers: its products, the ranking, and Adam.

    Dense products are five of all latents; by kept latents one is left, and the others read or add the k rows of
    weights of each row of the batch: two reads and two additions, which read and write.
    """
    n_layers, rows, k = job.layers_per_device, job.rows_per_device, job.recipe.sae.k
    pre, width = n_layers * rows * job.latents_per_device, job.shape.d_model
    ranks = architecture(job.recipe.sae.architecture).imposes_k
    products = 2 if job.recipe.is_sparse else 10
    touched = 6 * n_layers * rows * k * width if job.recipe.is_sparse else 12 * pre
    return Work(
        sae_flops=products * pre * width,
        moved_bytes=4 * (8 * pre + touched + 8 * n_layers * rows * width + 14 * n_layers * job.sae_parameters),
        ranked=pre + 15 * n_layers * rows * k if ranks else 0,  # a kept number is scattered back
        fixed_seconds=1e-2,
    )


def _evaluation(job: Job) -> Work:
    """One evaluation on held-out rows: encode and decode."""
    settings = job.config.train
    rows = max(1, settings.evaluate_tokens // settings.batch) * job.rows_per_device
    pre = job.layers_per_device * rows * job.latents_per_device
    return Work(sae_flops=4 * pre * job.shape.d_model, moved_bytes=4 * 8 * pre, ranked=pre, fixed_seconds=0.05)


def _pca(job: Job) -> Work:
    """Covariance and eigenvectors of each layer in float64, on the host; a product runs at half of float32's rate."""
    width = job.shape.d_model
    flops = 2 * (2 * PCA_ROWS * width**2) + 2 * 20 * width**3
    return Work(sae_flops=job.shape.n_layers * flops, moved_bytes=job.shape.n_layers * 6 * 8 * PCA_ROWS * width)


def _delta_ce(job: Job) -> Work:
    """The model's loss with each layer replaced three ways: half the blocks on average, and all logits each time."""
    shape, context = job.shape, job.config.corpus.context
    n_tokens = _delta_ce_contexts(job) * context
    times = 3 * shape.n_layers
    half = Work(
        model_flops=shape.forward_flops(n_tokens, context) / 2 + shape.head_flops(n_tokens),
        moved_bytes=shape.forward_moved(n_tokens, context) / 2 + 4 * 28 * 4 / 3 * shape.n_vocab * n_tokens,
    )
    return _scale(half, times) + Work(fixed_seconds=3.0)


def _delta_ce_contexts(job: Job) -> int:
    n_held_out = max(1, round(job.config.train.held_out * (job.n_tokens // job.config.corpus.context)))
    batch = min(job.config.activations.batch, n_held_out)
    wanted = max(batch, min(n_held_out, job.config.train.delta_ce_tokens // job.config.corpus.context))
    return wanted - wanted % batch


def _delta_ce_device_bytes(job: Job) -> Number:
    shape, context = job.shape, job.config.corpus.context
    rows = min(job.config.activations.batch, _delta_ce_contexts(job))
    logits = 4 * rows * context * shape.n_vocab
    suite = 4 * shape.n_layers * _parameters(job)
    return shape.n_bytes + suite + 6 * logits + _forward_bytes(job, rows, context, keeps=True)


def _train_device_bytes(job: Job) -> Number:
    """The state (weights, Adam's two moments, the best weights), the gradients, and what the layers' losses keep.

    A loss's part, 5.5 [B F] + 4 [B D] in float32, is what XLA allots on a CPU for TopK, within a fifth for BatchTopK. A
    CPU computes one layer at a time, an accelerator as many as 4 GiB of features hold.
    """
    n_layers, rows, width = job.layers_per_device, job.rows_per_device, job.shape.d_model
    loss = rows * (5.5 * job.latents_per_device + 4 * width)
    losses = loss if jax.default_backend() == "cpu" else min(n_layers * loss, max(loss, 2**30 * 5.5))
    state = n_layers * (4 * job.sae_parameters + 3 * job.latents_per_device + 3 * width)
    return 4 * (state + n_layers * job.sae_parameters + losses) + 2 * n_layers * rows * width


def _reading_bytes(job: Job) -> Number:
    """Two groups of the shuffling buffer, one whose memory waits to be used again, and two batches."""
    row = 2 * job.shape.n_layers * job.shape.d_model
    return 3 * row * min(job.config.train.buffer_tokens, job.n_tokens) + 2 * row * job.config.train.batch


def _sampling_bytes(job: Job) -> Number:
    """The rows behind mean, scale and variance: bfloat16, twice, and of one layer float64 and what is made of it."""
    return (4 * job.shape.n_layers + 24) * job.shape.d_model * min(INIT_ROWS, job.n_tokens)


def _checkpoint_bytes(job: Job) -> int:
    """Return a checkpoint's bytes, float32: `best` and `last` weights, Adam's moments, counters, free rows' weights."""
    n_latents, width = job.recipe.n_latents, job.shape.d_model
    weights = _parameters(job) + n_latents + 1  # threshold and scale
    counters = n_latents + width + 6
    return 4 * job.shape.n_layers * (2 * weights + (2 + job.recipe.is_folded) * _parameters(job) + counters)


def _parameters(job: Job) -> int:
    """Return the numbers in one layer's whole SAE."""
    return 2 * job.shape.d_model * job.recipe.n_latents + job.recipe.n_latents + job.shape.d_model


def _answer(job: Job) -> Need:
    shape, length = job.shape, math.ceil(job.prompt_tokens) + job.answer_tokens
    rows = max(1, models.generate.TOKENS_PER_BATCH // length)
    n_steps = math.ceil(job.n_questions / rows) * job.answer_tokens
    work = Work(
        model_flops=shape.forward_flops(job.text_tokens, length)
        + shape.head_flops(job.n_questions * job.answer_tokens),
        moved_bytes=shape.forward_moved(job.text_tokens, length) + n_steps * shape.n_bytes,
        fixed_seconds=2e-3 * n_steps + 2.0,
    )
    cache = 8 * rows * length * shape.d_model * shape.n_layers
    return Need(
        "answer",
        _model_load(shape) + work,
        host_bytes=_STARTED_BYTES,
        device_bytes=shape.n_bytes + cache + _forward_bytes(job, rows, length, keeps=False) + 8 * rows * shape.n_vocab,
        disk_bytes=400 * job.n_questions,
    )


def _track(job: Job) -> Need:
    shape, settings, recipe = job.shape, job.config, job.recipe
    n_rows, n_latents = job.n_questions * (1 + job.answer_tokens), recipe.n_latents
    length = 16 * math.ceil((job.prompt_tokens + job.answer_tokens) / 16)
    n_positions, k = len(settings.features.positions), settings.tracking.top_k
    pre = shape.n_layers * n_rows * n_latents
    n_texts, batch = job.n_questions * length, settings.questions.batch
    resid = 2 * 3 * shape.n_layers * shape.d_model * job.n_questions
    kept = 8 * n_positions * settings.features.keep * shape.n_layers * job.n_questions
    matched = job.n_questions * shape.n_layers
    work = Work(
        model_flops=shape.forward_flops(n_texts, length),
        sae_flops=4 * pre * shape.d_model,
        moved_bytes=shape.forward_moved(n_texts, length) + 4 * 8 * pre,
        ranked=n_positions * shape.n_layers * job.n_questions * n_latents + pre,
        disk_bytes=resid + kept,
        fixed_seconds=matched * (4e-5 + 6e-11 * k**2 * shape.d_model + 5e-8 * k**2) + 2.0,
    )
    links = _links(job)
    suite = 4 * shape.n_layers * _parameters(job)
    stream = 4 * shape.n_layers * batch * length * shape.d_model
    encoded = 4 * batch * (1 + job.answer_tokens) * (5 * n_latents + 3 * shape.d_model)
    return Need(
        "track",
        _model_load(shape) + work + links.work,
        host_bytes=_STARTED_BYTES + max(3 * (resid + kept), resid + kept + links.host_bytes),
        device_bytes=shape.n_bytes + 2 * suite + stream + encoded + _forward_bytes(job, batch, length, keeps=False),
        disk_bytes=resid + kept + 60 * 25 * job.n_questions + links.disk_bytes,
    )


def _links(job: Job) -> Need:
    """The link graph, on the host: products and ranking of all pairs of latents in neighbouring layers.

    Seconds a pair are read off 24 s for 24 layers of 5,120 latents, D 1,024, on one core (`tests/bench/tracker.py`). By
    firing together, the model and the SAEs read some of the corpus first.
    """
    shape, settings, n_latents = job.shape, job.config.tracking, job.recipe.n_latents
    if settings.links == "none":
        return Need("links", Work(), 0, 0, 0)
    n_links, reads_corpus = min(settings.links_per_latent, n_latents), settings.links == "coactivation"
    n_pairs = (shape.n_layers - 1) * n_latents**2
    disk = (shape.n_layers - 1) * n_latents * (4 + 4 * n_links * (2 + reads_corpus))
    held = 8 * (settings.max_missed_layers + 2) * n_latents * shape.d_model
    work = Work(disk_bytes=disk, fixed_seconds=n_pairs * (1.5e-8 + 2.4e-11 * shape.d_model))
    if reads_corpus:
        context, keep = job.config.corpus.context, job.config.features.keep
        n_tokens = min(max(settings.links_tokens, context), job.n_tokens)
        pre = shape.n_layers * n_tokens * n_latents
        work += Work(
            model_flops=shape.forward_flops(n_tokens, context),
            sae_flops=2 * pre * shape.d_model,
            moved_bytes=shape.forward_moved(n_tokens, context) + 4 * 4 * pre,
            ranked=pre,
            fixed_seconds=3e-8 * n_pairs + 1e-8 * shape.n_layers * n_tokens * keep**2,
        )
        held += 8 * shape.n_layers * n_tokens * keep + 2 * 24 * n_tokens * keep
    return Need("links", work, host_bytes=2 * disk + held + 4 * BLOCK_BYTES, device_bytes=0.0, disk_bytes=disk)


def _detect(job: Job) -> Need:
    """Nested fits on the host; three residual probes over layers and two penalties are the most of it."""
    shape, settings = job.shape, job.config.detection
    n_fits = settings.repeats * 2 * settings.folds * 3 * 2 * shape.n_layers
    seconds_per_fit = 4e-9 * job.n_questions * shape.d_model + 2e-3  # lbfgs, two at a time on two cores
    others = settings.repeats * settings.folds * 8e-4 * job.n_questions + settings.bootstrap * 2e-3
    resid = 2 * 3 * shape.n_layers * shape.d_model * job.n_questions
    return Need(
        "detect",
        Work(fixed_seconds=n_fits * seconds_per_fit + others + 5.0),
        host_bytes=_STARTED_BYTES + 3 * resid + 60_000 * job.n_questions,
        device_bytes=0.0,
        disk_bytes=5000 * job.n_questions,
    )


def _evaluate(job: Job) -> Need:
    return Need(
        "evaluate",
        Work(fixed_seconds=4.0 + 0.2 * job.shape.n_layers),
        host_bytes=_STARTED_BYTES + 10_000 * job.n_questions,
        device_bytes=0.0,
        disk_bytes=2 * 2**20,
    )


# The stages of each `activations.source`.
SOURCES: dict[str, tuple[Callable[[Job], Need], ...]] = {
    "store": (_extract, _train, _answer, _track, _detect, _evaluate),
    "stream": (_train_streaming, _answer, _track, _detect, _evaluate),
}
