"""GPT-2 medium with the published run's hyperparameters (GhostTrack), dense SAEs and all.

    jaxsae run --config=configs/gpt2_medium_reference.py --workdir=runs/gpt2_medium_reference \
        --config.corpus.path=corpus.txt --config.questions.path=questions.jsonl

Its published outcome: 15 h 46 min on 4 x A100; MSE mean .001575, median .001392, min .000744 (layer 3), max .003226
(layer 23); 749 to 3,218 of 5,120 latents active; detection AUROC 0.71 on 45 test rows. Not run here: the weights could
not be had.
"""

from jaxsae.config import defaults


def get_config():
    config = defaults()
    config.model.name = "gpt2-medium"
    config.corpus.n_tokens = 10_000_000
    config.corpus.context = 512
    config.activations.batch = 32

    config.sae.architecture = "jumprelu_l1"
    config.sae.expansion = 5.0
    config.sae.threshold = 1.0
    config.sae.sparsity_coefficient = 0.05

    config.train.batch = 128
    config.train.epochs = 20.0
    config.train.lr = 1e-4
    config.train.optimizer = "adam"
    config.train.schedule = "cosine"
    config.train.clip_norm = 1.0
    config.train.unit_decoder_every = 100
    config.train.held_out = 0.05
    config.train.evaluate_every = 74_000  # about an epoch
    config.train.checkpoint_every = 74_000

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
