"""GPT-2 small (12 layers, D 768): sparse SAEs by the recipe that published runs agree on.

    jaxsae run --config=configs/gpt2_small.py --workdir=runs/gpt2_small \
        --config.corpus.path=corpus.txt --config.questions.path=questions.jsonl

Not run here: its weights could not be had. The store of 100 M tokens takes 1.9 TB; set corpus.n_tokens to what fits.
"""

from jaxsae.config import defaults


def get_config():
    config = defaults()
    config.model.name = "gpt2"
    config.corpus.n_tokens = 100_000_000
    config.corpus.context = 1024
    config.activations.batch = 32

    config.sae.architecture = "batchtopk"
    config.sae.n_latents = 24_576  # the width of the published GPT-2 small SAEs (Bloom's res-jb)
    config.sae.k = 32

    config.train.batch = 8192
    config.train.n_tokens = 300_000_000
    return config
