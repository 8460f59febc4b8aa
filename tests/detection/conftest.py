"""Small synthetic answers for the detection tests: every axis has another size, and nothing tells the labels."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp

from jaxsae.artifacts import Answer, Features
from jaxsae.detection import Family, ProtocolConfig, Tables, build_tables
from jaxsae.detection.tables import TRACK_CONTROLS

N_LAYERS, WIDTH, N_LATENTS, KEPT = 3, 5, 23, 4
POSITIONS = ("last_prompt", "last_answer")
TRACK_COLUMNS = tuple(f"metric_{index}" for index in range(7))
CATEGORIES = ("often", "never", "misconception")


@dataclasses.dataclass
class Inputs:
    """The arguments of `build_tables`."""

    features: Features
    answers: list[Answer]
    track_metrics: np.ndarray
    track_controls: dict[str, np.ndarray]
    track_families: dict[str, Family]
    track_columns: tuple[str, ...] = TRACK_COLUMNS

    def tables(self) -> Tables:
        return build_tables(
            self.features,
            self.answers,
            self.track_metrics,
            self.track_columns,
            track_controls=self.track_controls,
            track_families=self.track_families,
        )


def make_answers(rng: np.random.Generator, n_groups: int, per_group: int) -> list[Answer]:
    answers, entropy_rng = [], np.random.default_rng(n_groups)
    for row in range(n_groups * per_group):
        group = row // per_group
        # Every second group is hallucinated, but for one row in six: groups are mixed now and then.
        label = int(group % 2 == 0) if rng.random() > 1 / 6 else int(group % 2 == 1)
        n_tokens = int(rng.integers(0, 5)) if row else 0
        answers.append(
            Answer(
                id=f"row{row}",
                question=f"Who founded town {group}, version {row % per_group}?",
                answers=("x",),
                group=f"fact{group}",
                category=CATEGORIES[group % len(CATEGORIES)],
                prompt="",
                prompt_ids=(1, 2),
                answer=f"name{rng.integers(12)}" if n_tokens else "",
                answer_ids=(3,) * n_tokens,
                label=label,
                logprobs=tuple(-rng.exponential(size=n_tokens)),
                entropies=tuple(entropy_rng.exponential(size=n_tokens)),
            )
        )
    return answers


def make_inputs(*, n_groups: int = 60, per_group: int = 2, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    answers = make_answers(rng, n_groups, per_group)
    n = len(answers)
    slots = (n, N_LAYERS, len(POSITIONS))
    ids = np.argsort(rng.random((*slots, N_LATENTS)), axis=-1)[..., :KEPT]
    activations = -np.sort(-rng.exponential(size=ids.shape), axis=-1)
    empty = rng.random(slots) < 0.2
    ids[empty, -1], activations[empty, -1] = -1, 0
    features = Features(
        ids=tuple(answer.id for answer in answers),
        positions=POSITIONS,
        feature_ids=ids.astype(np.int32),
        activations=activations.astype(np.float32),
        resid=rng.normal(size=(n, N_LAYERS, 3, WIDTH)).astype(np.float16),
        recon_error=rng.random(slots).astype(np.float32),
        token_directions=np.zeros((n, 2, WIDTH), np.float32),
        logprobs=np.array([value for answer in answers for value in answer.logprobs]),
        offsets=np.concatenate([[0], np.cumsum([len(answer.answer_ids) for answer in answers])]),
    )
    metrics = rng.normal(size=(n, len(TRACK_COLUMNS)))
    controls = {name: rng.normal(size=(n, len(TRACK_COLUMNS))) for name in TRACK_CONTROLS}
    bags = sp.random(n, 40, density=0.1, format="csr", rng=rng)
    families = {
        "prompt": Family(rng.normal(size=metrics.shape), TRACK_COLUMNS),
        "profiles": Family(rng.normal(size=(n, 6)), tuple(f"profile_{index}" for index in range(6))),
        "concepts": Family(bags),
        "late_births": Family(rng.normal(size=(n, 9)), tuple(f"birth_{index}" for index in range(9))),
    }
    return Inputs(features, answers, metrics, controls, families)


@pytest.fixture(name="make_inputs", scope="session")
def make_inputs_fixture():
    return make_inputs


@pytest.fixture(scope="session")
def inputs() -> Inputs:
    return make_inputs()


@pytest.fixture(scope="session")
def tables(inputs) -> Tables:
    return inputs.tables()


@pytest.fixture(scope="session")
def config() -> ProtocolConfig:
    return ProtocolConfig(folds=4, repeats=2, bootstrap=300, trees=10, probe_c=(0.03,), n_jobs=2)
