"""GPT-2 medium (24 layers, D 1024): sparse SAEs on 4 GPUs, six layers on each.

    jaxsae run --config=configs/gpt2_medium.py --workdir=runs/gpt2_medium \
        --config.corpus.path=corpus.txt --config.questions.path=questions.jsonl

Not run here: its weights could not be had. The store of 10 M tokens takes 492 GB (48 KiB a token).
"""

from jaxsae.config import defaults


def get_config():
    config = defaults()
    config.model.name = "gpt2-medium"
    config.corpus.n_tokens = 10_000_000  # as many as the published run
    config.corpus.context = 1024
    config.activations.batch = 16

    config.sae.architecture = "batchtopk"
    config.sae.n_latents = 16_384
    config.sae.k = 32

    config.train.batch = 8192
    config.train.n_tokens = 300_000_000
    return config
