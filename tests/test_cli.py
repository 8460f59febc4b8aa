"""The command line: what it says, its exit codes, and that a wrong word writes nothing."""

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import logging

from jaxsae import cli
from jaxsae.artifacts import InputError
from jaxsae.config import SECTIONS
from jaxsae.pipeline import run as runs
from jaxsae.pipeline.stages import STAGES, Interruption

ROOT = Path(__file__).parents[1]
DEMO = f"--config={ROOT}/configs/demo.py"


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Return a check that a command line ends with 2 and one line, and that nothing is written."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments, words):
        assert cli.run(["jaxsae", *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1
        assert re.search(rf"^jaxsae: .*{words}", said.err), said.err
        assert not any(tmp_path.iterdir())

    return check


WRONG = {
    "unknown command": (["extrct", DEMO, "--workdir=w"], "got extrct; did you mean extract\\?"),
    "unlike any command": (["fly", DEMO, "--workdir=w"], "got fly; jaxsae --help says what they do"),
    "no command": ([DEMO, "--workdir=w"], r"expected a command \(run, extract, train, .*\), got no command"),
    "two commands": (["extract", "train", DEMO, "--workdir=w"], "one command at a time, got extract train"),
    "a stray word": (
        ["train", DEMO, "--workdir=w", "lr=3"],
        "one command at a time, got train lr=3; flags are written",
    ),
    "no workdir": (["train", DEMO], "--workdir is missing; it has no default"),
    "empty workdir": (["train", DEMO, "--workdir="], "--workdir is missing; it has no default"),
    "no config": (["train", "--workdir=w"], "--config is missing; jaxsae COMMAND --config="),
    "config not there": (["train", "--config=nope.py", "--workdir=w"], r"--config=nope\.py is not a file"),
    "config a folder": (["train", f"--config={ROOT}/configs", "--workdir=w"], "configs is not a file"),
    "unknown flag": (["train", DEMO, "--workdir=w", "--wrkdir=x"], "'wrkdir'. Did you mean: workdir"),
    "unknown field": (
        ["train", DEMO, "--workdir=w", "--config.train.lrr=3"],
        r"--config\.train\.lrr is no setting; the nearest is --config\.train\.lr\n",
    ),
    "unknown section": (
        ["train", DEMO, "--workdir=w", "--config.trian.lr=3"],
        r"--config\.trian\.lr is no setting; the nearest is --config\.train\.lr\n",
    ),
    "wrong type": (["train", DEMO, "--workdir=w", "--config.train.batch=x"], r"--config\.train\.batch=x: .*'x'"),
    "wrong value": (["train", DEMO, "--workdir=w", "--config.train.batch=0"], "train.batch is 0, expected at least 1"),
    "wrong choice": (
        ["train", DEMO, "--workdir=w", "--config.sae.architecture=lista"],
        "sae.architecture is 'lista', expected one of topk, batchtopk, .*jumprelu_l1",
    ),
    "wrong verbosity": (["train", DEMO, "--workdir=w", "--verbosity=loud"], "--verbosity=loud"),
    "file not there": (
        ["answer", DEMO, "--workdir=w", "--config.questions.path=/nope.jsonl"],
        r"questions\.path /nope\.jsonl does not exist",
    ),
    "package not there": (
        ["run", DEMO, "--workdir=w", "--config.model.path=package://nope/x"],
        "package://nope/x: .*no package 'nope' is installed",
    ),
    "import of nothing": (["import", "--model=m", "--workdir=w"], "import takes one SRC, the SAEs' folder; got none"),
    "import of two": (["import", "a", "b", "--model=m", "--workdir=w"], "import takes one SRC.*; got a b"),
    "import for no model": (["import", "a", "--workdir=w"], "--model is missing; jaxsae import --help says"),
    "import to nowhere": (["import", "a", "--model=m"], "--workdir is missing; jaxsae import --help says"),
    "import in an unknown layout": (
        ["import", "a", "--model=m", "--workdir=w", "--format=torch"],
        "--format=torch: value should be one of <saelens|sparsify|dictionary_learning|openai|gemma_scope>",
    ),
    "import of a negative layer": (["import", "a", "--model=m", "--workdir=w", "--layer=-1"], "--layer=-1: "),
    "import with a config": (["import", "a", DEMO, "--model=m", "--workdir=w"], "Unknown command line flag 'config'"),
    "import from nowhere": (["import", "a", "--model=m", "--workdir=w"], "a does not exist; give a folder with SAEs"),
    "export to nowhere": (["export", "--workdir=w"], "--out is missing; jaxsae export --help says"),
    "export of what": (["export", "saes", "--workdir=w", "--out=o"], "export takes flags alone; got saes"),
    "export of no run": (["export", "--workdir=w", "--out=o"], r"w/saes/suite\.json is missing; run jaxsae train"),
    "sweep of no run": (
        ["sweep", f"--config={ROOT}/configs/sweeps/demo.py", "--workdir=w"],
        r"w/answers\.jsonl is missing: run jaxsae answer",
    ),
    "sweep nowhere": (["sweep", f"--config={ROOT}/configs/sweeps/demo.py"], "--workdir is missing; it has no default"),
    "score of nothing": (["score", "--workdir=w"], "give --prompt or --file, one of the two"),
    "score of two": (["score", "--workdir=w", "--prompt=a", "--file=b"], "give --prompt or --file, one of the two"),
    "score nowhere": (["score", "--prompt=a"], "--workdir is missing; name the folder of a finished run"),
    "score of an unquoted text": (["score", "--workdir=w", "--prompt=a", "b"], "score takes flags alone; got b; quote"),
    "score with answer and file": (
        ["score", "--workdir=w", "--file=a", "--answer=b"],
        "--answer does not go with --file",
    ),
    "score with prompt and out": (["score", "--workdir=w", "--prompt=a", "--out=b"], "--out does not go with --prompt"),
    "score with fewer than no tracks": (["score", "--workdir=w", "--prompt=a", "--tracks=-1"], "--tracks=-1: "),
    "score with no draws": (["score", "--workdir=w", "--prompt=a", "--draws=0"], "--draws=0: "),
    "score with a config": (["score", DEMO, "--workdir=w", "--prompt=a"], "Unknown command line flag 'config'"),
    "score of no run": (
        ["score", "--workdir=w", "--prompt=a"],
        r"w/detector/detector\.json is missing; run jaxsae detect",
    ),
    "score of no file": (["score", "--workdir=w", "--file=a"], "a is missing or not a file"),
    "earlier stage not run": (
        ["train", DEMO, "--workdir=w"],
        r"w/activations/meta\.json is missing: run jaxsae extract",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_command_line__ends_in_one_line_and_writes_nothing(fails, case):
    arguments, words = WRONG[case]
    fails(*arguments, words=words)


def test_wrong_config_file__ends_in_one_line(fails, tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "mine.py"
    path.write_text("def get_config():\n    return nothing\n")
    fails("train", f"--config={path}", "--workdir=w", words="the config file cannot be read: name 'nothing' is not def")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"], ["nonsense", "--help"]])
def test_help__lists_the_stages_in_order(arguments, capsys):
    assert cli.run(["jaxsae", *arguments]) == 0
    said = capsys.readouterr().out
    names = ("run", *STAGES, "sweep", "plan", "audit", "score", "transfer", "export", "import")
    places = [re.search(rf"^  {name} +\w", said, flags=re.MULTILINE).start() for name in names]
    assert places == sorted(places)
    for flag in ("--config=FILE", "--workdir=DIR", "--dry-run", "--redo"):
        assert flag in said


@pytest.mark.parametrize("command", ["run", *STAGES, "plan"])
def test_help__of_a_command_names_its_settings(command, capsys):
    assert cli.run(["jaxsae", command, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"jaxsae {command}: ")
    named = {section for section in SECTIONS if f"  --config.{section}." in said}
    is_whole = command in ("run", "plan")
    wanted = set(SECTIONS) if is_whole else {name.split(".")[0] for name in STAGES[command].settings}
    assert named >= wanted - {"seed"}
    assert ("seed (0)" in said) == (is_whole or "seed" in STAGES[command].settings or command == "extract")


@pytest.mark.parametrize(
    ("command", "flags"),
    [("export", ["workdir", "out", "format"]), ("import", ["model", "dtype", "workdir", "format", "layer"])],
)
def test_help__of_exchange_names_its_flags(command, flags, capsys):
    assert cli.run(["jaxsae", command, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"jaxsae {command}: {cli.COMMANDS[command]}\n")
    assert re.findall(r"^  --(\w+)=", said, flags=re.MULTILINE) == flags


def test_help__of_score_names_its_flags(capsys):
    assert cli.run(["jaxsae", "score", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"jaxsae score: {cli.COMMANDS['score']}\n")
    named = re.findall(r"^  --(\w+)=", said, flags=re.MULTILINE)
    assert named == ["workdir", "prompt", "answer", "file", "out", "tracks", "draws", "model"]


def test_commands__are_run_the_stages_sweep_plan_and_exchange():
    assert list(cli.COMMANDS) == ["run", *STAGES, "sweep", "plan", "audit", "score", "transfer", "export", "import"]


def test_help__answers_within_a_second_and_loads_nothing_heavy():
    script = (
        "import sys\nfrom jaxsae import cli\ncli.run(['jaxsae', '--help'])\n"
        "print([name for name in ('jax', 'numpy', 'absl', 'sklearn') if name in sys.modules])"
    )
    started = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - started[1] < 5  # a second, and patience for a loaded machine


def test_console_script__speaks_on_stderr_and_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "jaxsae.cli", "trian", DEMO, "--workdir=w"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jaxsae: expected a command (run, extract, train")
    assert done.stderr.endswith("got trian; did you mean train?\n")
    assert not any(tmp_path.iterdir())


def test_dry_run__says_what_would_run_and_makes_nothing(tmp_path, capsys):
    assert cli.run(["jaxsae", "run", DEMO, f"--workdir={tmp_path}/w", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: would run" for name in STAGES]
    assert cli.run(["jaxsae", "detect", DEMO, f"--workdir={tmp_path}/w", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == ["detect: cannot run: answers.jsonl is missing: run jaxsae answer"]
    assert not any(tmp_path.iterdir())


def test_flags__may_be_given_as_two_words(tmp_path, capsys):
    arguments = ["--config", f"{ROOT}/configs/demo.py", "--workdir", f"{tmp_path}/w", "--config.seed", "3"]
    assert cli.run(["jaxsae", "extract", *arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == "extract: would run\n"


def raising(error):
    def execute(*arguments, **settings):
        raise error

    return execute


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("one\n  two"), 2, "jaxsae: one two\n"),
        (Interruption(143), 143, "jaxsae: interrupted; the same command goes on from here\n"),
        (Interruption(130), 130, "jaxsae: interrupted; the same command goes on from here\n"),
        (KeyboardInterrupt(), 130, "jaxsae: interrupted; the same command goes on from here\n"),
        *(
            (
                OSError(number, os.strerror(number), "w/metrics.json"),
                2,
                f"jaxsae: [Errno {number}] {os.strerror(number)}: 'w/metrics.json'; what was finished before is whole: "
                "free some space and run the same command again\n",
            )
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        ),
    ],
)
def test_exit_code__tells_how_it_ended(monkeypatch, tmp_path, capsys, error, code, words):
    monkeypatch.setattr(runs, "execute", raising(error))
    assert cli.run(["jaxsae", "extract", DEMO, f"--workdir={tmp_path}/w"]) == code
    assert capsys.readouterr().err == words


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("a bug"), RuntimeError("another")])
def test_other_errors__are_bugs_and_keep_their_traceback(monkeypatch, tmp_path, error):
    monkeypatch.setattr(runs, "execute", raising(error))
    with pytest.raises(type(error)):
        cli.run(["jaxsae", "extract", DEMO, f"--workdir={tmp_path}/w"])


def test_execute__gets_command_config_and_command_line(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(runs, "execute", lambda *arguments, **settings: calls.append((arguments, settings)) or 0)
    argv = ["jaxsae", "train", DEMO, f"--workdir={tmp_path}/a b", "--config.seed=3", "--redo"]
    assert cli.run(argv) == 0
    [((command, config, workdir), settings)] = calls
    assert (command, config.seed, workdir) == ("train", 3, tmp_path / "a b")
    assert settings == {
        "config_name": "demo",
        "command_line": f"jaxsae train {DEMO} '--workdir={tmp_path}/a b' --config.seed=3 --redo",
        "redo": True,
    }


def test_log__holds_our_lines_and_only_warnings_of_others(monkeypatch, tmp_path, capsys):
    def execute(*arguments, **settings):
        logging.info("a line of ours")
        logging.debug("a detail")
        for name in ("jaxlib", "asyncio"):
            standard = __import__("logging").getLogger(name)
            standard.setLevel("INFO")
            standard.info("a line of %s", name)
            standard.warning("a warning of %s", name)
        return 0

    monkeypatch.setattr(runs, "execute", execute)
    monkeypatch.setattr(logging.get_absl_handler().python_handler, "stream", sys.stderr)
    assert cli.run(["jaxsae", "extract", DEMO, f"--workdir={tmp_path}/w"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == ["a line of ours", "a warning of jaxlib"]
    assert cli.run(["jaxsae", "extract", DEMO, f"--workdir={tmp_path}/w", "--verbosity=-1"]) == 0
    assert "a line of ours" not in capsys.readouterr().err
