"""The rules that hold for the code as a whole."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "jaxsae").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Return every module name that a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_import_contracts__are_kept():
    lint = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout


def test_partition_specs__are_written_in_mesh_only():
    users = [path.name for path in SOURCES if "jax.sharding.PartitionSpec" in imported(path)]
    assert users == ["mesh.py"]


def test_tensorstore__is_known_to_those_that_own_a_file_format():
    users = {str(path.relative_to(ROOT / "jaxsae")) for path in SOURCES if "tensorstore" in imported(path)}
    assert users == {"activations/store.py", "artifacts.py", "sae/checkpoint.py"}


def test_pickle__is_used_nowhere():
    banned = {"pickle", "joblib.dump", "joblib.load", "dill", "cloudpickle"}
    assert not [path.name for path in SOURCES if banned & imported(path)]


def test_nnx__is_used_by_five_names_at_most():
    names = {
        node.attr
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx"
    }
    assert 1 <= len(names) <= 5
    assert not names & {"jit", "grad", "Optimizer"}


def test_import__of_jaxsae_loads_nothing_heavy():
    code = "import sys, jaxsae; print([m for m in ('jax', 'numpy', 'sklearn', 'absl') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_host_half__never_loads_jax_at_run_time():
    code = (
        "import sys, jaxsae.tracking, jaxsae.detection, jaxsae.report, jaxsae.config, jaxsae.progress;"
        "print([m for m in ('jax', 'flax', 'optax', 'orbax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_help__comes_without_jax_and_lists_the_stages():
    code = (
        "import sys; from jaxsae import cli; cli.run(['jaxsae', '--help']);"
        "print([m for m in ('jax', 'numpy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")
    assert all(
        f"\n  {stage} " in done.stdout for stage in ("extract", "train", "answer", "track", "detect", "evaluate")
    )
