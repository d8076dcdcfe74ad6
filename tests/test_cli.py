"""Command lines: output that cannot be written, names that cannot be printed, empty arguments, files in the way."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import demo
from runtime import cli
from runtime.storage import write_json

TALKATIVE = """
import os, sys
from pathlib import Path
from runtime import cli

def work():
    for _ in range(9):
        print(os.fsdecode(b"caf\\xe9") * 9999, flush=True)
    print("Ä", file=sys.stderr)
    Path(sys.argv[1]).touch()
    return 0

cli.run("program", work)
"""


FULL = "Ä\nwarning: program could not write all of its output (No space left on device)\n"


@pytest.mark.parametrize(
    "redirect, said", [("> /dev/full", FULL), ("| head -c 9", "Ä\n"), (">&-", "Ä\n"), ("2>&-", "")]
)
def test_a_program_outlives_its_output(tmp_path, redirect, said):
    """stdout is a full disk, a pipe that is not read to the end, or closed; or stderr is closed."""
    command = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" "$2" {redirect}', sys.executable, TALKATIVE]
    done = subprocess.run([*command, tmp_path / "result"], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr.decode()) == (0, said) and (tmp_path / "result").exists()


@pytest.mark.parametrize("encoding, said", [("utf-8:strict", "Ä\n"), ("ascii:strict", "?\n")])
def test_names_that_the_output_cannot_show_have_question_marks(tmp_path, encoding, said):
    program, env = [sys.executable, "-c", TALKATIVE, tmp_path / "result"], os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True)
    assert (done.returncode, done.stderr.decode()) == (0, said) and done.stdout.startswith(b"caf?caf?")


def error_of(capsys, work) -> str:
    with pytest.raises(SystemExit) as end:
        cli.run("program", work)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return line


def test_a_path_that_cannot_be_opened_is_named_in_one_line(capsys, tmp_path):
    said = error_of(capsys, (tmp_path / "no" / "file").read_text)
    assert said == f"program: error: cannot open {tmp_path}/no/file (No such file or directory): " + (
        "correct the path, or its permissions"
    )


def test_an_error_that_names_no_path_is_not_taken_for_bad_input():
    def work():
        raise FileNotFoundError("no such thing")

    with pytest.raises(FileNotFoundError, match="no such thing"):
        cli.run("program", work)


def test_a_newline_in_a_name_leaves_the_message_whole(capsys):
    def work():
        raise cli.UsageError("no such folder: a\nb; expected one")

    assert error_of(capsys, work) == r"program: error: no such folder: a\nb; expected one"


def test_an_empty_argument_is_refused(refuse):
    for flags in (["--out", ""], ["--subset="]):
        assert "an argument is empty: is a variable of the command not set?" in refuse("--data", "x", *flags)
    assert "no such folder: x=" in refuse("--data=x=")


def test_results_go_through_links_and_to_devices(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_json(tmp_path / "link", [1])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "[\n 1\n]\n"
    reading, writing = os.pipe()
    write_json(f"/dev/fd/{writing}", [1])
    assert os.read(reading, 99) == b"[\n 1\n]\n"
    with open(tmp_path / "log", "w+") as log:  # as with --json /dev/stdout > log
        print("printed before", file=log, flush=True)
        write_json(f"/dev/fd/{log.fileno()}", [1])
    assert (tmp_path / "log").read_text() == "printed before\n[\n 1\n]\n"


def test_the_demo_refuses_flags_that_its_measurements_do_not_follow(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "out"), "--arch=resnet18", "--lr", "1"])
    assert "demo.py fixes --arch: run train.py for other settings" in error_of(capsys, demo.demo)
    assert not (tmp_path / "out").exists()
