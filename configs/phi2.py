"""Phi-2 (32 layers, D 2560) with the published run's hyperparameters (GhostTrack), dense SAEs and all.

    jaxsae run --config=configs/phi2.py --workdir=runs/phi2 \
        --config.corpus.path=corpus.txt --config.questions.path=questions.jsonl

Published: F 4 D, threshold 0.1, L1 0.01, batch 64, and what the GPT-2 medium run has; number of tokens and context were
not, and are that run's. Its outcome: detection AUROC .6735, accuracy .70.
Not run here: its weights could not be had. `jaxsae plan --devices=4` asks for 1.6 TiB of disk, 24 GiB of memory and
26 GiB on each; with the rates of an H200 (790 TFLOP/s in bfloat16, 67 in float32, 4.8 TB/s) and a disk of 1 GB/s in
place of measured ones its arithmetic gives 23 hours, which is a plan and no measurement.
"""

from jaxsae.config import defaults


def get_config():
    config = defaults()
    config.model.name = "microsoft/phi-2"
    config.corpus.n_tokens = 10_000_000  # not published for Phi-2: the GPT-2 medium run's
    config.corpus.context = 512  # not published for Phi-2: the GPT-2 medium run's
    config.activations.batch = 16

    config.sae.architecture = "jumprelu_l1"
    config.sae.expansion = 4.0
    config.sae.threshold = 0.1
    config.sae.sparsity_coefficient = 0.01

    config.train.batch = 64
    config.train.epochs = 20.0
    config.train.lr = 1e-4
    config.train.optimizer = "adam"
    config.train.schedule = "cosine"
    config.train.clip_norm = 1.0
    config.train.unit_decoder_every = 100
    config.train.held_out = 0.05
    config.train.buffer_tokens = 32_768  # 5 GiB: a token's 32 layers are 160 KiB
    config.train.evaluate_every = 148_000  # about an epoch
    config.train.checkpoint_every = 148_000

    config.features.keep = 50
    config.features.positions = ("last_answer",)
    config.tracking.top_k = 50
    config.tracking.association = "hungarian"
    config.tracking.birth_threshold = 0.5
    config.tracking.association_threshold = 0.5
    config.tracking.semantic_weight = 0.6
    config.tracking.activation_weight = 0.2
    config.tracking.gate = "after"
    return config
