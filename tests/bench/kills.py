"""Kill a training run ten times, with SIGKILL at random moments, and see whether it ends as if nothing had happened.

    python tests/bench/kills.py DIR [store|stream ...]

Two runs of `configs/demo.py`, shortened, of each source: one is left alone, the other is killed and started again, each
time after a random part of the time that the first took. Both must end with the same bytes in every array of their last
checkpoint. Prints one line a kill, and fails where the runs differ.
"""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
N_KILLS = 10
SHORTENED = (
    "train.n_tokens=120000",
    "train.evaluate_every=20",
    "train.checkpoint_every=7",
    "train.buffer_tokens=16384",
    "train.delta_ce_tokens=1024",
    "corpus.n_tokens=60000",
)


def start(workdir: Path, source: str, stage: str) -> subprocess.Popen:
    flags = [f"--config.{change}" for change in (*SHORTENED, f"activations.source={source}")]
    command = [sys.executable, "-m", "jaxsae.cli", stage, f"--config={ROOT}/configs/demo.py", f"--workdir={workdir}"]
    return subprocess.Popen([*command, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, said = process.communicate()
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}:\n{said}")


def steps_saved(workdir: Path) -> list[int]:
    return sorted(int(path.stem) for path in (workdir / "saes" / "manifests").glob("*.json"))


def digests(workdir: Path) -> dict[str, str]:
    """Return the digest of every array's file of the last checkpoint."""
    folder = workdir / "saes" / "checkpoints" / str(steps_saved(workdir)[-1])
    files = [path for item in ("best", "last", "train") for path in (folder / item).rglob("*") if path.is_file()]
    arrays = [path for path in files if path.name[0].isdigit()]
    assert arrays
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in arrays}


def compare(folder: Path, source: str, moments: random.Random) -> None:
    whole, killed = folder / f"{source}-whole", folder / f"{source}-killed"
    if source == "store":
        finish(start(whole, source, "extract"))
        shutil.copytree(whole, killed)
    began = time.monotonic()
    finish(start(whole, source, "train"))
    seconds = time.monotonic() - began
    n_killed = 0
    while n_killed < N_KILLS:
        process = start(killed, source, "train")
        try:
            process.wait(timeout=moments.uniform(0.2, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            n_killed += 1
            print(f"{source}: kill {n_killed}, checkpoints {steps_saved(killed)}", flush=True)
            continue
        print(f"{source}: finished before kill {n_killed + 1}; begun anew", flush=True)
        for name in ("saes", "logs", "manifests/train.json"):
            path = killed / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    finish(start(killed, source, "train"))
    expected, found = digests(whole), digests(killed)
    if expected != found:
        sys.exit(f"{source}: {[name for name in expected if expected[name] != found.get(name)]} differ")
    print(f"{source}: after {N_KILLS} kills all {len(found)} arrays are the same, bit for bit", flush=True)


def main(folder: Path, sources: list[str]) -> None:
    folder.mkdir(parents=True)
    moments = random.Random(0)
    for source in sources:
        compare(folder, source, moments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["store", "stream"])
