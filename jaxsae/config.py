"""Every setting of a run, once: its name, type, default, unit and origin.

A config file (`configs/NAME.py`) calls `defaults()`, changes what differs and returns it from `get_config()`. The
command line overrides single fields (`--config.train.lr=1e-4`). `resolve` checks the outcome and freezes it into a
`RunConfig`; nothing beyond this file sees a ConfigDict. `change` gives a frozen one other values, as a sweep does.
"""

import dataclasses
import difflib
import runpy
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxsae.artifacts import InputError


def _field(default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The language model whose residual stream is read."""

    name: str = _field("", "Hugging Face name (also OWNER/MODEL:FILE.gguf); how the run calls a model given by path")
    path: str | None = _field(None, "folder or .gguf file, or package://PACKAGE/PATH of one; read instead of the hub")
    revision: str | None = _field(None, "commit of the hub's repository; unset takes the newest and records it")
    dtype: str = _field("bfloat16", "float32 (exact) or bfloat16 (operands; dots and residual stream stay float32)")
    sharding: str = _field("replicated", "replicated: on one device; split: matrices in parts over all of them")


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """The text whose residual streams the SAEs learn (lane A)."""

    path: str | None = _field(None, "text (a document a line) or JSONL (field text), plain, .gz or .xz; or a folder")
    name: str | None = _field(None, "Hugging Face dataset, read when path is unset; needs jaxsae[data]")
    n_tokens: int | None = _field(None, "tokens to use; unset takes the whole corpus")
    context: int = _field(1024, "tokens in a context, its BOS included; a power of two up to 4096")


@dataclasses.dataclass(frozen=True)
class ActivationsConfig:
    """How residual streams reach the trainer."""

    source: str = _field(
        "store",
        "store: from disk, written by jaxsae extract; stream: computed while training, from a buffer on the devices",
    )
    batch: int = _field(16, "contexts in one forward pass; part of the result, as a matrix product's rounding is")
    replace: float = _field(0.5, "stream: share of the buffer (train.buffer_tokens) that a refill replaces")
    compression: str = _field("raw", "raw, or blosc (lz4 with bit shuffle: 1.25-1.44 times smaller)")


@dataclasses.dataclass(frozen=True)
class SaeConfig:
    """The sparse autoencoders, one for each layer."""

    architecture: str = _field(
        "batchtopk",
        "topk, batchtopk, matryoshka, relu, gated, jumprelu, jumprelu_tanh or jumprelu_l1 (the published run's)",
    )
    n_latents: int | None = _field(None, "latents of each SAE (F); give this or expansion")
    expansion: float | None = _field(None, "latents as a multiple of the residual width (F / D)")
    k: int = _field(32, "latents active for a token (topk), or on average; penalties aim at it if they have no weight")
    k_start: int | None = _field(None, "topk, batchtopk and matryoshka: k of the first step, annealed to k")
    anneal: float | None = _field(
        None,
        "share of the run over which k falls, or a sparsity penalty rises to its full weight; "
        "unset: 1 for jumprelu_tanh, 0.1 for others; jumprelu_l1's is constant",
    )
    by_row: float = _field(
        0.3, "batchtopk, matryoshka: share of the run in which each row keeps k latents, before the batch does"
    )
    compute: str = _field("auto", "dense products, sparse ones (by kept latents), or auto: what is faster here")
    aux_coefficient: float = _field(1 / 32, "weight of the loss that revives dead latents (Gao et al. 2024)")
    dead_tokens: int = _field(
        10_000_000, "a latent that has not fired for this many tokens is dead; at most a twentieth of the run is used"
    )
    threshold: float | None = _field(
        None,
        "jumprelu and jumprelu_tanh: every latent's at the start, with E|x|^2 = D (those published for 1: times "
        "sqrt(D)), unset: what k latents exceed; jumprelu_l1: the fixed one, unset: 1.0",
    )
    sparsity_coefficient: float | None = _field(
        None,
        "weight of the sparsity penalty: of |f|_1 (relu), |gate|_1 (gated), sum tanh(4 f) (jumprelu_tanh), all beside "
        "|x - x_hat|^2 with E|x|^2 = D; of L0 beside the unexplained fraction (jumprelu); of mean |f| (jumprelu_l1); "
        "unset: 0.05 for jumprelu_l1, in others what makes L0 about k",
    )
    bandwidth: float | None = _field(
        None, "jumprelu and jumprelu_tanh: width of the kernel of the thresholds' gradient, units as theirs; unset: 2"
    )
    groups: tuple[int, ...] = _field(
        (), "matryoshka: latents of the nested SAEs, rising to all; () is F/16, F/8, ... F"
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How the SAE suite is trained."""

    batch: int = _field(4096, "tokens in a step, of all data shards together")
    epochs: float | None = _field(None, "passes over the training tokens; give this or n_tokens")
    n_tokens: int | None = _field(None, "tokens to train on, repeating the store when it holds fewer")
    lr: float | None = _field(
        None,
        "peak learning rate; unset takes 0.14 / sqrt(F), in more than 300 steps times (300 / steps)^(1/3); of signum "
        "5e-3 / sqrt(F / 2^14)",
    )
    dtype: str = _field("float32", "of the operands of matrix products, float32 or bfloat16; all else is float32")
    optimizer: str = _field(
        "nadam",
        "adam (b1 0.9, b2 0.999, less below 10,000 steps), nadam (adam with Nesterov's momentum, Dozat 2016: 4 % less "
        "FVU in short runs), signum (the sign of the gradient's mean over 20 steps)",
    )
    schedule: str = _field(
        "linear",
        "linear (warm-up, then decay over the last fifth), cosine (stepped by epoch), "
        "schedule_free (warm-up, then constant, and the weights' average instead of momentum)",
    )
    warmup_steps: int = _field(1000, "steps of linear warm-up; at most a tenth of the run is used")
    clip_norm: float | None = _field(
        None, "largest gradient norm of one layer's SAE; unset: every gradient is scaled to norm 1"
    )
    unit_decoder_every: int = _field(
        1, "jumprelu_l1: steps between two projections of the decoder's rows to unit norm; others' rows are free"
    )
    held_out: float = _field(0.05, "share of the corpus's contexts kept for evaluation")
    buffer_tokens: int = _field(131_072, "tokens in the shuffling buffer; 2 L D bytes each (stream: over all devices)")
    evaluate_every: int = _field(1000, "steps between two evaluations on held-out tokens")
    evaluate_tokens: int = _field(65_536, "held-out tokens in an evaluation")
    delta_ce_tokens: int = _field(16_384, "held-out tokens whose loss is measured with a layer's residual replaced")
    checkpoint_every: int = _field(1000, "steps between two checkpoints")
    steps_per_dispatch: int = _field(1, "steps that devices take on their own, one after the other, at most")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices share the layers, the tokens of a batch, and the latents of an SAE."""

    layer: int | None = _field(None, "devices along the layer axis; unset takes all that data and latent leave")
    data: int = _field(1, "devices along the data axis, which share the tokens of a batch")
    latent: int = _field(1, "devices along the latent axis, which share an SAE that is too large for one of them")


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
    """The questions put to the language model (lane B)."""

    path: str | None = _field(None, "file of questions: .jsonl, .csv, .tsv, or a published set's (see format)")
    name: str | None = _field(None, "published set, downloaded (sha256 checked) when path is unset; see format")
    format: str = _field(
        "auto",
        "jsonl, csv (columns id, question, answers, group, category, ...), truthfulqa, halueval, triviaqa, nq_open, "
        "popqa or known_1000; auto: that of name, else by the file's ending",
    )
    columns: tuple[str, ...] = _field((), "of jsonl and csv: FIELD=COLUMN where columns have other names")
    n_questions: int | None = _field(None, "questions to ask, taken evenly from the set; unset asks all")
    prompt: str = _field("auto", "the prompt; {question} and {knowledge} are replaced; auto: the format's own")
    shots: int | None = _field(None, "worked examples in the format's own prompt; unset: its own number, in a chat 0")
    chat: bool = _field(False, "ask through the tokenizer's chat template; the prompt is the user's message")
    stop: tuple[str, ...] = _field(
        ("auto",), "an answer ends before the first of these strings, at a token's edge; auto: the format's own"
    )
    answers: str = _field("own", "own: the model's greedy answers; given: the set's right and wrong one (a diagnostic)")
    refusals: str = _field("drop", "answers such as I don't know: drop (leave out, counted) or wrong (hallucinated)")
    max_new_tokens: int = _field(16, "longest answer, tokens")
    batch: int = _field(64, "prompts in one forward pass")


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """Which SAE features of an answer are kept."""

    keep: int = _field(50, "latents kept for each answer, layer and position, by activation")
    positions: tuple[str, ...] = _field(
        ("last_prompt", "last_answer", "answer_max"),
        "any of last_prompt, first_answer, last_answer, answer_mean, answer_max, answer_tokens",
    )


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """How features are followed through the layers (docs: `jaxsae.tracking.TrackerConfig`)."""

    position: str = _field(
        "last_answer",
        "the kept position that is tracked; answer_tokens: each token of the answer, the metrics pooled over them",
    )
    top_k: int = _field(50, "latents of each layer that are tracked")
    association: str = _field("hungarian", "hungarian, greedy, links, feature_id or none")
    birth_threshold: float = _field(0.5, "activation above which an unmatched feature starts a track")
    association_threshold: float = _field(0.5, "association cost below which a pair matches")
    semantic_weight: float = _field(0.6, "weight of 1 - cosine of the decoder rows in the cost")
    activation_weight: float = _field(0.2, "weight of the relative change of activation in the cost")
    gate: str = _field("before", "threshold before the assignment, or after it as in the published run")
    max_missed_layers: int = _field(0, "layers that a track may miss before it dies")
    normalise_activations: bool = _field(False, "divide an answer's activations in each layer by their mean")
    null: str = _field(
        "none",
        "rescale cosines in each pair of layers so that 0 is what one in 1,000 unrelated pairs of latents exceeds: "
        "random_pairs, or matched_activation (of equal rank on one corpus token); none: as they are",
    )
    links: str = _field(
        "weights",
        "the graph of like latents in links.npz: weights (by decoder rows, no text is read), coactivation (and by "
        "firing together on the corpus) or none (not made); association=links and concepts need one",
    )
    links_per_latent: int = _field(16, "neighbours in the next layer that the graph keeps of each latent")
    links_tokens: int = _field(
        65_536, "coactivation: tokens read, the corpus's first; memory 8 L features.keep bytes each"
    )


@dataclasses.dataclass(frozen=True)
class DetectionConfig:
    """How detectors are fitted and judged."""

    folds: int = _field(5, "folds of the grouped cross-validation")
    repeats: int = _field(3, "times it is repeated with another split")
    split_by: str = _field(
        "question",
        "what no split divides and intervals resample: question (one with its answers) or category (all questions of a "
        "kind: every detector is judged on kinds that it has not seen)",
    )
    bootstrap: int = _field(2000, "resamples of groups behind every interval, permutations behind every p-value")
    families: tuple[str, ...] = _field(
        ("metrics", "prompt", "profiles", "concepts", "late_births"),
        "of track features that the method may choose and the stack with tracks reads; prompt is left out where "
        "features.positions keeps no last_prompt",
    )
    curves: bool = _field(True, "measure some detectors with fewer and with wrong labels, too")
    trees: int = _field(100, "of a random forest; as many as in the published run")
    sae_position: str = _field("max", "the kept position whose latents SAE detectors read, or max over all of them")
    sae_penalty: float = _field(0.5, "their L1 penalty, as a fraction of the universal threshold")
    probe_c: tuple[float, ...] = _field(
        (0.001, 0.03), "inverse L2 penalties of residual probes; inner validation chooses"
    )
    threshold: str = _field("youden", "what the decision threshold makes largest: youden, f1 or accuracy")


@dataclasses.dataclass(frozen=True)
class SweepSetting:
    """A named setting that a sweep tries.

    Attributes:
        name: how tables and messages call it.
        changes: fields of `tracking` and `detection` that differ from the run's, by dotted name.
        published: what others reported for it, any of auroc, accuracy and f1.
        is_reconstructed: they did not publish what they had set; the changes are our guess.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    is_reconstructed: bool = False


@dataclasses.dataclass(frozen=True)
class SweepAxis:
    """The values that a grid or a search gives the field of this dotted name; `label` is short for it in tables."""

    name: str
    values: Sequence[Any]
    label: str = ""


@dataclasses.dataclass(frozen=True)
class SweepRange:
    """The numbers that a search gives the field of this dotted name: from low to high, whole where both are."""

    name: str
    low: float | int
    high: float | int
    is_log: bool = False
    label: str = ""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """What `jaxsae sweep` tries on a run's features; settings and axes stand in config files (configs/sweeps/)."""

    name: str = _field("", "the outcome's folder, DIR/sweep/NAME; empty: the config file's name")
    settings: tuple[SweepSetting, ...] = _field((), "SweepSetting(name, changes): named settings")
    axes: tuple[SweepAxis | SweepRange, ...] = _field(
        (), "SweepAxis(field, values): what a grid combines or a search varies; SweepRange(field, low, high): searches"
    )
    trials: int | None = _field(
        None, "settings that a search (Optuna's TPE) tries for each outer fold; unset: all combinations of the axes"
    )
    metric: str = _field("auroc", "what inner validation chooses by: auroc, accuracy or f1")
    detectors: tuple[str, ...] = _field(
        ("tracks_forest", "tracks_logistic"), "those that are fitted with every setting, as metrics.json names them"
    )
    workers: int | None = _field(
        None, "processes, each with the run's features in memory; unset: one per core; no number depends on it"
    )
    published_rows: int | None = _field(None, "test rows behind the published numbers, for their standard error")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What the report shows."""

    title: str | None = _field(None, "headline; unset takes the config's name")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All sections, checked and frozen."""

    model: ModelConfig
    corpus: CorpusConfig
    activations: ActivationsConfig
    sae: SaeConfig
    train: TrainConfig
    mesh: MeshConfig
    questions: QuestionsConfig
    features: FeaturesConfig
    tracking: TrackingConfig
    detection: DetectionConfig
    sweep: SweepConfig
    report: ReportConfig
    seed: int = _field(0, "of everything random in the run")

    def flat(self) -> dict[str, Any]:
        """Return every setting by its dotted name, as on the command line."""
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            section = getattr(self, field.name)
            if dataclasses.is_dataclass(section):
                for name, setting in vars(section).items():
                    fields[f"{field.name}.{name}"] = _as_json(setting)
            else:
                fields[field.name] = section
        return fields

    def select(self, *names: str) -> dict[str, Any]:
        """Return the settings of some sections ("train") or single fields ("tracking.top_k"), by dotted name."""
        return {
            key: setting
            for key, setting in self.flat().items()
            if any(key == name or key.startswith(f"{name}.") for name in names)
        }


SECTIONS: dict[str, type] = {
    field.name: field.type
    for field in dataclasses.fields(RunConfig)
    if isinstance(field.type, type) and dataclasses.is_dataclass(field.type)
}

_POSITIONS = ("last_prompt", "first_answer", "last_answer", "answer_mean", "answer_max", "answer_tokens")
_FAMILIES = ("metrics", "prompt", "profiles", "concepts", "late_births")
QUESTION_SETS = ("truthfulqa", "halueval", "triviaqa", "nq_open", "popqa", "known_1000")
_CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.sharding": ("replicated", "split"),
    "activations.source": ("store", "stream"),
    "activations.compression": ("raw", "blosc"),
    "sae.architecture": (
        "topk",
        "batchtopk",
        "matryoshka",
        "relu",
        "gated",
        "jumprelu",
        "jumprelu_tanh",
        "jumprelu_l1",
    ),
    "sae.compute": ("auto", "dense", "sparse"),
    "train.dtype": ("float32", "bfloat16"),
    "train.optimizer": ("nadam", "adam", "signum"),
    "train.schedule": ("linear", "cosine", "schedule_free"),
    "questions.name": QUESTION_SETS,
    "questions.format": ("auto", "jsonl", "csv", *QUESTION_SETS),
    "questions.answers": ("own", "given"),
    "questions.refusals": ("drop", "wrong"),
    "tracking.association": ("hungarian", "greedy", "links", "feature_id", "none"),
    "tracking.gate": ("before", "after"),
    "detection.split_by": ("question", "category"),
    "detection.threshold": ("youden", "f1", "accuracy"),
    "sweep.metric": ("auroc", "accuracy", "f1"),
    "tracking.null": ("none", "random_pairs", "matched_activation"),
    "tracking.links": ("weights", "coactivation", "none"),
}

# Smallest value allowed; fields named here may be unset where their type says so.
_AT_LEAST = {
    "corpus.n_tokens": 1,
    "corpus.context": 2,
    "activations.batch": 1,
    "activations.replace": 1e-6,
    "sae.n_latents": 1,
    "sae.expansion": 0.01,
    "sae.k": 1,
    "sae.k_start": 1,
    "sae.by_row": 0,
    "sae.anneal": 0,
    "sae.aux_coefficient": 0,
    "sae.dead_tokens": 1,
    "sae.sparsity_coefficient": 0,
    "sae.threshold": 0,
    "sae.bandwidth": 1e-9,
    "train.batch": 1,
    "train.epochs": 0.001,
    "train.n_tokens": 1,
    "train.lr": 0,
    "train.warmup_steps": 0,
    "train.clip_norm": 1e-9,
    "train.unit_decoder_every": 1,
    "train.held_out": 1e-6,
    "train.buffer_tokens": 128,
    "train.evaluate_every": 1,
    "train.evaluate_tokens": 128,
    "train.delta_ce_tokens": 2,
    "train.checkpoint_every": 1,
    "train.steps_per_dispatch": 1,
    "mesh.layer": 1,
    "mesh.data": 1,
    "mesh.latent": 1,
    "questions.n_questions": 1,
    "questions.shots": 0,
    "questions.max_new_tokens": 1,
    "questions.batch": 1,
    "features.keep": 1,
    "tracking.top_k": 1,
    "tracking.max_missed_layers": 0,
    "tracking.links_per_latent": 1,
    "tracking.links_tokens": 2,
    "detection.folds": 3,
    "detection.repeats": 1,
    "detection.bootstrap": 100,
    "detection.trees": 1,
    "detection.sae_penalty": 1e-9,
    "sweep.trials": 1,
    "sweep.workers": 1,
    "sweep.published_rows": 1,
    "seed": 0,
}


_FIELDS = (
    *(f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)),
    "seed",
)
_OPTIONAL = tuple(
    f"{name}.{field.name}"
    for name, section in SECTIONS.items()
    for field in dataclasses.fields(section)
    if isinstance(field.type, types.UnionType)
)


def defaults() -> ml_collections.ConfigDict:
    """Return all settings at their defaults, for a config file to change."""
    sections = {
        name: {field.name: _default(field) for field in dataclasses.fields(section)}
        for name, section in SECTIONS.items()
    }
    return ml_collections.ConfigDict({**sections, "seed": 0})


def _default(field: dataclasses.Field) -> Any:
    """Return a field's default; one that may be unset becomes a typed placeholder."""
    if isinstance(field.type, types.UnionType):
        return ml_collections.config_dict.placeholder(typing.get_args(field.type)[0])
    return field.default


def parse(flag_values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parse `--config=FILE`, its overrides and the flags already in `flag_values`; return what is no flag.

    `--config.SECTION.FIELD=none` unsets a field that may be unset, unless none is one of its choices;
    `resolve(flag_values.config)` checks the outcome.

    Raises:
        InputError: an unknown flag or field (with the nearest name), a wrong type, or an unreadable config file.
    """
    unset = [arg for arg in argv if _unsets(arg)]
    rest = [arg for arg in argv if arg not in unset]
    path = next((arg.split("=", 1)[1] for arg in rest if arg.startswith(("--config=", "-config="))), None)
    if path is not None and not Path(path).is_file():
        raise InputError(f"--config={path} is not a file; configs/ holds those that are shipped")
    config_flags.DEFINE_config_file("config", None, "the run's settings", flag_values=flag_values, sys_argv=rest)
    try:
        positional = flag_values(rest)
        for arg in unset:
            _unset(flag_values["config"].value, arg.lstrip("-").removeprefix("config.").removesuffix("=none"))
    except (AttributeError, KeyError, ImportError, NameError) as error:
        raise _unknown_field(argv, error) from None
    except (flags.Error, OSError, TypeError, ValueError, SyntaxError) as error:
        raise InputError(_one_line(error)) from None
    return positional


def read(path: str | Path) -> ml_collections.ConfigDict:
    """Return the settings that a config file returns, for another config file to build on."""
    return runpy.run_path(str(path))["get_config"]()


def _unsets(arg: str) -> bool:
    """Say whether an override is `=none`, and none is not one of the field's choices."""
    name = arg.lstrip("-").removeprefix("config.").removesuffix("=none")
    return arg.lstrip("-").startswith("config.") and arg.endswith("=none") and "none" not in _CHOICES.get(name, ())


def config_file(flag_values: flags.FlagValues) -> str:
    """Return the path given as `--config`."""
    return config_flags.get_config_filename(flag_values["config"])


def _unset(config: ml_collections.ConfigDict, name: str) -> None:
    if name not in _OPTIONAL:
        raise ValueError(f"{name} cannot be unset; those that can are {', '.join(_OPTIONAL)}")
    section, field = name.split(".")
    config[section][field] = None


def resolve(config: Any) -> RunConfig:
    """Check what a config file's `get_config` returned, a ConfigDict, and freeze it.

    Raises:
        InputError: it lacks or adds a field, or a value is out of range; the message names field and value.
    """
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"get_config() returned {type(config).__name__}, expected jaxsae.config.defaults(), changed")
    _check_fields(config)
    _check_sweep(config.sweep)
    sections: dict[str, Any] = {
        name: section(**{key: _plain(setting) for key, setting in config[name].items()})
        for name, section in SECTIONS.items()
    }
    resolved = RunConfig(**sections, seed=config.seed)
    _check(resolved)
    return resolved


def change(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return the config with some fields changed, by dotted name.

    Raises:
        InputError: a name is no setting, or a value is of another type or out of range; the message names both.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, setting in changes.items():
        section, _, field = name.partition(".")
        if name not in _FIELDS or not field:
            raise InputError(f"{name} is no setting; the nearest is {_nearest(name)}")
        expected = typing.get_type_hints(SECTIONS[section])[field]
        if not _is_of_type(setting, expected):
            raise InputError(f"{name} is {setting!r}, expected {_type_name(expected)}")
        sections.setdefault(section, {})[field] = _as_type(setting, expected)
    changed = {section: dataclasses.replace(getattr(config, section), **fields) for section, fields in sections.items()}
    outcome = dataclasses.replace(config, **changed)
    _check(outcome)
    return outcome


def _is_of_type(setting: Any, expected: Any) -> bool:
    """Say whether a value may stand in a field; whole numbers may stand for others, and lists for tuples."""
    if isinstance(expected, types.UnionType):
        return any(_is_of_type(setting, kind) for kind in typing.get_args(expected))
    if typing.get_origin(expected) is tuple:
        kind = typing.get_args(expected)[0]
        return isinstance(setting, list | tuple) and all(_is_of_type(item, kind) for item in setting)
    if isinstance(setting, bool):
        return expected is bool
    return isinstance(setting, (int, float) if expected is float else expected)


def _as_type(setting: Any, expected: Any) -> Any:
    """Return a list as a tuple, and a whole number as a float where the field holds floats."""
    if isinstance(setting, list | tuple):
        return tuple(_as_type(item, typing.get_args(expected)[0]) for item in setting)
    kinds = typing.get_args(expected) or (expected,)
    return float(setting) if type(setting) is int and float in kinds and int not in kinds else setting


def _type_name(expected: Any) -> str:
    return getattr(expected, "__name__", None) or str(expected) if not typing.get_args(expected) else str(expected)


def read_section(settings: Mapping[str, Any], name: str) -> Any:
    """Return a section from settings by dotted name, as `RunConfig.select` gives and a stage's record keeps them.

    Raises:
        InputError: one of its fields is not there.
    """
    fields = [field.name for field in dataclasses.fields(SECTIONS[name])]
    missing = [f"{name}.{field}" for field in fields if f"{name}.{field}" not in settings]
    if missing:
        raise InputError(f"the run's record lacks {', '.join(missing)}; run its stages again with this jaxsae")
    return SECTIONS[name](**{field: _plain(settings[f"{name}.{field}"]) for field in fields})


def describe(*sections: str) -> str:
    """Return the help text of the given sections: every field, its default and what it means."""
    lines = []
    for name in sections:
        if name not in SECTIONS:
            lines.append("seed (0): of everything random in the run")
            continue
        lines.append(f"{name}: {(SECTIONS[name].__doc__ or '').strip()}")
        for field in dataclasses.fields(SECTIONS[name]):
            default = "unset" if field.default is None else str(field.default).replace("\n", r"\n") or "empty"
            lines.append(f"  --config.{name}.{field.name} ({default}): {field.metadata['doc']}")
    return "\n".join(lines)


def _as_json(setting: Any) -> Any:
    if isinstance(setting, tuple):
        return [_as_json(item) for item in setting]
    if isinstance(setting, SweepSetting | SweepAxis | SweepRange):
        return dataclasses.asdict(setting)
    return setting


def _plain(setting: Any) -> Any:
    return tuple(setting) if isinstance(setting, (list, tuple)) else setting


def _unknown_field(argv: Sequence[str], error: Exception) -> InputError:
    """Name the first overridden field that does not exist, and the nearest one that does."""
    for arg in argv:
        asked = arg.split("=", 1)[0].lstrip("-").removeprefix("config.")
        if arg.lstrip("-").startswith("config.") and asked not in _FIELDS:
            return InputError(f"--config.{asked} is no setting; the nearest is --config.{_nearest(asked)}")
    return InputError(f"the config file cannot be read: {_one_line(error)}")


def _nearest(asked: str) -> str:
    return difflib.get_close_matches(asked, _FIELDS, n=1, cutoff=0.0)[0]


def _check_fields(config: ml_collections.ConfigDict) -> None:
    """Compare the fields' names with the typed ones; a ConfigDict itself takes any name."""
    found = {
        f"{name}.{field}" if isinstance(section, ml_collections.ConfigDict) else name
        for name, section in config.items()
        for field in (section if isinstance(section, ml_collections.ConfigDict) else [""])
    }
    for name in sorted(found - set(_FIELDS)):
        raise InputError(f"get_config() sets {name}, which is no setting; the nearest is {_nearest(name)}")
    for name in sorted(set(_FIELDS) - found):
        raise InputError(f"get_config() returned settings without {name}; start from jaxsae.config.defaults()")


def _one_line(error: Exception) -> str:
    """Return an error's telling line: the last one, which a nested traceback ends with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _check(config: RunConfig) -> None:
    settings = config.flat()
    for name, choices in _CHOICES.items():
        if settings[name] not in choices and not (settings[name] is None and name in _OPTIONAL):
            raise InputError(f"{name} is {settings[name]!r}, expected one of {', '.join(choices)}")
    for name, least in _AT_LEAST.items():
        if settings[name] is not None and not settings[name] >= least:
            raise InputError(f"{name} is {settings[name]}, expected at least {least}")
    if config.train.held_out >= 1:
        raise InputError(f"train.held_out is {config.train.held_out}, expected a share below 1")
    if config.activations.replace > 1:
        raise InputError(f"activations.replace is {config.activations.replace}, expected a share of at most 1")
    if config.corpus.context > 4096 or config.corpus.context & (config.corpus.context - 1):
        raise InputError(f"corpus.context is {config.corpus.context}, expected a power of two up to 4096")
    _check_one_of(settings, "sae.n_latents", "sae.expansion")
    _check_one_of(settings, "train.epochs", "train.n_tokens")
    if config.tracking.top_k > config.features.keep:
        raise InputError(
            f"tracking.top_k is {config.tracking.top_k} but features.keep is {config.features.keep}; "
            "keep at least as many latents as are tracked"
        )
    _check_links(config.tracking)
    unknown = [name for name in config.features.positions if name not in _POSITIONS]
    if unknown or not config.features.positions:
        raise InputError(
            f"features.positions holds {', '.join(unknown) or 'nothing'}, expected names among {', '.join(_POSITIONS)}"
        )
    strange = [name for name in config.detection.families if name not in _FAMILIES]
    if strange or not config.detection.families:
        raise InputError(
            f"detection.families holds {', '.join(strange) or 'nothing'}, expected names among {', '.join(_FAMILIES)}"
        )
    if config.tracking.position not in config.features.positions:
        raise InputError(
            f"tracking.position is {config.tracking.position}, which features.positions "
            f"({', '.join(config.features.positions)}) does not keep"
        )


def _check_sweep(sweep: Any) -> None:
    """Check what the types of a ConfigDict do not say, before it is frozen."""
    for field, kinds in {"settings": (SweepSetting,), "axes": (SweepAxis, SweepRange)}.items():
        for item in sweep[field]:
            if not isinstance(item, kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise InputError(f"sweep.{field} holds {item!r}, expected {wanted} (jaxsae.config), in a config file")
    if Path(sweep.name).name != sweep.name or sweep.name.startswith("."):
        raise InputError(f"sweep.name is {sweep.name!r}, expected the name of a folder")
    if not sweep.detectors:
        raise InputError("sweep.detectors is empty; name one or more, as metrics.json names them")


def _check_links(config: TrackingConfig) -> None:
    if config.association == "links" and config.links == "none":
        raise InputError("tracking.association=links needs a link graph; set tracking.links=weights or coactivation")
    if config.null == "matched_activation" and config.links != "coactivation":
        raise InputError(
            f"tracking.null=matched_activation is measured on a corpus, tracking.links is {config.links}; set "
            "tracking.links=coactivation"
        )


def _check_one_of(settings: dict[str, Any], first: str, second: str) -> None:
    if (settings[first] is None) == (settings[second] is None):
        given = "neither is set" if settings[first] is None else f"both are set ({settings[first]}, {settings[second]})"
        raise InputError(f"give {first} or {second}, one of the two; {given}")
