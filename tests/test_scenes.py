"""bench/scenes.py: which rows it runs again, and its table."""

import json
import sys

import pytest
import torch
from conftest import ROOT

import train

sys.path.insert(0, str(ROOT / "bench"))
import scenes
from ablations_doc import END

from runtime.cli import UsageError


@pytest.fixture
def programme(monkeypatch, tmp_path):
    """demo.py is replaced by made-up figures: R2O's foreground IoU is 0.5, 0.6, 0.7, every other row's 0.1 less; all
    have 0.2 less at --lr 1."""
    called = []

    def measure(row, out):
        called.append(row)
        less = 0.1 * (not row.startswith(scenes.FULL)) + 0.2 * row.endswith(scenes.LOW)
        trained = [[x - less, 0.3, 0.2] for x in (0.5, 0.6, 0.7)]
        figures = {"SLIC prior": [[0.3, 0.2, 0.2]], "random encoder": [[0.4, 0.2, 0.1]] * 3, "trained encoder": trained}
        if row == "BYOL" and "fails" in called:
            raise UsageError("demo.py ended with status 1")
        about = {"demo.py": scenes.demo.RECIPE, "flags": scenes.ROWS[row], "K-means starts": scenes.demo.STARTS}
        return about | {"figures": figures}

    monkeypatch.setattr(scenes, "measure", measure)
    file, doc = tmp_path / "scenes.json", tmp_path / "doc.md"
    doc.write_text(f"Before.\n{scenes.BEGIN}\n{END}\nAfter.\n")
    monkeypatch.setattr(sys, "argv", ["scenes.py", *map(str, ("--results", file, "--doc", doc, "--jobs", 1))])
    return called, file, doc


def test_a_rerun_runs_rows_that_are_missing_or_were_measured_otherwise(programme):
    called, file, _ = programme
    scenes.main()
    assert called == [*scenes.ROWS]
    results = json.loads(file.read_text())
    results["BYOL"]["flags"], results["masks of SLIC"]["K-means starts"] = "--lr 9", 1
    results["fixed K = 6"]["demo.py"] = "--lr 3"
    del results["fixed K = 16"]
    file.write_text(json.dumps(results))
    called.clear()
    scenes.main()
    assert called == ["masks of SLIC", "fixed K = 16", "fixed K = 6", "BYOL"]


def test_a_row_that_fails_does_not_end_the_others(programme):
    called, file, _ = programme
    called.append("fails")
    with pytest.raises(UsageError):
        scenes.main()
    assert [*json.loads(file.read_text())] == [row for row in scenes.ROWS if row != "BYOL"]


def test_the_table_has_paired_differences_to_r2o(programme):
    _, _, doc = programme
    scenes.main()
    text = doc.read_text()
    assert text.startswith("Before.\n") and text.endswith("\nAfter.\n")
    full, slic = (next(x for x in text.splitlines() if x.startswith(f"| {row} |")) for row in (scenes.FULL, "BYOL"))
    assert full == f"| {scenes.FULL} |  | 0.600 ± 0.100 | 0.300 ± 0.000 | 0.200 ± 0.000 |  |"
    assert slic.endswith("| 0.500 ± 0.100 | 0.300 ± 0.000 | 0.200 ± 0.000 | -0.100 ± 0.000 |")
    low = next(x for x in text.splitlines() if x.startswith(f"| BYOL{scenes.LOW} |"))
    assert low.endswith("| 0.300 ± 0.100 | 0.300 ± 0.000 | 0.200 ± 0.000 | -0.100 ± 0.000 |")
    assert "| 0.400 ± 0.000 | 0.200 ± 0.000 | 0.100 ± 0.000 | -0.200 ± 0.100 |" in text  # untrained
    assert "| SLIC itself | | 0.300 | 0.200 | 0.200 | |" in text


@pytest.mark.parametrize("row", scenes.GIVEN)
def test_masks_that_are_not_made_from_images_replace_the_superpixels(row, tmp_path, monkeypatch):
    """True objects at every fourth pixel; cells of 2 x 2. When demo.py starts they are in the cache, which is taken for
    these scenes'."""
    found = []

    def call(program, folder, device):
        found.extend(scenes.demo.load_scenes(folder / "train-4"))
        (folder / "demo.json").write_text("{}")

    monkeypatch.setattr(scenes, "call", call)
    monkeypatch.setattr(scenes.demo, "SCENES", 4)
    scenes.measure(row, tmp_path)
    _, truth, regions = found
    cells = torch.arange(64).view(8, 8).repeat_interleave(2, 0).repeat_interleave(2, 1).expand(4, -1, -1)
    expected = {"masks of the true objects": truth[:, ::4, ::4], "masks of an 8 x 8 grid": cells}
    assert torch.equal(regions.long(), expected[row].long()) and regions.max() > 0


def test_train_accepts_the_flags_of_every_row():
    settings = {row: train.parse_args([*flags.split(), "--data", "x"]) for row, flags in scenes.ROWS.items()}
    assert settings["BYOL"].k_start == settings["BYOL"].k_end == 1
    assert settings["R2O, every image clustered by itself"].kmeans_group == 1


def test_a_demo_that_fails_names_its_log(monkeypatch, tmp_path):
    monkeypatch.setitem(scenes.ROWS, "bad", "--scenes 1")
    with pytest.raises(UsageError, match=r"bad ended with status 2, .*bad/log.txt says why"):
        scenes.measure("bad", tmp_path)
    assert "--scenes must be at least 64" in (tmp_path / "bad/log.txt").read_text()
