"""Detectors across runs: `jaxsae transfer DIR DIR ... --out=DIR` trains on each run's answers and tests on the others'.

The runs share language model and SAEs and differ in their questions. Nothing is written into them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsae import artifacts, detection
from jaxsae.artifacts import InputError
from jaxsae.detection.tables import TRACK_FAMILIES as FAMILIES
from jaxsae.detection.transfer import TRANSFERRED, transfer_matrix
from jaxsae.pipeline.detect import read_tables, write_rows
from jaxsae.pipeline.stages import STAGES, read_record, record_path
from jaxsae.progress import Progress


def run(workdirs: Sequence[Path], out: Path, *, seed: int = 0, bootstrap: int = 2000) -> str:
    """Write `transfer.json` and `transfer.csv` under `out`; return the matrix of AUROCs as text.

    Raises:
        InputError: there are fewer than two runs, two of one name, a file is missing or damaged, or the runs are of
            different SAEs or kept or followed their features by different settings.
    """
    names = [workdir.name for workdir in workdirs]
    if len(workdirs) < 2 or len(set(names)) < len(names):
        raise InputError(f"jaxsae transfer takes two or more runs with folders of different names, got {names}")
    _check_same_saes(workdirs)
    _check_same_settings(workdirs)
    tables = {workdir.name: read_tables(workdir) for workdir in workdirs}
    everywhere = [name for name in FAMILIES if all(name in each.track_families for each in tables.values())]
    config = detection.ProtocolConfig(seed=seed, bootstrap=bootstrap, families=("metrics", *everywhere))
    with Progress("transfer", len(names) ** 2, "pairs") as bar:
        done = iter(range(1, len(names) ** 2 + 1))
        rows = transfer_matrix(tables, config, on_pair=lambda train, test: bar.update(next(done), f"{train} to {test}"))
    write_rows(out / "transfer.csv", rows)
    artifacts.write_json(
        out / "transfer.json",
        {"runs": {workdir.name: str(workdir) for workdir in workdirs}, "seed": seed, "rows": rows},
    )
    return describe(rows, names)


def _check_same_saes(workdirs: Sequence[Path]) -> None:
    """Raise unless the runs' SAEs are the same, to the digest of their measures."""
    paths = [workdir / "saes" / "evaluation.json" for workdir in workdirs]
    for path in paths:
        artifacts.read_json(path, rebuild="run jaxsae train")
    digests = [artifacts.sha256_file(path) for path in paths]
    for workdir, digest in zip(workdirs[1:], digests[1:], strict=True):
        if digest != digests[0]:
            raise InputError(
                f"{workdir}/saes and {workdirs[0]}/saes are different SAEs, whose latents mean different things; copy "
                "one run's saes/ and manifests/ to the other and run jaxsae answer, track and detect there"
            )


def _check_same_settings(workdirs: Sequence[Path]) -> None:
    """Raise unless the runs kept and followed their features by the same settings: else their columns differ."""
    first, *others = (_settings(workdir) for workdir in workdirs)
    for workdir, settings in zip(workdirs[1:], others, strict=True):
        for name in sorted(first.keys() | settings.keys()):
            if first.get(name) != settings.get(name):
                raise InputError(
                    f"{workdir} was tracked with {name}={settings.get(name)}, {workdirs[0]} with {first.get(name)}; "
                    "run jaxsae track and detect there with the same"
                )


def _settings(workdir: Path) -> dict[str, Any]:
    record = read_record(workdir, STAGES["track"])
    if record is None:
        raise InputError(f"{record_path(workdir, STAGES['track'])} is missing; run jaxsae track")
    return {name: value for name, value in record["settings"].items() if name.startswith(("features.", "tracking."))}


def describe(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Return the AUROCs as lines of text, a row per detector and training run, a column per tested one."""
    auroc = {(row["detector"], row["train"], row["test"]): row["auroc"] for row in rows}
    width = max(map(len, names))
    lines = ["AUROC; rows: detector and what it learned from, columns: what it was tested on (own: cross-validated)"]
    lines.append(f"{'':18} {'':{width}}  " + "  ".join(f"{name:>{max(width, 5)}}" for name in names))
    for detector in TRANSFERRED:
        for train in names:
            cells = [auroc[detector, train, test] for test in names]
            text = "  ".join(f"{'–' if cell is None else format(cell, '.3f'):>{max(width, 5)}}" for cell in cells)
            lines.append(f"{detector:18} {train:{width}}  {text}")
    return "\n".join(lines)
