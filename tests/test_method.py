"""docs/method.md and docs/method.ipynb: made from docs/method.py, whose pictures, quotations and numbers hold."""

import itertools
import os
import re
import subprocess
import sys
from textwrap import indent

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

jupytext = pytest.importorskip("jupytext")
SOURCE = ROOT / "docs/method.py"
CELLS = jupytext.read(SOURCE).cells
TEXT = [cell.source for cell in CELLS if cell.cell_type == "markdown"]
NAMES = re.findall(r'show\("(\w+)"', "\n".join(cell.source for cell in CELLS if cell.cell_type == "code"))


@pytest.mark.slow
def test_every_picture_can_be_reproduced(tmp_path):
    """By the Makefile's command, but from a training of seconds: pictures of it have the size of before, and colors."""
    command = re.search(r"\$\(PY\) -m (jupyter nbconvert .*)", (ROOT / "Makefile").read_text())[1]
    settings = {"cwd": ROOT, "env": os.environ | {"TOUR_SMALL": "1"}, "check": True}
    subprocess.run([sys.executable, "-m", *command.split(), "--output-dir", tmp_path], **settings)
    for name in NAMES:
        now, then = (Image.open(folder / f"method/{name}.png").convert("RGB") for folder in (tmp_path, ROOT / "docs"))
        assert now.size == then.size, name
        if name in ("loss", "film", "collapse", "failures"):
            assert (np.ptp(np.asarray(now), axis=2) > 60).mean() > 0.004, name  # axes alone have no color
        else:
            assert np.abs(np.asarray(now).astype(int) - np.asarray(then)).mean() < 5, name


def test_the_pictures_match_the_folder_and_stay_under_3_mb():
    files = list((ROOT / "docs/method").iterdir())
    assert {f.name for f in files} == {f"{name}.png" for name in NAMES} and 10 <= len(NAMES) <= 14
    assert sum(f.stat().st_size for f in files) < 3e6


def test_the_notebook_and_the_page_match_the_source():
    notebook = jupytext.read(ROOT / "docs/method.ipynb")
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in CELLS]
    page, at = (ROOT / "docs/method.md").read_text(), 0
    for text in TEXT:
        at = page.index(text, at)  # in this order
    assert "Traceback" not in page and all(f"![{name}](method/{name}.png)" in page for name in NAMES)


def test_quoted_code_is_in_the_source():
    """Line after line, though less indented."""
    program = "\n".join((ROOT / name).read_text() for name in ("r2o.py", "r2o_ops.py", "train.py"))
    quoted = [block for text in TEXT for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(quoted) > 8
    for block in quoted:
        assert any(indent(block, " " * n) in program for n in (4, 8)), block


def test_links_to_functions_point_to_their_definitions():
    links = re.findall(r"\[([\w.]+)\]\(\.\./(r2o\w*\.py)#L(\d+)\)", "\n".join(TEXT))
    assert len(links) > 8
    for name, file, line in links:
        found = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name.split('.')[-1]}\b", found), f"{name} is not at {file}:{line}: {found}"


def test_every_number_that_a_cell_checks_is_in_the_text_after_it():
    found = 0
    for cell, after in itertools.pairwise(CELLS):
        for number in re.findall(r"^about\w*\(.*, (\d[\d.]*)(?:, within=0)?\)$", cell.source, re.MULTILINE):
            found += 1
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", after.source), (number, after.source)
    assert found > 15
