"""Run one stage, or all of them in order, in a workdir that this process holds."""

import contextlib
from pathlib import Path

from absl import logging

from jaxsae.artifacts import InputError
from jaxsae.config import RunConfig
from jaxsae.pipeline import stages
from jaxsae.pipeline.stages import Context, Stage, StopSignal


def execute(
    command: str, config: RunConfig, workdir: Path, *, config_name: str, command_line: str, redo: bool = False
) -> int:
    """Run a command to its end and return 0.

    Raises:
        InputError: bad input; earlier results are untouched.
        Interruption: a signal; the same command goes on.
    """
    chosen = _chosen(command, config)
    _check_sources(chosen, config)
    stop = StopSignal()
    process_index, process_count = _processes(chosen)
    context = Context(workdir, config_name, command_line, stop, process_index, process_count)
    if not context.is_main:
        logging.set_verbosity(logging.WARNING)
    with stages.lock(workdir) if context.is_main else contextlib.nullcontext():
        for stage in chosen:
            stages.run_stage(stage, config, context, redo=redo)
        if command == "run" and context.is_main:
            _print_summary(config, context)
    return 0


def plan(command: str, config: RunConfig, workdir: Path, *, redo: bool = False) -> list[str]:
    """Return one line for each stage: would run, is up to date, or what it lacks."""
    lines = []
    running: list[Stage] = []
    for stage in _chosen(command, config):
        will_exist = {file for other in running for file in other.writes}
        missing = [phrase for phrase in stages.missing_inputs(stage, workdir) if phrase.split()[0] not in will_exist]
        try:
            outlook = _plan_of(stage, config, workdir, missing, redo)
        except InputError as error:
            outlook = f"cannot run: {error}"
        makers = [other.name for other in running if other.name in stage.reads.values()]
        if outlook == "up to date" and makers:
            outlook = f"would run again if {' or '.join(makers)} leaves something else"
        if outlook.startswith("would run"):
            running.append(stage)
        lines.append(f"{stage.name}: {outlook}")
    return lines


def _plan_of(stage: Stage, config: RunConfig, workdir: Path, missing: list[str], redo: bool) -> str:
    if missing:
        return f"cannot run: {missing[0]}"
    stages.source_digests(stage, config)
    if stages.missing_inputs(stage, workdir) or redo:
        return "would run"
    current = stages.state(stage, config, workdir)
    if current.is_current:
        return "up to date"
    if stage.is_expensive and current.changes:
        return f"refuses to replace its outcome: {current.changes[0]}; --redo replaces it"
    why = current.changes or tuple(f"{name} is missing or damaged" for name in current.lost)
    return f"would run{f' again: {why[0]}' if why else ''}"


def _chosen(command: str, config: RunConfig) -> list[Stage]:
    known = stages.stages_of(config)
    if command != "run" and command not in known:
        raise InputError(f"activations.source is stream: nothing to {command}, jaxsae train reads the corpus itself")
    return list(known.values()) if command == "run" else [known[command]]


def _check_sources(chosen: list[Stage], config: RunConfig) -> None:
    """Fail before the workdir is made when a path of the config does not exist."""
    for stage in chosen:
        stages.source_digests(stage, config)


def _processes(chosen: list[Stage]) -> tuple[int, int]:
    """Return (index, count) of this run's processes, joined where the environment names several.

    Stages that only read numbers do not touch jax, nor the accelerator that a training run may be using.
    """
    if not any(stage.is_distributed for stage in chosen):
        return 0, 1
    import jax

    from jaxsae import mesh

    mesh.start_processes()
    return jax.process_index(), jax.process_count()


def _print_summary(config: RunConfig, context: Context) -> None:
    from jaxsae import report
    from jaxsae.pipeline.evaluate import gather

    print(report.summary_table(gather(config, context)))
    print(f"\nreport: {context.workdir / 'report.html'} (and report.md, figures/)")
