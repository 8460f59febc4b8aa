"""Every command in README.md exists and parses: launch scripts, config files, and jaxsae's own with --dry-run."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from jaxsae import cli
from jaxsae.pipeline.stages import STAGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    """Return the lines of code blocks that start a jaxsae command or a launch script, continuations joined."""
    blocks = re.findall(r"^```(?:bash|sh|console|)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    wanted = re.compile(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:sbatch )?((?:jaxsae|launch/)\S*( .*)?)$")
    found = [match[1] for line in lines if (match := wanted.match(line.strip()))]
    return [command for command in found if re.match(r"jaxsae |launch/[\w.-]+( |$)", command)]


COMMANDS = commands()


def test_readme__shows_the_two_commands_and_others():
    assert "launch/demo" in [shlex.split(command, comments=True)[0] for command in COMMANDS]
    assert "launch/test" in [shlex.split(command, comments=True)[0] for command in COMMANDS]
    assert sum(command.startswith("jaxsae ") for command in COMMANDS) >= 3


def test_readme__has_at_most_200_lines():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("launch/")])
def test_launch_script_of_the_readme__exists_and_parses(command):
    check_script(ROOT / shlex.split(command, comments=True)[0])


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix != ".txt"))
def test_launch_script__parses(name):
    check_script(ROOT / "launch" / name)


def check_script(path):
    assert path.is_file()
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch"
    subprocess.run(["bash", "-n", path], check=True, timeout=20)


def test_slurm_script__starts_a_command_that_parses(tmp_path, monkeypatch, capsys):
    text = (ROOT / "launch" / "slurm.sbatch").read_text(encoding="utf-8").replace("\\\n", " ")
    command = re.search(r"srun \.venv/bin/(jaxsae .*)", text)[1].replace('"$1"', "CORPUS").replace('"$2"', "QUESTIONS")
    check_command(command, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("jaxsae ")])
def test_command_of_the_readme__parses_with_existing_files(command, tmp_path, monkeypatch, capsys):
    check_command(command, tmp_path, monkeypatch, capsys)


def check_command(command, tmp_path, monkeypatch, capsys):
    """Run a command with --dry-run: exit 0, nothing is written, and a line for each of its stages."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "CORPUS").with_suffix(".txt").write_text("A document.\n")
    question = '{"id": "1", "question": "Where?", "answers": ["Here"], "group": "1"}\n'
    (tmp_path / "QUESTIONS").with_suffix(".jsonl").write_text(question)
    words = shlex.split(command, comments=True)
    words = [re.sub(r"=(CORPUS|corpus\.txt)$", f"={tmp_path}/CORPUS.txt", word) for word in words]
    words = [re.sub(r"=(QUESTIONS|questions\.jsonl)$", f"={tmp_path}/QUESTIONS.jsonl", word) for word in words]
    words = [re.sub(r"^--workdir=", f"--workdir={tmp_path}/", word) for word in words]
    for word in words:
        if word.startswith("--config="):
            assert (ROOT / word.removeprefix("--config=")).is_file()
    before = sorted(tmp_path.rglob("*"))
    is_help = "--help" in words
    assert cli.run(words if is_help or "--dry-run" in words else [*words, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert not said.err
    assert said.out
    if not is_help and words[1] == "run":
        assert said.out.splitlines() == [f"{name}: would run" for name in STAGES]
    assert sorted(tmp_path.rglob("*")) == before
