"""Phi-2 (32 layers, D 2560): sparse SAEs by the recipe that published runs agree on.

    jaxsae run --config=configs/phi2_sparse.py --workdir=runs/phi2_sparse \
        --config.corpus.path=corpus.txt --config.questions.path=questions.jsonl

Not run here: its weights could not be had. `jaxsae plan --devices=4` asks for 0.9 TiB of disk, 24 GiB of memory and
46 GiB on each; with the rates of an H200 (790 TFLOP/s in bfloat16, 67 in float32, 4.8 TB/s) and a disk of 1 GB/s in
place of measured ones its arithmetic gives 12 hours, which is a plan and no measurement.
"""

from jaxsae.config import defaults


def get_config():
    config = defaults()
    config.model.name = "microsoft/phi-2"
    config.corpus.n_tokens = 5_000_000  # 0.8 TB on disk; half of the published run's
    config.corpus.context = 1024
    config.activations.batch = 8

    config.sae.architecture = "batchtopk"
    config.sae.n_latents = 20_480  # 8 D
    config.sae.k = 64

    config.train.batch = 8192
    config.train.n_tokens = 200_000_000
    config.train.buffer_tokens = 32_768  # 5 GiB: a token's 32 layers are 160 KiB
    config.train.checkpoint_every = 5000
    return config
