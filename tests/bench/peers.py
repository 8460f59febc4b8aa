"""The peers' own trainers on rows in memory: SAELens' `MultiSAETrainer` and sparsify's `Trainer`.

Only the data are wired: each step's rows are the same for every library, and nothing in a peer's step is changed. The
weights are those that each library saves for use, read back from its files.
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import os
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels are for GPUs; on a CPU it has a path of its own

import numpy as np
import sae_lens
import safetensors.numpy
import schedulefree
import sparsify
import torch
from jaxtyping import Float, Int
from sae_lens.config import SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from scores import Weights


@dataclasses.dataclass(frozen=True)
class Shared:
    """Settings that every library gets alike, where it is not run at its own defaults.

    Attributes:
        lr: peak learning rate.
        warmup_steps: of linear warm-up.
        decay_steps: of linear decay to 0 at the end.
        dead_tokens: window after which a latent counts as dead and the auxiliary loss revives it.
    """

    lr: float
    warmup_steps: int
    decay_steps: int
    dead_tokens: int


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be trained, on which rows, in which order.

    Attributes:
        acts: rows of all layers.
        order: the rows of each step.
        architecture: topk or batchtopk.
        shared: None runs a library at its own defaults.
    """

    acts: Float[np.ndarray, "L N D"]
    order: Int[np.ndarray, "S B"]
    architecture: str
    n_latents: int
    k: int
    seed: int
    shared: Shared | None = None


def versions() -> str:
    """Return the peers' installed versions, as a line."""
    names = ("sae-lens", "eai-sparsify", "torch")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the peers' progress bars and notes off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class SaeLens:
    """SAELens' trainer of several SAEs.

    Its defaults: no normalisation of the input, Adam, lr 3e-4 constant, auxiliary loss of coefficient 1 with a window
    of 1,000 steps. With shared settings the input is normalised to E|x| = sqrt(D), which its documentation uses with
    a decaying learning rate, and folded into the weights at the end.
    """

    def __init__(self, task: Task, *, is_sparse: bool = False) -> None:
        """Make the SAEs.

        Args:
            is_sparse: TopK with `use_sparse_activations`, which on a CPU (torch 2.13) has no backward pass through the
                scaling by decoder norms and so leaves that out.
        """
        self._task, self._step = task, 0
        self._acts = torch.from_numpy(task.acts)
        torch.manual_seed(task.seed)
        names = [f"layer_{layer:02d}" for layer in range(len(task.acts))]
        saes = {name: self._make_sae(is_sparse) for name in names}
        self.trainer = MultiSAETrainer(self._config(), saes, {name: name for name in names}, self._batches())
        if task.shared is not None:
            for acts, one in zip(self._acts, self.trainer.trainers.values(), strict=True):
                # From rows apart from the batches, which its own `fit` would otherwise use up.
                rows, n_batches = (acts[ids] for ids in torch.from_numpy(task.order)), min(len(task.order), 1000)
                with quiet():
                    one.activation_scaler.estimate_scaling_factor(task.acts.shape[-1], rows, n_batches)

    def _make_sae(self, is_sparse: bool) -> Any:
        task = self._task
        settings: dict[str, Any] = {"d_in": task.acts.shape[-1], "d_sae": task.n_latents, "k": task.k}
        if task.shared is not None:
            settings["normalize_activations"] = "expected_average_only_in"
        if is_sparse:
            settings |= {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        if task.architecture == "topk":
            return sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**settings))
        return sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**settings))

    def _config(self) -> SAETrainerConfig:
        steps, batch = self._task.order.shape
        settings: dict[str, Any] = {"lr_end": SAETrainerConfig.lr / 10}  # its runner's own, without effect here
        if (shared := self._task.shared) is not None:
            settings = {
                "lr": shared.lr,
                "lr_end": shared.lr / 10,
                "lr_warm_up_steps": shared.warmup_steps,
                "lr_decay_steps": shared.decay_steps,
                "dead_feature_window": shared.dead_tokens // batch,
            }
        return SAETrainerConfig(total_training_samples=steps * batch, train_batch_size_samples=batch, **settings)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        for rows in torch.from_numpy(self._task.order):
            yield {f"layer_{layer:02d}": acts[rows] for layer, acts in enumerate(self._acts)}

    def advance(self, n_steps: int) -> None:
        """Take the next steps."""
        self._step += n_steps
        self.trainer.cfg.total_training_samples = self._step * self._task.order.shape[1]
        with quiet():
            self.trainer.fit()

    def weights(self) -> Iterator[Weights]:
        """Yield each layer's SAE as `save_inference_model` writes it."""
        for sae in self.trainer.saes.values():
            with tempfile.TemporaryDirectory() as folder:
                yield _read(sae.save_inference_model(folder)[0])


def _read(path: Path) -> Weights:
    tensors = safetensors.numpy.load_file(path)
    return Weights(*(tensors.get(field.name) for field in dataclasses.fields(Weights)))


class Sparsify:
    """sparsify's trainer, which has TopK alone.

    Its defaults: Signum, schedule-free, lr 5e-3 / sqrt(F / 2^14); or Adam, lr 2e-4 / sqrt(F / 2^14), 1,000 steps of
    warm-up, linear decay; no auxiliary loss. With shared settings the auxiliary loss has Gao et al.'s coefficient 1/32.
    """

    def __init__(self, task: Task, *, optimizer: str) -> None:
        """Make the SAEs; the optimizer is signum or adam."""
        settings: dict[str, Any] = {}
        if (shared := task.shared) is not None:
            settings = {
                "lr": shared.lr,
                "lr_warmup_steps": shared.warmup_steps,
                "auxk_alpha": 1 / 32,
                "dead_feature_threshold": shared.dead_tokens,
            }
        config = sparsify.TrainConfig(
            sparsify.SparseCoderConfig(num_latents=task.n_latents, k=task.k),
            batch_size=1,  # a sequence of B tokens
            optimizer=optimizer,
            hookpoints=[f"layers.{layer}" for layer in range(len(task.acts))],
            init_seeds=[task.seed],
            log_to_wandb=False,
            **settings,
        )
        self._sequences, self._step = Sequences(task.order), 0
        with quiet():
            self.trainer = SparsifyTrainer(config, self._sequences, RowModel(task.acts))

    def advance(self, n_steps: int) -> None:
        """Take the next steps."""
        self._step += n_steps
        self.trainer.dataset = self._sequences.select(range(self._step))
        with quiet():
            self.trainer.fit()

    def weights(self) -> Iterator[Weights]:
        """Yield each layer's SAE as `save` writes it: of schedule-free optimizers the average over steps."""
        averaging = [each for each in self.trainer.optimizers if isinstance(each, schedulefree.ScheduleFreeWrapper)]
        for optimizer in averaging:
            optimizer.eval()
        for coder in self.trainer.saes.values():
            tensors = coder.encoder.weight.T, coder.encoder.bias, coder.W_dec, coder.b_dec
            yield Weights(*(np.array(tensor.detach().numpy()) for tensor in tensors), None)
        for optimizer in averaging:
            optimizer.train()


class SparsifyTrainer(sparsify.Trainer):
    """sparsify's trainer without checkpoints."""

    def save(self) -> None:
        """Save nothing at the end of `fit`: a checkpoint is no part of a step."""


class RowModel(torch.nn.Module):
    """Rows in memory in the place of sparsify's language model: token ids are row numbers, blocks return their rows."""

    dummy_inputs = types.MappingProxyType({"input_ids": torch.zeros(1, 1, dtype=torch.long)})
    device = torch.device("cpu")

    def __init__(self, acts: Float[np.ndarray, "L N D"]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in acts)
        self._acts = torch.from_numpy(acts)

    @property
    def base_model(self) -> torch.nn.Module:
        return self

    def forward(self, input_ids: Int[torch.Tensor, "N T"]) -> None:
        for layer, acts in zip(self.layers, self._acts, strict=True):
            layer(acts[input_ids])


class Sequences(Sequence):
    """The dataset that sparsify's trainer reads: a step's row numbers are one sequence."""

    def __init__(self, order: Int[np.ndarray, "S B"]) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, step: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self._order[step])}

    def select(self, steps: range) -> "Sequences":
        """Return some of the steps, as `datasets.Dataset` does."""
        return Sequences(self._order[steps.start : steps.stop])
