"""bench/ablations.py: what it runs and resumes, what it takes for finished, and the figures of its document."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, picture
from PIL import Image

import train
from evals.truth import list_pairs
from runtime.cli import UsageError
from runtime.images import list_images

sys.path.insert(0, str(ROOT / "bench"))
import ablations
import ablations_doc as doc
import ablations_rows as rows
from ablations_rows import Run

PLOTS = {"plot": doc.plot, "plot_rates": doc.plot_rates}


@pytest.fixture(scope="module")
def data(tmp_path_factory, pairs):
    """Three classes of 9 training and 3 test images; 12 photographs with masks."""
    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 9), ("val", 3)):
        for c in "abc":
            (root / split / c).mkdir(parents=True)
            for i in range(count):
                picture(ord(c) * 100 + i + 50 * (split == "val"), (40, 32)).save(root / split / c / f"{split}{i}.png")
    photos = tmp_path_factory.mktemp("photos")
    (photos / "images").symlink_to(pairs / "images")
    (photos / "segmentations").symlink_to(pairs / "masks")
    return root, photos


@pytest.fixture
def small(monkeypatch, tmp_path, data):
    """The smallest programme: one row beside R2O and BYOL. Returns main(*flags), and the folder of the results."""
    base = "--arch tiny --size 32 --batch-size 8 --kmeans-group 4 --k-start 6 --k-end 2 --hidden 16 --dim 8"
    evaluations = {"k-NN": "-k 3 --size 32", "foreground": "--size 32", "overlap": "--size 32 -k 6 4"}
    evaluations["fine-tuning"] = "--classes 2 --crop 32 --epochs 1 --batch-size 2 --lr 0.03 --seeds 0"
    chosen = {name: rows.ROWS[name] for name in ("untrained", "r2o", "byol", "grid")}
    settings = {"BASE": f"{base} --segments 20", "ROWS": chosen, "EVALUATIONS": evaluations, "MAIN": ["r2o", "byol"]}
    settings |= {"SHORT": 1, "LONG": 2, "SEEDS": {1: (0, 1), 2: (0,)}, "RATES": (1, 2), "SWEEP": 1, "HELD": 3}
    settings |= {"SWEPT": {"r2o": ("r2o", 0), "byol": ("byol", 0)}}
    settings |= {
        "LONGER": ("r2o", "byol"),
        "TABLES": {
            "Table 4": {"grid": "77.6", "r2o": "85.5"},
            "All": {"untrained": "", "byol": ""},
            "Empty": {"x": ""},
        },
    }
    for name, value in settings.items():
        monkeypatch.setattr(rows, name, value)
    for name in PLOTS:
        monkeypatch.setattr(doc, name, lambda *_: None)
    flags = ["--data", data[0], "--photos", data[1], "--out", tmp_path / "out", "--results", tmp_path / "results"]
    flags += ["--doc", tmp_path / "doc.md", "--jobs", 1]
    ablations.stop.clear()
    return lambda *more: ablations.main([*map(str, flags), *map(str, more)]), tmp_path / "results"


@pytest.fixture
def programs(monkeypatch):
    """Stands in for the programs: each writes figures at once. Returns a list of the commands, and a set of runs that
    fail."""
    called, fail = [], set()

    def call(program, folder, device, poll=lambda: None):
        called.append((folder.name.rsplit("-", 1)[0], " ".join(map(str, program))))
        if called[-1][0] in fail:
            raise UsageError(f"{folder.name} ended with status 1")
        value = len(called)
        if program[0] == "train.py":
            (folder / "log.jsonl").write_text(json.dumps({"epoch": 1, "images/s": 100}) + "\n")
        if "--json" in program:
            overlaps = [
                {"masks": m, "K": None, "assign": None, "average best overlap": 0.25} for m in ("SLIC prior", "grid")
            ]
            for assign in ("pixel", "region"):
                overlaps += [{"masks": "x", "K": k, "assign": assign, "average best overlap": 0.5} for k in (6, 4)]
            result = {"k": {"3": {"top-1": value}}, "foreground IoU": 0.5, "rows": overlaps}
            program[-1].write_text(json.dumps(result))
        if "evals.segment" in program:
            out = program[program.index("--out") + 1]
            out.mkdir()
            (out / "results.json").write_text(json.dumps({"runs": {"0.03": [{"mIoU": 60.5}]}}))

    monkeypatch.setattr(ablations, "call", call)
    return called, fail


def trained(called) -> list[str]:
    return [name for name, command in called if command.startswith("train.py")]


SWEEP = ["sweep-r2o-1-0", "sweep-byol-1-0", "sweep-r2o-2-0", "sweep-byol-2-0"]
SHORT = ["r2o-1-0", "byol-1-0", "r2o-1-1", "byol-1-1"]


def test_the_most_informative_rows_run_first_and_a_rerun_runs_only_missing_ones(small, programs, capsys):
    main, results = small
    called, fail = programs
    fail.add("byol-1-1")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "1 of 10 runs failed; byol-1-1" in capsys.readouterr().err.splitlines()[-1]
    assert trained(called) == [*SWEEP, *SHORT, "r2o-2-0", "byol-2-0", "grid-1-0", "grid-1-1"]
    assert not list(results.glob("byol-1-1-*.json"))
    called.clear(), fail.clear()
    main()
    assert {name for name, _ in called} == {"byol-1-1"} and len(list(results.glob("byol-1-1-*.json"))) == 1
    called.clear()
    main()
    assert called == []


def test_the_sweep_sees_neither_test_images_nor_photographs(small, programs, data, tmp_path):
    small[0]()
    commands = [command for name, command in programs[0] if name.startswith("sweep")]
    assert len(commands) == 8  # training and k-NN
    assert not any(str(folder) in command for command in commands for folder in data)
    held = {part: list_images(tmp_path / "out/held-out-3" / part) for part in ("train", "val")}
    names = {part: {images[i] for i in range(len(images))} for part, images in held.items()}
    assert len(names["train"]) == 18 and len(names["val"]) == 9 and not names["train"] & names["val"]


def test_fine_tuning_never_evaluates_on_a_photograph_it_trains_on(small, programs, data, tmp_path, monkeypatch):
    """12 photographs of 80 x 64: every third is evaluated; each is shrunk and keeps its label, 0 and 1."""
    monkeypatch.setattr(rows, "SIDE", 40)
    small[0]()
    (folder,) = (tmp_path / "out").glob("photos-*")
    tuned = [command for _, command in programs[0] if "evals.segment" in command]
    assert tuned and all(f"--data {folder} " in command for command in tuned)
    of = {"images": [], "labels": []}
    for i, (photo, mask) in enumerate(list_pairs(data[1] / "images", data[1] / "segmentations")):
        for kind, source, factor in (("images", photo, 1), ("labels", mask, 255)):
            path = folder / kind / ("val" if i in (2, 5, 8, 11) else "train") / f"{i:05}.png"
            saved, whole = (np.array(Image.open(x).convert("RGB")).astype(float) for x in (path, source))
            assert saved.shape == (32, 40, 3)
            assert np.abs(saved * factor - whole.reshape(32, 2, 40, 2, 3).mean((1, 3))).mean() < 25
            of[kind].append(saved)
    assert len(of["images"]) == 12 == len({x.tobytes() for x in of["images"]}) == len([*folder.glob("images/*/*")])
    assert all({*label.flat} == {0, 1} for label in of["labels"])


def test_results_of_other_settings_are_not_reused(small, programs, monkeypatch):
    main, results = small
    main()
    run = rows.sweep_runs()[0]
    about = json.loads((results / "data.json").read_text())
    assert list(rows.finished([run], results, about)) == [run]
    assert not rows.finished([run._replace(seed=1)], results, about)
    assert not rows.finished([run], results, about | {"images": "others"})
    monkeypatch.setattr(rows, "EVALUATIONS", rows.EVALUATIONS | {"k-NN": "-k 5"})
    assert not rows.finished([run], results, about)
    programs[0].clear()
    main()
    assert len(trained(programs[0])) == 12  # all of it again


def test_results_of_other_images_are_refused(small, programs, tmp_path, capsys):
    main, results = small
    main()
    about = json.loads((results / "data.json").read_text())
    (results / "data.json").write_text(json.dumps(about | {"test images": "others"}))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "other data or another device" in capsys.readouterr().err.splitlines()[-1]


def test_the_sweep_chooses_the_best_rate_the_first_of_equals():
    """The best on held-out images, the first of equals."""
    accuracy = {("r2o", 1, 0): 7, ("r2o", 2, 0): 7, ("r2o", 0.5, 16): 9, ("byol", 2, 0): 8, ("detcon", 8, 0): 2}
    swept = {run: {"figures": {"k-NN": accuracy.get((run.row, run.lr, run.lr_k), 1)}} for run in rows.sweep_runs()}
    assert rows.choose(swept) == {"r2o": (1, 0), "r2o x K": (0.5, 16), "byol": (2, 0), "contrastive": (8, 0)}
    by_row = {run.row: (run.lr, run.lr_k) for run in rows.programme(rows.choose(swept))}
    assert by_row["fixed-6"] == (1, 0) and by_row["byol"] == (2, 0) and by_row["odin"] == (8, 0)
    assert by_row["k-rate"] == (0.5, 16) and by_row["byol-lr-2"] == (2, 0)
    left = rows.choose({run: x for run, x in swept.items() if run != Run("detcon", rows.SWEEP, 0, 1, 0, sweep=True)})
    assert left.keys() == {"r2o", "r2o x K", "byol"}  # DetCon's sweep is not finished
    contrastive = {"detcon", "r2o-detcon", "ntxent", "odin"}
    assert {run.row for run in rows.programme(left)} == rows.ROWS.keys() - contrastive


def test_train_accepts_the_flags_of_every_run():
    runs = rows.programme({kind: (1, 0) for kind in rows.SWEPT})
    settings = {run: train.parse_args([*run.settings({})["train.py"].split(), "--data", "x"]) for run in runs[3:]}
    assert len(settings) == 81 and {args.size for args in settings.values()} == {64}
    k = {run.row: (args.k_start, args.k_end, args.schedule) for run, args in settings.items()}
    assert k["r2o"] == (32, 6, "cosine") and k["rising"] == (6, 32, "cosine") and k["fixed-40"][::2] == (40, "constant")
    shown = {row for table in rows.TABLES.values() for row in table}
    assert shown == set(rows.ROWS) and {*rows.MAIN, *rows.LONGER} <= shown


def made_up(row: str, k_nn: dict[int, float], epochs=10) -> dict[Run, dict]:
    return {Run(row, epochs, seed, 1, 0): {"figures": dict.fromkeys(rows.MEASURES, x)} for seed, x in k_nn.items()}


def test_means_spreads_and_paired_differences_by_hand():
    """Of 1, 2, 6 the mean is 3, the variance (4 + 1 + 9) / 2. Differences are of the same seed and epochs."""
    assert (
        doc.summary([1, 2, 6], 2) == "3.00 ± 2.65" and doc.summary([-1], 1, "+") == "-1.0" and doc.summary([], 1) == ""
    )
    done = made_up("r2o", {0: 10, 1: 20, 2: 30}) | made_up("byol", {2: 33, 0: 11}) | made_up("r2o", {0: 99}, epochs=30)
    assert doc.differences("byol", 10, "k-NN", done) == [1, 3]
    assert doc.differences("byol", 30, "k-NN", done) == []
    lines = doc.table("T", 10, {"byol": "65.1", "r2o": "71.6"}, done)
    assert lines[4].startswith("| BYOL | 65.1 | 1 | **2 of 3** | 22.00 ± 15.56 | 22.00 ± 15.56 | 22.000 ± 15.556 |")
    assert lines[5].startswith("| R2O, K = 32 → 6 | 71.6 | 1 | 3 | 20.00 ± 10.00 |")
    assert lines[6].startswith("| BYOL − R2O |  |  | **2 of 3** | +2.00 ± 1.41 | +2.00 ± 1.41 | +2.000 ± 1.414 |")
    once = doc.table("T", 10, {"k-rate": ""}, done | made_up("k-rate", {0: 12}))
    assert once[4].startswith("| R2O, learning rate x K / 16 | 1 | 1 | 12.00 |")
    assert once[5].startswith("| R2O, learning rate x K / 16 − R2O |  | 1 | +2.00 |")


def test_the_document_has_every_row_and_keeps_the_text_around_its_tables(
    small, programs, tmp_path, monkeypatch, capsys
):
    main, _ = small
    file = tmp_path / "doc.md"
    file.write_text(f"Before.\n\n{doc.BEGIN}\nold\n{doc.END}\n\nAfter.\n")
    programs[1].add("grid-1-1")
    with pytest.raises(SystemExit):
        main()
    for name, function in PLOTS.items():
        monkeypatch.setattr(doc, name, function)
    main("--report")
    text = file.read_text()
    assert text.startswith("Before.\n") and text.endswith("\n\nAfter.\n") and "old" not in text
    assert "## All, 1 epochs" in text and "## Empty" not in text
    assert (
        "| grid prior, K = 32 → 6 | 77.6 | 2 | **1 of 2** |" in text
        and "| untrained, batch norm calibrated |  | 2 |" in text
    )
    assert "Best overlap of the priors themselves: SLIC 0.250, grid 0.250." in text and "9 of 10 runs" in text
    for name in ("doc-1.png", "doc-2.png", "doc-rates.png"):
        assert f"({name})" in text and (tmp_path / name).stat().st_size < 100_000
    file.write_text("No marks.\n")
    with pytest.raises(SystemExit) as end:
        main("--report")
    assert end.value.code == 2 and "lacks the lines" in capsys.readouterr().err.splitlines()[-1]


def test_a_second_process_cannot_use_the_same_out_folder_meanwhile(small, tmp_path, monkeypatch):
    program, said = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)", []

    def execute(*_):
        other = [sys.executable, "-c", program, tmp_path / "out/.lock"]
        said.append(subprocess.run(other, capture_output=True, text=True).stderr)

    monkeypatch.setattr(ablations, "execute", execute)
    small[0]()
    assert len(said) == 2 and all("BlockingIOError" in x for x in said)  # in the sweep, in the ablations


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "x"], "expected --data and --photos"),
        (["--report", "--results", "missing"], "no results in"),
        (["--data", "missing", "--photos", "missing"], "no such folder"),
        (["--jobs", "0", "--report"], "--jobs must be at least 1"),
    ],
)
def test_bad_arguments_end_in_one_line_and_status_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ablations.main(flags)
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_one_row_trains_and_is_evaluated_end_to_end(small, monkeypatch):
    """One row and one seed, trained and evaluated by the programs; figures have all measures."""
    monkeypatch.setattr(rows, "SWEPT", {})  # nothing to sweep
    monkeypatch.setattr(rows, "programme", lambda rates: [Run("r2o", 1, 0, 1, 0)])
    main, results = small
    main("--jobs", 2)
    (file,) = results.glob("r2o-1-0-*.json")
    run = json.loads(file.read_text())
    assert run["figures"].keys() >= {*rows.MEASURES, "SLIC prior", "grid"} and run["last epoch"]["epoch"] == 1
    assert run["versions"].keys() > {"torch", "r2o"} and "1 thread" in run["hardware"]
    assert len(list(results.glob("*.json"))) == 2  # with data.json
