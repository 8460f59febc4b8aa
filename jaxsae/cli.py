"""`jaxsae COMMAND --config=FILE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]`: one command line to one stage.

Exit codes: 0 done; 2 bad input, in one line on stderr; 130 or 143 interrupted, and the same command goes on.
"""

import logging as standard_logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = {
    "run": "all stages below, in order; what is up to date is skipped",
    "extract": "corpus text -> residual streams of every layer, in activations/",
    "train": "residual streams -> one sparse autoencoder per layer, in saes/",
    "answer": "questions -> the language model's own answers with labels, answers.jsonl",
    "track": "answers -> SAE features and their tracks through the layers, features.npz and tracks.npz",
    "detect": "features and tracks -> detectors of hallucinated answers beside baselines, metrics.json",
    "evaluate": "everything measured -> report.md, report.html and figures/",
    "sweep": "many settings of tracking and detection on a run's features, chosen inside validation, one page",
    "plan": "time, memory and disk of each stage, before anything runs; reads no weights",
    "audit": "any benchmark's labelled answers -> what gives the labels away without a model, one page",
    "score": "a prompt and its answer -> how likely the answer is hallucinated, which tokens and tracks say so",
    "transfer": "runs on different questions -> detectors trained on each, tested on the others, transfer.csv",
    "export": "saes/ -> one SAE folder per layer that another library reads",
    "import": "SAEs of another library -> saes/, for answer and track without training",
}
_SECTIONS = {
    "extract": ("model", "corpus", "activations", "seed"),
    "train": ("model", "sae", "train", "mesh", "seed"),
    "answer": ("model", "questions"),
    "track": ("model", "features", "tracking"),
    "detect": ("detection", "seed"),
    "evaluate": ("report",),
    "sweep": ("sweep", "tracking", "detection", "seed"),
}
_USAGE = "jaxsae COMMAND --config=configs/NAME.py --workdir=DIR [--config.SECTION.FIELD=VALUE ...]"
_FLAGS = """\
  --config=FILE                 the run's settings; configs/ holds those that are shipped
  --config.SECTION.FIELD=VALUE  change one of them; =none unsets a field that may be unset
  --workdir=DIR                 where the run's files are, and its earlier ones are found
  --dry-run                     say what would run and why, change nothing
  --redo                        remove this stage's earlier outcome and run it again
  --verbosity=-1..1             warnings only, progress (default), debugging"""
_SWEEP_FLAGS = """\
  --config=FILE                 what to try (section sweep) and the config it changes; configs/sweeps/ holds some
  --config.SECTION.FIELD=VALUE  change one of its fields; =none unsets a field that may be unset
  --workdir=DIR                 a run after jaxsae track; gets sweep/NAME/: report.html, report.md, figures/,
                                results.json, results.csv, points/
  --dry-run                     say what would be tried and what is done, change nothing
  --redo                        remove the sweep's earlier outcome and run it again
  --verbosity=-1..1             warnings only, progress (default), debugging

Each setting goes from the kept features (no language model, no SAE is run) through tracks to detectors, all on the same
grouped folds. For each outer fold one is chosen by inner validation alone, which gives the number to report; the page
shows what picking the best setting by the test rows would have said, and the difference, the optimism. A config names
settings, or axes for a grid, or axes and trials for a search (launch/install sweep):

  config.sweep.settings = (SweepSetting("strict", {"tracking.association_threshold": 0.4}), ...)
  config.sweep.axes = (SweepAxis("tracking.top_k", (4, 8)), SweepAxis("tracking.gate", ("before", "after")))
  config.sweep.axes, config.sweep.trials = (SweepRange("tracking.association_threshold", 0.1, 1.0),), 30

A setting is a file of its own: a killed sweep goes on with the same command. A setting may track at most
features.keep latents; run jaxsae track with a larger one first."""
_HYPHENATED = {"--dry-run": "--dry_run", "--device-memory": "--device_memory"}
_PLAN_FLAGS = """\
  --config=FILE                 the run's settings; configs/ holds those that are shipped
  --config.SECTION.FIELD=VALUE  change one of them; =none unsets a field that may be unset
  --workdir=DIR                 the disk to look at (default: that of temporary files); nothing is kept there
  --devices=N                   plan for N devices like the one here (default: those here)
  --device-memory=GIB           memory of each (default: that of the one here)"""


_AUDIT_FLAGS = """\
  FILE                          .csv, .tsv, .jsonl or .json: question, answer, label (1 = hallucinated) and, if there,
                                group, category, split; or right and wrong answers, as TruthfulQA.csv, HaluEval's files
                                (question, right_answer, hallucinated_answer) or a question set with wrong_answers
  --out=DIR                     gets audit.html, audit.md and audit.json
  --pairs=question              rows of right and wrong answers: question (the best right and the most tempting wrong
                                one), published (the best right one beside each wrong one), all (each beside each)
  --columns=FIELD=COLUMN,...    columns of other names, as --columns=answer=model_text,label=is_wrong
  --seed=0                      of splits, noise and resamples
  --bootstrap=2000              resamples of questions behind every interval
  --dry-run                     read and check FILE, write nothing

Reads no model and no config. Asks, each time with a 95% interval over resampled questions: do texts stand on both
sides of a split by pair or row, and does noise then detect; what do the length of the answer, the text of question and
answer, the category, the order of the rows, and knowing which question it is tell of the label; which differences
between detectors can so many rows show at all."""
_SCORE_FLAGS = """\
  --workdir=DIR                 the run whose detector, SAEs and language model are used; nothing is written there
  --prompt=TEXT                 the whole prompt, of the form that the run's prompts have (questions.prompt)
  --answer=TEXT                 its answer; left out: the model answers
  --file=ROWS.jsonl             instead: an object a line with prompt and, if they like, answer and id; out come JSON
                                lines (docs/formats.md), each what --prompt and --answer would give
  --out=FILE                    new file for these lines (default: stdout)
  --tracks=3                    tracks to explain; 0 is many times faster
  --draws=20                    random deletions beside each of them
  --model=NAME                  the run's language model, where it does not lie where the run read it

A probability is calibrated on the run's own answers: on other questions or another form of prompt it is an
extrapolation. Beside each explanation stands its check: what the same deletion does inside the model, and what
random deletions of like size do."""
_TRANSFER_FLAGS = """\
  DIR DIR ...                   runs of one language model and the same SAEs, on different questions, after jaxsae track
  --out=DIR                     gets transfer.csv and transfer.json
  --seed=0                      of splits, forests and resamples
  --bootstrap=2000              resamples of groups behind every interval

Answers of the tested run whose group or question is in the training run are left out, and counted."""
_EXCHANGE_FLAGS = {
    "export": """\
  --workdir=DIR                 the run whose SAEs are written
  --out=DIR                     new folder for them
  --format=saelens              layout: SAELens, version 6""",
    "import": """\
  SRC                           one SAE's folder or weights file, or a folder of folders, one for each layer
  --model=NAME                  their language model: a Hugging Face name, a folder or a .gguf file
  --dtype=bfloat16              the model's compute dtype, as model.dtype of the runs that will use them
  --workdir=DIR                 the run that gets saes/
  --format=LAYOUT               saelens, sparsify, dictionary_learning, openai or gemma_scope; unset: by file names
  --layer=N                     where a single SAE belongs, if its files do not say""",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(list(sys.argv if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    words = [arg for arg in argv[1:] if not arg.startswith("-")]
    wants_help = any(arg in ("--help", "-h", "-help", "--helpfull") for arg in argv[1:])
    if wants_help or len(argv) == 1 or words[:1] == ["help"]:
        print(help_text(*[word for word in words if word in COMMANDS][:1]))
        return 0
    from jaxsae.artifacts import DISK_FULL, InputError
    from jaxsae.pipeline.stages import Interruption

    try:
        return _command(argv)
    except InputError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        return _fail(f"{error}; what was finished before is whole: free some space and run the same command again")
    except Interruption as interruption:
        print("jaxsae: interrupted; the same command goes on from here", file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:
        print("jaxsae: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def help_text(command: str | None = None) -> str:
    """Return what `--help` prints: the commands, or one command's settings."""
    if command is None:
        lines = [f"  {name:<9} {summary}" for name, summary in COMMANDS.items()]
        start = "launch/demo runs all of them on a small model in minutes; jaxsae COMMAND --help lists the settings."
        return "\n".join([_USAGE, "", *lines, "", _FLAGS, "", start])
    if command == "audit":
        return "\n".join([f"jaxsae audit FILE --out=DIR: {COMMANDS[command]}", "", _AUDIT_FLAGS])
    if command == "score":
        return "\n".join([f"jaxsae score: {COMMANDS[command]}", "", _SCORE_FLAGS])
    if command == "transfer":
        return "\n".join([f"jaxsae transfer DIR DIR ... --out=DIR: {COMMANDS[command]}", "", _TRANSFER_FLAGS])
    if command in _EXCHANGE_FLAGS:
        return "\n".join([f"jaxsae {command}: {COMMANDS[command]}", "", _EXCHANGE_FLAGS[command]])
    from jaxsae.config import describe

    sections = _SECTIONS.get(command) or tuple(dict.fromkeys(s for names in _SECTIONS.values() for s in names))
    flags = {"plan": _PLAN_FLAGS, "sweep": _SWEEP_FLAGS}.get(command, _FLAGS)
    return "\n".join([f"jaxsae {command}: {COMMANDS[command]}", "", flags, "", describe(*sections)])


def _command(argv: list[str]) -> int:
    from absl import flags
    from absl import logging as absl_logging

    from jaxsae import config as settings
    from jaxsae.artifacts import InputError

    names = [arg for arg in argv[1:] if not arg.startswith("-")]
    if not names or names[0] not in COMMANDS:
        given = names[0] if names else "no command"
        raise InputError(f"expected a command ({', '.join(COMMANDS)}), got {given}{_nearest(given)}")
    if names[0] == "score":
        return _score(argv)
    if names[0] in _EXCHANGE_FLAGS:
        return _exchange(names[0], argv)
    if names[0] == "audit":
        return _audit(argv)
    if names[0] == "transfer":
        return _transfer(argv)
    flag_values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=flag_values)
    flags.DEFINE_bool("dry_run", False, "change nothing", flag_values=flag_values)
    flags.DEFINE_bool("redo", False, "run again", flag_values=flag_values)
    flags.DEFINE_integer("verbosity", 0, "how much is logged", flag_values=flag_values)
    if names[0] == "plan":
        flags.DEFINE_integer("devices", None, "devices to plan for", 1, flag_values=flag_values)
        flags.DEFINE_float("device_memory", None, "GiB of each", 0, flag_values=flag_values)
    rest = settings.parse(flag_values, [_with_underscore(arg) for arg in argv])
    if len(rest) > 2:
        raise InputError(f"one command at a time, got {' '.join(rest[1:])}; flags are written --name=value")
    if flag_values.config is None:
        raise InputError(f"--config is missing; {_USAGE}")
    if not flag_values.workdir and names[0] != "plan":
        raise InputError("--workdir is missing; it has no default, name a folder for the run's files")
    config = settings.resolve(flag_values.config)
    flags.FLAGS.mark_as_parsed()
    _set_up_logging(absl_logging, flag_values.verbosity)
    if names[0] == "plan":
        return _plan(config, flag_values)
    config_name = Path(settings.config_file(flag_values)).stem
    if names[0] == "sweep":
        return _sweep(config, flag_values, config_name, shlex.join(["jaxsae", *argv[1:]]))
    execute = _dry_run if flag_values.dry_run else _execute
    return execute(
        names[0], config, Path(flag_values.workdir), config_name, shlex.join(["jaxsae", *argv[1:]]), flag_values.redo
    )


def _with_underscore(arg: str) -> str:
    """Write a flag's name as absl knows it: --device-memory=24 is --device_memory=24."""
    name, equals, value = arg.partition("=")
    return _HYPHENATED.get(name, name) + equals + value


def _nearest(given: str) -> str:
    import difflib

    nearest = difflib.get_close_matches(given, COMMANDS, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else "; jaxsae --help says what they do"


def _execute(command: str, config, workdir: Path, config_name: str, command_line: str, redo: bool) -> int:
    from jaxsae.pipeline import run as runs

    return runs.execute(command, config, workdir, config_name=config_name, command_line=command_line, redo=redo)


def _dry_run(command: str, config, workdir: Path, config_name: str, command_line: str, redo: bool) -> int:
    from jaxsae.pipeline import run as runs

    print("\n".join(runs.plan(command, config, workdir, redo=redo)))
    return 0


def _sweep(config, flag_values, config_name: str, command_line: str) -> int:
    from jaxsae.pipeline import sweep

    workdir, redo = Path(flag_values.workdir), flag_values.redo
    if flag_values.dry_run:
        print("\n".join(sweep.plan(config, workdir, config_name=config_name, redo=redo)))
        return 0
    return sweep.run(config, workdir, config_name=config_name, command_line=command_line, redo=redo)


def _plan(config, flag_values) -> int:
    from jaxsae.pipeline import plan

    workdir = Path(flag_values.workdir) if flag_values.workdir else None
    lines = plan.run(config, workdir, devices=flag_values.devices, device_gib=flag_values.device_memory)
    print("\n".join(lines))
    return 0


def _audit(argv: list[str]) -> int:
    from absl import flags
    from absl import logging as absl_logging

    from jaxsae.artifacts import InputError

    given = flags.FlagValues()
    flags.DEFINE_string("out", None, "folder for the audit", flag_values=given)
    flags.DEFINE_string("pairs", None, "how rows are made of pairs", flag_values=given)
    flags.DEFINE_list("columns", [], "FIELD=COLUMN", flag_values=given)
    flags.DEFINE_integer("seed", 0, "of everything drawn", 0, flag_values=given)
    flags.DEFINE_integer("bootstrap", 2000, "resamples", 100, flag_values=given)
    flags.DEFINE_bool("dry_run", False, "change nothing", flag_values=given)
    flags.DEFINE_integer("verbosity", 0, "how much is logged", flag_values=given)
    try:
        words = given([_with_underscore(arg) for arg in argv])[2:]
    except flags.Error as error:
        raise InputError(str(error)) from None
    if len(words) != 1:
        raise InputError(f"jaxsae audit takes one FILE, a benchmark's answers; got {' '.join(words) or 'none'}")
    if not given.out:
        raise InputError("--out is missing; name a folder for the audit's files")
    flags.FLAGS.mark_as_parsed()
    _set_up_logging(absl_logging, given.verbosity)
    from jaxsae.pipeline import audit

    settings = {"seed": given.seed, "bootstrap": given.bootstrap, "dry_run": given.dry_run}
    print(audit.run(words[0], Path(given.out), pairs=given.pairs, columns=given.columns, **settings))
    return 0


def _score(argv: list[str]) -> int:
    from absl import flags
    from absl import logging as absl_logging

    from jaxsae.artifacts import InputError

    given = flags.FlagValues()
    for name in ("workdir", "prompt", "answer", "file", "out", "model"):
        flags.DEFINE_string(name, None, "see jaxsae score --help", flag_values=given)
    flags.DEFINE_integer("tracks", 3, "to explain", 0, flag_values=given)
    flags.DEFINE_integer("draws", 20, "random deletions", 1, flag_values=given)
    flags.DEFINE_integer("verbosity", 0, "how much is logged", flag_values=given)
    try:
        words = given(argv)[2:]
    except flags.Error as error:
        raise InputError(str(error)) from None
    if words:
        raise InputError(f"jaxsae score takes flags alone; got {' '.join(words)}; quote texts: --prompt='...'")
    if not given.workdir:
        raise InputError("--workdir is missing; name the folder of a finished run")
    if (given.prompt is None) == (given.file is None):
        raise InputError("give --prompt or --file, one of the two; jaxsae score --help says what they take")
    beside = [name for name in (("answer",) if given.file is not None else ("out",)) if given[name].value is not None]
    if beside:
        raise InputError(f"--{beside[0]} does not go with --{'file' if given.file is not None else 'prompt'}")
    flags.FLAGS.mark_as_parsed()
    _set_up_logging(absl_logging, given.verbosity)
    from jaxsae.pipeline import scoring

    how = {"model": given.model, "tracks": given.tracks, "draws": given.draws}
    if given.file is None:
        print(scoring.score_prompt(Path(given.workdir), given.prompt, given.answer, **how))
    else:
        out = Path(given.out) if given.out is not None else None
        scoring.score_file(Path(given.workdir), Path(given.file), out, **how)
    return 0


def _transfer(argv: list[str]) -> int:
    from absl import flags
    from absl import logging as absl_logging

    from jaxsae.artifacts import InputError

    given = flags.FlagValues()
    flags.DEFINE_string("out", None, "folder for the matrix", flag_values=given)
    flags.DEFINE_integer("seed", 0, "of everything drawn", 0, flag_values=given)
    flags.DEFINE_integer("bootstrap", 2000, "resamples", 100, flag_values=given)
    flags.DEFINE_integer("verbosity", 0, "how much is logged", flag_values=given)
    try:
        words = given(argv)[2:]
    except flags.Error as error:
        raise InputError(str(error)) from None
    if not given.out:
        raise InputError("--out is missing; name a folder for transfer.csv and transfer.json")
    flags.FLAGS.mark_as_parsed()
    _set_up_logging(absl_logging, given.verbosity)
    from jaxsae.pipeline import transfer

    print(transfer.run([Path(word) for word in words], Path(given.out), seed=given.seed, bootstrap=given.bootstrap))
    return 0


def _exchange(command: str, argv: list[str]) -> int:
    from absl import flags
    from absl import logging as absl_logging

    from jaxsae.artifacts import InputError
    from jaxsae.pipeline import exchange

    given = _exchange_flags(command)
    try:
        words = given(argv)[2:]
    except flags.Error as error:
        raise InputError(str(error)) from None
    for name in ("workdir", "out") if command == "export" else ("workdir", "model"):
        if not given[name].value:
            raise InputError(f"--{name} is missing; jaxsae {command} --help says what it takes")
    if len(words) != (command == "import"):
        takes = "one SRC, the SAEs' folder" if command == "import" else "flags alone"
        raise InputError(f"jaxsae {command} takes {takes}; got {' '.join(words) or 'none'}")
    flags.FLAGS.mark_as_parsed()
    _set_up_logging(absl_logging, given.verbosity)
    workdir = Path(given.workdir)
    if command == "export":
        exchange.export_suite(workdir, Path(given.out))
    else:
        place = {"layout": given.format, "layer": given.layer}
        exchange.import_suite(Path(words[0]), workdir, model=given.model, dtype=given.dtype, **place)
    return 0


def _exchange_flags(command: str) -> Any:
    """Return the unparsed flags of `export` or `import`; these need no config."""
    from absl import flags

    from jaxsae.pipeline.exchange import EXPORT_LAYOUTS, IMPORT_LAYOUTS

    flag_values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=flag_values)
    flags.DEFINE_integer("verbosity", 0, "how much is logged", flag_values=flag_values)
    if command == "export":
        flags.DEFINE_string("out", None, "new folder", flag_values=flag_values)
        flags.DEFINE_enum("format", EXPORT_LAYOUTS[0], EXPORT_LAYOUTS, "layout", flag_values=flag_values)
        return flag_values
    flags.DEFINE_string("model", None, "the SAEs' language model", flag_values=flag_values)
    flags.DEFINE_enum("dtype", "bfloat16", ("float32", "bfloat16"), "the model's", flag_values=flag_values)
    flags.DEFINE_enum("format", None, IMPORT_LAYOUTS, "layout", flag_values=flag_values)
    flags.DEFINE_integer("layer", None, "of a single SAE", 0, flag_values=flag_values)
    return flag_values


def _set_up_logging(absl_logging, verbosity: int) -> None:
    """Log to stderr, a line an event; of other libraries only warnings, and of Orbax, which makes many, only errors.

    Orbax's threads and asyncio tasks log, with tracebacks, what Orbax raises and the command line says in one line.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(verbosity)
    absl_logging.set_stderrthreshold("debug")
    handler = absl_logging.get_absl_handler()
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_is_telling)


def _is_telling(record: standard_logging.LogRecord) -> bool:
    if record.name == "asyncio":
        return False
    if "orbax" in record.pathname:
        return record.levelno >= standard_logging.ERROR and not record.exc_info
    return record.name == "absl" or record.levelno >= standard_logging.WARNING


def _fail(message: str) -> int:
    print(f"jaxsae: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
