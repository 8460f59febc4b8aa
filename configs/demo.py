"""The whole job on the small GPT-2 that the package carries: from its corpus to a hallucination report.

    jaxsae run --config=configs/demo.py --workdir=runs/demo

About 3 minutes on 2 idle CPU cores (5 were measured on a busy machine), half of it for the detectors; 1.7 GiB of
memory, 0.5 GB on disk. Expected: FVU .063 (layer 0) to .009 (layer 5) at L0 8, at most .4 % dead, a delta CE of at most
.020; AUROC of the summed log-probability .879, of the tracks .64, of the noise canary .50.
"""

from jaxsae.config import defaults


def get_config():
    config = defaults()
    config.model.name = "demo_gpt2"
    config.model.path = "package://jaxsae/assets/demo_gpt2"
    config.model.dtype = "float32"  # a CPU's own precision; bfloat16 is for accelerators

    config.corpus.path = "package://jaxsae/assets/demo_gpt2/corpus.txt.gz"
    config.corpus.context = 64
    config.activations.batch = 64

    config.sae.architecture = "topk"
    config.sae.expansion = 4.0
    config.sae.k = 8

    config.train.batch = 1024
    config.train.n_tokens = 700_000
    config.train.evaluate_every = 100
    config.train.checkpoint_every = 200
    config.train.evaluate_tokens = 16_384

    config.questions.path = "package://jaxsae/assets/demo_gpt2/questions.jsonl"
    config.questions.prompt = "{question}"
    config.questions.stop = (".",)
    config.questions.max_new_tokens = 8
    config.questions.batch = 256

    config.features.keep = 8
    config.tracking.top_k = 8
    config.detection.repeats = 2  # 4,800 answers need no more for steady numbers
    return config
