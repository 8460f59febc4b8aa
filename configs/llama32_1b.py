"""Llama 3.2 1B (16 layers, D 2048): sparse SAEs by the recipe that published runs agree on.

    jaxsae run --config=configs/llama32_1b.py --workdir=runs/llama32_1b \
        --config.corpus.path=corpus.txt --config.questions.path=questions.jsonl

Its weights are given to those who accept Meta's licence on the Hugging Face Hub and log in (`hf auth login`).
Not run here: its weights could not be had. `jaxsae plan --devices=4` asks for 0.7 TiB of disk, 14 GiB of memory and
35 GiB on each; with the rates of an H200 (790 TFLOP/s in bfloat16, 67 in float32, 4.8 TB/s) and a disk of 1 GB/s in
place of measured ones its arithmetic gives 7 hours, which is a plan and no measurement.
"""

from jaxsae.config import defaults


def get_config():
    config = defaults()
    config.model.name = "meta-llama/Llama-3.2-1B"
    config.corpus.n_tokens = 10_000_000
    config.corpus.context = 1024
    config.activations.batch = 8

    config.sae.architecture = "batchtopk"
    config.sae.n_latents = 16_384  # 8 D
    config.sae.k = 64

    config.train.batch = 8192
    config.train.n_tokens = 300_000_000
    config.train.buffer_tokens = 65_536  # 4 GiB: a token's 16 layers are 64 KiB
    config.train.checkpoint_every = 5000
    return config
