"""What a run would take, said before it runs: time, memory and disk of each stage, and what does not fit.

Sizes follow from the config and the language model's shape (`sizes`), each stage's work from the sizes (`costs`), and
times are work over rates measured here (`rates`).
"""

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxsae.config import RunConfig
from jaxsae.pipeline.costs import Need, Work, forward_work, needs
from jaxsae.pipeline.rates import SHARES, Rates, measure_rates
from jaxsae.pipeline.sizes import Job, Number, make_job, read_shape
from jaxsae.progress import human_bytes, human_seconds

ERROR = 2.0  # a stage of more than half a minute took between half and twice its estimate where that was compared


def run(config: RunConfig, workdir: Path | None, *, devices: int | None, device_gib: Number | None) -> list[str]:
    """Return the plan, line by line.

    Args:
        workdir: the disk that is looked at and measured; None takes the folder for temporary files.
        devices: planned for, each like the one here; None takes those here.
        device_gib: memory of each, GiB; None takes that of those here.

    Raises:
        InputError: model, corpus or questions cannot be used, or the settings do not fit them.
    """
    shape = read_shape(config.model)
    job = make_job(config, shape, devices=devices or jax.local_device_count())
    folder = _existing(Path(tempfile.gettempdir()) if workdir is None else workdir)
    rates = measure_rates(shape, job.recipe, folder)
    is_host = jax.default_backend() == "cpu" and devices is None and device_gib is None
    of_device = None if is_host else _device_bytes() if device_gib is None else device_gib * 2**30
    return describe(job, needs(job), rates, Limits(shutil.disk_usage(folder).free, _host_bytes(), of_device))


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _host_bytes() -> Number:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf


def _device_bytes() -> Number:
    stats = jax.local_devices()[0].memory_stats()
    return math.inf if not stats else stats.get("bytes_limit", math.inf)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is there, bytes; infinite where it cannot be known.

    Attributes:
        disk: free space.
        host: memory of this machine.
        device: memory of each device; None where the device is the CPU and its memory the host's.
    """

    disk: Number
    host: Number
    device: Number | None


def describe(job: Job, stages: list[Need], rates: Rates, limits: Limits) -> list[str]:
    """Return the lines of the plan: the run's sizes, a row for each stage, what the times assume, what does not fit."""
    shape, recipe = job.shape, job.recipe
    rows = [_row(need, need.work.seconds(rates), limits) for need in stages]
    total = Need(
        "all",
        sum((need.work for need in stages), Work()),
        max(need.host_bytes for need in stages),
        max(need.device_bytes for need in stages),
        sum(need.disk_bytes for need in stages),
    )
    rows.append(_row(total, sum(need.work.seconds(rates) for need in stages), limits))
    return [
        f"{shape.name}: {shape.n_parameters:,} parameters, {shape.n_layers} layers of width {shape.d_model:,}, "
        f"{shape.dtype} ({shape.source})",
        f"{job.n_tokens:,} tokens in contexts of {job.config.corpus.context}; {recipe.n_layers} SAEs, "
        f"{recipe.sae.architecture}, F {recipe.n_latents:,}, k {recipe.sae.k}; {recipe.total_steps:,} steps of "
        f"{recipe.train.batch:,} tokens; {job.n_questions:,} questions; {job.n_devices} "
        f"{'device' if job.n_devices == 1 else 'devices'}",
        *(f"assumed: {note}" for note in job.notes),
        "",
        *_table(("stage", "time", "TFLOP a device", "host memory", "memory of a device", "disk"), rows),
        "",
        *_share_of_forward(job, stages, rates),
        *_assumptions(rates),
        *_misfits(job, stages, limits),
    ]


def _row(need: Need, seconds: Number, limits: Limits) -> tuple[str, ...]:
    host, device = _memory(need, limits)
    on_device = "-" if need.device_bytes == 0 else "(host)" if device is None else human_bytes(device)
    operations = f"{(need.work.model_flops + need.work.sae_flops) / 1e12:,.1f}"
    return need.stage, human_seconds(seconds), operations, human_bytes(host), on_device, human_bytes(need.disk_bytes)


def _memory(need: Need, limits: Limits) -> tuple[Number, Number | None]:
    """Return the memory of the process and of a device; None where the device is the host's CPU."""
    if limits.device is None:
        return need.host_bytes + need.device_bytes, None
    return need.host_bytes, need.device_bytes


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  " + "  ".join((first, *rest))


def _share_of_forward(job: Job, stages: list[Need], rates: Rates) -> Iterator[str]:
    """Say which share of a streaming run's training the language model takes."""
    if job.stream is None:
        return
    train = next(need for need in stages if need.stage == "train")
    share = forward_work(job).seconds(rates) / train.work.seconds(rates)
    yield (
        f"of train, {share:.0%} are the language model's forward passes: {job.stream.refill_contexts:,} contexts for "
        f"every {job.stream.refill_rows:,} rows, through a buffer of {job.stream.buffer_rows:,}"
    )


def _assumptions(rates: Rates) -> Iterator[str]:
    counted = {name: f"of which {share:.0%} counts" for name, share in SHARES.items()}
    yield (
        f"Times are work over rates, measured in {human_seconds(rates.seconds)} on {rates.where}; expect a factor of "
        f"{ERROR:g} either way, on a machine that does nothing else:"
    )
    yield f"  language model's products {rates.model / 1e9:,.0f} GFLOP/s, {counted['model']}"
    yield f"  SAEs' products            {rates.sae / 1e9:,.0f} GFLOP/s, {counted['sae']}"
    yield f"  top-k                     {rates.ranked / 1e6:,.0f} million numbers/s, {counted['ranked']}"
    yield f"  memory                    {rates.moved / 1e9:,.1f} GB/s, {counted['moved']}"
    yield f"  disk                      {rates.disk / 1e9:,.2f} GB/s, {counted['disk']}"
    yield (
        "The language model runs on one device (while streaming on all), the SAEs' layers on all; each is taken to be "
        "like the one here."
    )


def _misfits(job: Job, stages: list[Need], limits: Limits) -> Iterator[str]:
    """Yield a line for each thing that there is too little of."""
    disk = sum(need.disk_bytes for need in stages)
    if disk > limits.disk:
        yield (
            f"does not fit: {human_bytes(disk)} of disk are needed, {human_bytes(limits.disk)} are free; lower "
            "corpus.n_tokens, set activations.source=stream, or use a --workdir on another disk"
        )
    for need in stages:
        host, device = _memory(need, limits)
        if host > limits.host:
            yield (
                f"does not fit: {need.stage} needs {human_bytes(host)} of memory, this machine has "
                f"{human_bytes(limits.host)}; {_advice(need.stage)}"
            )
        if device is not None and limits.device is not None and device > limits.device:
            yield (
                f"does not fit: {need.stage} needs {human_bytes(device)} on a device, it has "
                f"{human_bytes(limits.device)}; {_advice(need.stage)}"
            )


def _advice(stage: str) -> str:
    return {
        "extract": "lower activations.batch or corpus.context, or set model.dtype=bfloat16",
        "train": "lower train.buffer_tokens, train.batch or sae.n_latents, or use more devices (mesh.layer)",
        "answer": "set model.dtype=bfloat16, or lower questions.max_new_tokens",
        "track": "lower questions.batch or features.keep",
        "detect": "ask fewer questions, or lower features.keep",
    }.get(stage, "use a machine with more")
