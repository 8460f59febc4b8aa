"""Download the published question sets and one corpus into the user's cache, each checked against its sha256.

    python -m jaxsae.data.fetch nq_open      prints where the file lies

The checksums of truthfulqa, nq_open and known_1000 were computed from the files; those of triviaqa and squad are
TensorFlow Datasets' (`url_checksums`); halueval's and popqa's are the ones that public projects pin (several of them,
all equal). A file that is in the cache is checked again and not downloaded.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from jaxsae.artifacts import DISK_FULL, InputError
from jaxsae.progress import Progress, human_bytes

CORPUS = "squad"  # the default corpus: 442 Wikipedia articles, about 3 million tokens


@dataclasses.dataclass(frozen=True)
class Source:
    """A file on the network.

    Attributes:
        member: the file inside the archive at `url`; None where `url` is the file itself.
    """

    url: str
    sha256: str
    n_bytes: int
    licence: str
    member: str | None = None


_GITHUB = "https://raw.githubusercontent.com"
SOURCES = {
    "truthfulqa": Source(
        f"{_GITHUB}/sylinrl/TruthfulQA/d71c110897f5d31c5d7f309e7bc316c152f6f031/TruthfulQA.csv",
        "b8d8ef1e12f98b4f2a9f47abc9765da0640b182b6c5d9b92f0c1a1f2f1e02e5c",
        503_550,
        "Apache-2.0",
    ),
    "halueval": Source(
        f"{_GITHUB}/RUCAIBox/HaluEval/b7253db3cdaa0ab2c382f92b26b390109174f77e/data/qa_data.json",
        "89ed139ec5e3a3169a0b30e45569ac1283846f76f27f7bb5e908ee6deed57e88",
        6_164_420,
        "MIT",
    ),
    "triviaqa": Source(
        "https://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz",
        "7f0c94207fd0a1eb7bba3d52cdfe0735c98de850b9e5aa4e75f2776ef9a531d0",
        632_549_060,
        "none stated; the questions belong to the trivia sites they are from",
        "triviaqa-unfiltered/unfiltered-web-dev.json",
    ),
    "nq_open": Source(
        f"{_GITHUB}/google-research-datasets/natural-questions/a7a113c9fdc2d9986d624bd43b8a18d6d5779eaa/nq_open/"
        "NQ-open.dev.jsonl",
        "f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616",
        391_316,
        "CC BY-SA 3.0",
    ),
    "popqa": Source(
        "https://huggingface.co/datasets/akariasai/PopQA/resolve/098765c79ea10a2cb19c828324e33281b8336ec0/test.tsv",
        "9a5227f41bff0e4c331d4a774d946b12f95307892b58f860a9606ef356e6089b",
        5_205_200,
        "none stated; the authors' code is MIT",
    ),
    "known_1000": Source(
        "https://rome.baulab.info/data/dsets/known_1000.json",
        "61daca55318bb5260c1e62e133debef9102c7b278bbc7b19dd2ac655543f333a",
        343_229,
        "MIT",
    ),
    CORPUS: Source(
        "https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json",
        "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
        30_288_272,
        "CC BY-SA 4.0",
    ),
}


def download(name: str) -> Path:
    """Return the local path of one of `SOURCES`, downloaded unless it is in the cache.

    Raises:
        InputError: the name is unknown, the file cannot be had (the message says how to give one by path), or its
            sha256 is another.
    """
    import pooch

    if name not in SOURCES:
        raise InputError(f"{name!r} is no file to download, expected one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    way_out = f"give a file of your own as {'corpus' if name == CORPUS else 'questions'}.path"
    pooch.get_logger().setLevel("WARNING")  # it would print its own lines beside ours
    file_name = f"{name}-{source.url.rpartition('/')[2]}"
    cache = Path(pooch.os_cache("jaxsae"))
    if not (cache / file_name).exists():
        logging.info("downloading %s (%s)", source.url, human_bytes(source.n_bytes))
    try:
        with Progress(f"download {name}", source.n_bytes, "bytes") as bar:
            found = pooch.retrieve(
                url=source.url,
                known_hash=f"sha256:{source.sha256}",
                fname=file_name,
                path=cache,
                downloader=pooch.HTTPDownloader(progressbar=_Bar(bar), timeout=30),
                processor=pooch.Untar(members=[source.member]) if source.member else None,
            )
    except ValueError as error:
        raise InputError(f"{source.url}: {' '.join(str(error).split())}; {way_out}") from None
    except OSError as error:  # requests' errors are of this kind
        if error.errno in DISK_FULL:
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source.url} cannot be downloaded ({reason}); {way_out}") from None
    return Path(found[0] if source.member else found)


class _Bar:
    """Turns the calls pooch makes on a progress bar into ours."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.total, self.done = bar, 0, 0

    def update(self, n_bytes: int) -> None:
        self.done += n_bytes
        self.bar.update(min(self.done, self.bar.total))

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        pass


def main(argv: Sequence[str]) -> int:
    """Print the path of one file; return the exit code, 2 after one line for what cannot be had."""
    try:
        if len(argv) != 1:
            raise InputError(f"expected one name among {', '.join(SOURCES)}, got {list(argv)}")
        print(download(argv[0]))
    except InputError as error:
        print(f"jaxsae: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
