"""Files: lists of images, the cache of region maps, checkpoints."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture

import r2o
from runtime import regions as cache
from runtime.cli import UsageError
from runtime.images import ImageList, list_images, read_image
from runtime.loader import ImageRegions
from runtime.regions import region_maps


def relist(images, change):
    """The list of other files: change([(name, size)])."""
    return ImageList(images.root, change([(n, os.path.getsize(images.root / os.fsdecode(n))) for n in images]))


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_images_are_found_flat_nested_or_in_train(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("z.JPEG", "a/b/x.png", "ä.jpg", "notes.txt"):
        (tmp_path / name).touch()
    images = list_images(tmp_path)
    assert images.root == tmp_path and [n.decode() for n in images] == ["z.JPEG", "ä.jpg", "a/b/x.png"]
    (tmp_path / "train").mkdir()
    (tmp_path / "train/only.webp").touch()
    images = list_images(tmp_path)
    assert images.root == tmp_path / "train" and list(images) == [b"only.webp"]


@pytest.fixture
def classes(tmp_path):
    for name in ("n1/n1_0.jpg", "n1/n1_1.jpg", "n2/n2_0.jpg", "deep/n3/n3_0.jpg", "deep/n3/n3_1.jpg"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "lines, names",
    [
        ("n2\nn3\n", ["deep/n3/n3_0.jpg", "deep/n3/n3_1.jpg", "n2/n2_0.jpg"]),  # ImageNet-100: class folders
        ("\ufeffn1/\r\n\r\n", ["n1/n1_0.jpg", "n1/n1_1.jpg"]),
        ("n1_1.jpg\nn3_0.jpg", ["deep/n3/n3_0.jpg", "n1/n1_1.jpg"]),  # ImageNet's one per cent: file names
        ("n1/n1_0.jpg\ndeep/n3/n3_1.jpg\nn2", ["deep/n3/n3_1.jpg", "n1/n1_0.jpg", "n2/n2_0.jpg"]),
    ],
)
def test_a_subset_may_list_class_folders_or_files(classes, lines, names):
    (classes / "subset.txt").write_text(lines)
    images = list_images(classes / "data", classes / "subset.txt")
    assert [name.decode() for name in images] == names


@pytest.mark.parametrize(
    "lines, said",
    [
        ("n1\nn9\nn8/x.jpg\n", r"2 of the 3 lines of .* match nothing in .*, the first: n8/x.jpg"),
        ("\n", "is empty"),
        (None, "cannot read --subset .*No such file"),
    ],
)
def test_a_subset_that_does_not_fit_the_data_is_refused(classes, lines, said):
    if lines:
        (classes / "subset.txt").write_text(lines)
    with pytest.raises(UsageError, match=said):
        list_images(classes / "data", classes / "subset.txt")


def test_a_list_s_fingerprint_depends_on_names_and_sizes(tmp_path):
    def listed(*entries):
        return ImageList(tmp_path, entries)

    one, longer, renamed = listed((b"a", 1), (b"bc", 2)), listed((b"a", 1), (b"bc", 3)), listed((b"ab", 1), (b"c", 2))
    assert len(one) == 2 and [*one] == [b"a", b"bc"] and one.path(1) == str(tmp_path / "bc")
    assert one.names_hash == longer.names_hash != renamed.names_hash
    assert len({one.fingerprint, longer.fingerprint, renamed.fingerprint}) == 3
    for i in (2, -1):
        with pytest.raises(IndexError):
            one[i]


class Reader(torch.utils.data.Dataset):
    """Reads a list of names over and over; says how much memory the worker has of its own."""

    def __init__(self, names):
        self.names = names

    def __getitem__(self, _):
        def own():
            return int(re.search(r"Private_Dirty:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) / 1024

        before = own()
        assert sum(len(self.names[i]) for i in range(len(self.names))) > 0
        return own() - before


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux' /proc")
def test_forked_workers_share_the_list_s_memory(tmp_path):
    """Fork shares it, and no reference count in it is ever written: a list of str would be copied, 20 MB of it."""
    count = 300_000
    names = ImageList(tmp_path, ((b"n%08d/n%08d_%d.JPEG" % (i // 1300, i // 1300, i), 1) for i in range(count)))
    assert len(names._text) + names._ends.nbytes < 45 * count
    loader = torch.utils.data.DataLoader(Reader(names), sampler=range(3), batch_size=None, num_workers=1)
    assert max(loader) < 4
    plain = torch.utils.data.DataLoader(
        Reader([n.decode() for n in names]), sampler=[0], batch_size=None, num_workers=1
    )
    assert max(plain) > 10  # what the test would see


# ---- region maps -----------------------------------------------------------------------------------------------------


def folder_of(tmp_path, good, damage):
    for i in range(good):
        picture(i, (20, 20)).save(tmp_path / f"{i:03}.jpg", quality=95)
    for name, f in damage.items():
        (tmp_path / name).write_bytes(f((tmp_path / "000.jpg").read_bytes()))
    return list_images(tmp_path)


DAMAGE = {"truncated.jpg": lambda b: b[: len(b) // 2], "text.jpg": lambda b: b"hello", "empty.png": lambda b: b""}


@pytest.mark.parametrize("name", DAMAGE)
def test_one_unreadable_image_in_a_hundred_is_left_out_and_counted(tmp_path, name, capsys):
    images = folder_of(tmp_path, 110, {name: DAMAGE[name]})
    maps, header = region_maps(images, tmp_path / "regions.npy", prior="grid", size=14)
    assert len(header["unreadable"]) == 1 and name in header["unreadable"][0][1]
    assert name in capsys.readouterr().out
    data = ImageRegions(images, maps, header, size=32)
    assert len(data) == 110
    for i in range(110):
        assert data[0, i]["image"].shape == (32, 32, 3)


def test_more_unreadable_images_stop_the_run(tmp_path):
    images = folder_of(tmp_path, 100, DAMAGE)
    with pytest.raises(UsageError, match=r"more than 1 % of the images in .* are unreadable"):
        region_maps(images, tmp_path / "regions.npy", prior="grid", size=14)
    assert not (tmp_path / "regions.npy").exists()


def test_region_maps_are_computed_once_and_identified_by_their_header(photos, tmp_path, monkeypatch):
    images = list_images(photos)
    path = tmp_path / "regions.npy"
    maps, header = region_maps(images, path, size=16, num_segments=20, workers=2)
    assert maps.shape == (24, 16, 16) and maps.dtype == np.uint8 and isinstance(maps, np.memmap)
    assert header["num_regions"] == maps.max() + 1 and header["unreadable"] == []
    for i in (0, 23):
        image = read_image(images.path(i))
        assert np.array_equal(maps[i], r2o.slic_regions(image, 20, 16))
    monkeypatch.setattr(r2o, "slic_regions", lambda *a: pytest.fail("computed twice"))
    again, header_again = region_maps(images, path, size=16, num_segments=20)
    assert np.array_equal(maps, again) and header == header_again


@pytest.mark.parametrize(
    "change, key",
    [
        (lambda kw: kw | {"num_segments": 21}, "num_segments"),
        (lambda kw: kw | {"prior": "grid"}, "prior"),
        (lambda kw: kw | {"size": 32}, "size"),
        (lambda kw: kw | {"images": relist(kw["images"], lambda files: files[:-1])}, "images"),
        (lambda kw: kw | {"images": relist(kw["images"], lambda files: files[1:] + files[:1])}, "fingerprint"),
        (lambda kw: kw | {"images": relist(kw["images"], lambda files: [(n, s + 1) for n, s in files])}, "fingerprint"),
    ],
)
def test_region_maps_of_other_data_or_settings_are_refused(photos, tmp_path, change, key):
    images = list_images(photos)
    kw = {"images": images, "path": tmp_path / "regions.npy", "size": 16, "num_segments": 20}
    region_maps(**kw)
    with pytest.raises(UsageError, match=f"belong to other data or settings \\({key}.*delete"):
        region_maps(**change(kw))


def test_region_maps_of_another_scikit_image_are_refused(photos, tmp_path):
    images = list_images(photos)
    region_maps(images, tmp_path / "regions.npy", prior="grid", size=14)
    header = json.loads((tmp_path / "regions.json").read_text())
    (tmp_path / "regions.json").write_text(json.dumps(header | {"scikit-image": "0.18.3"}))
    with pytest.raises(UsageError, match=r"scikit-image 0\.18\.3, now"):
        region_maps(images, tmp_path / "regions.npy", prior="grid", size=14)


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p])
def test_a_folder_without_images_is_refused(tmp_path, make):
    with pytest.raises(UsageError, match=r"no such folder|no images in"):
        list_images(make(tmp_path))


SLOW = """
import os, sys, time, r2o
from runtime import regions as cache
from runtime.images import list_images
from runtime.regions import region_maps
slic = r2o.slic_regions
def slow(*args):
    with open(sys.argv[2] + ".calls", "a") as f:
        f.write("x")
    time.sleep(0.1)
    return slic(*args)
r2o.slic_regions, cache.SAVE_SECONDS = slow, 0
maps, header = region_maps(list_images(sys.argv[1]), sys.argv[2], size=16, num_segments=20)
print(len(maps), header["num_regions"])
"""


@pytest.mark.slow
def test_one_process_computes_the_maps_and_another_takes_over_if_it_dies(photos, tmp_path):
    """The others wait; nothing is computed twice but the map that was being made."""
    path = tmp_path / "regions.npy"
    env = {**os.environ, "PYTHONPATH": str(Path(r2o.__file__).parent)}
    argv = [sys.executable, "-c", SLOW, str(photos), str(path)]
    processes = [
        subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "123"
    ]
    calls = tmp_path / "regions.npy.calls"
    deadline = time.monotonic() + 60
    while not (path.with_suffix(".progress").exists() and calls.stat().st_size >= 10):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert calls.stat().st_size < 20
    writers = [p for p in processes if holds(p.pid, path)]
    assert len(writers) == 1
    writers[0].send_signal(signal.SIGKILL)
    printed = [p.communicate(timeout=60) for p in processes]
    assert sorted(p.returncode for p in processes) == [-signal.SIGKILL, 0, 0], printed
    assert 24 <= calls.stat().st_size <= 24 + 2
    assert not [x for x in tmp_path.iterdir() if x.suffix in (".partial", ".progress", ".lock", ".tmp")]
    maps, header = region_maps(list_images(photos), path, size=16, num_segments=20)
    whole, header_of_whole = region_maps(list_images(photos), tmp_path / "b.npy", size=16, num_segments=20)
    assert np.array_equal(maps, whole) and header == header_of_whole


def holds(pid: int, path: Path) -> bool:
    links = Path(f"/proc/{pid}/fd").iterdir()
    return any(os.readlink(link) == str(path.with_suffix(".partial")) for link in links)


def test_maps_killed_between_header_and_rename_are_not_computed_again(photos, tmp_path, monkeypatch):
    images, path = list_images(photos), tmp_path / "regions.npy"
    maps, header = region_maps(images, path, size=16, num_segments=20)
    made_from = {k: v for k, v in header.items() if k not in ("num_regions", "unreadable")}
    state = {"done": 24, "num_regions": header["num_regions"], "unreadable": [], "made_from": made_from}
    path.with_suffix(".progress").write_text(json.dumps(state))
    maps = np.array(maps)
    path.rename(path.with_suffix(".partial"))
    monkeypatch.setattr(r2o, "slic_regions", lambda *a: pytest.fail("computed twice"))
    again, header_again = region_maps(images, path, size=16, num_segments=20)
    assert np.array_equal(maps, again) and header == header_again


def test_progress_on_other_data_is_not_resumed(photos, tmp_path):
    images, path = list_images(photos), tmp_path / "regions.npy"
    want, header = region_maps(images, path, size=16, num_segments=20)
    want = np.array(want)
    made_from = {k: v for k, v in header.items() if k not in ("num_regions", "unreadable")} | {"num_segments": 30}
    path.rename(path.with_suffix(".partial"))
    state = {"done": 24, "num_regions": 5, "unreadable": [], "made_from": made_from}
    path.with_suffix(".progress").write_text(json.dumps(state))
    path.with_suffix(".json").unlink()
    maps, header_again = region_maps(images, path, size=16, num_segments=20)
    assert np.array_equal(maps, want) and header == header_again


def test_maps_larger_than_the_free_disk_space_are_refused_at_once(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 6000}))
    with pytest.raises(UsageError, match=r"the region maps need 6.1e-06 GB, .* has 6e-06 GB left"):
        region_maps(list_images(photos), tmp_path / "regions.npy", size=16, num_segments=20)


def test_a_full_disk_loses_no_finished_maps(photos, tmp_path, monkeypatch):
    images, path = list_images(photos), tmp_path / "regions.npy"
    monkeypatch.setattr(cache, "SAVE_SECONDS", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 10 * 256, hard))
    try:
        with pytest.raises(UsageError, match=r"cannot write .*partial \(File too large\): make room"):
            region_maps(images, path, size=16, num_segments=20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    calls = []
    monkeypatch.setattr(r2o, "slic_regions", lambda *a, slic=r2o.slic_regions: calls.append(1) or slic(*a))
    region_maps(images, path, size=16, num_segments=20)
    assert len(calls) == 24 - 10


def test_a_sample_whose_image_is_missing_is_replaced_by_the_next(tmp_path, capsys):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    images = list_images(tmp_path)
    maps, header = region_maps(images, tmp_path / "regions.npy", size=14)
    data = ImageRegions(images, maps, header, size=32)
    (tmp_path / "3.png").unlink()
    sample = data[0, 3]
    assert sample["unreadable"] and not data[0, 0]["unreadable"]
    for name in ("image", "regions"):
        assert torch.equal(sample[name], data[0, 0][name])  # the next of the last is the first
    assert not torch.equal(sample["views"], data[0, 0]["views"])  # seen differently
    assert "3.png" in capsys.readouterr().err
    for i in range(3):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(UsageError, match="can no longer be read: is the disk still there"):
        data[0, 2]


def test_partial_maps_of_other_settings_are_not_resumed(photos, tmp_path, monkeypatch):
    """Progress of 20 segments, then a start with 5 that is killed before it saves any, then 20 again."""
    images, path, slic = list_images(photos), tmp_path / "regions.npy", r2o.slic_regions
    want = np.array(region_maps(images, tmp_path / "whole.npy", size=16, num_segments=20)[0])

    def interrupted(after):
        calls = []

        def stops(*args):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return slic(*args)

        return stops

    for segments, after, seconds in ((20, 10, 0), (5, 6, 99)):
        monkeypatch.setattr(r2o, "slic_regions", interrupted(after))
        monkeypatch.setattr(cache, "SAVE_SECONDS", seconds)
        with pytest.raises(KeyboardInterrupt):
            region_maps(images, path, size=16, num_segments=segments)
    monkeypatch.setattr(r2o, "slic_regions", slic)
    assert np.array_equal(region_maps(images, path, size=16, num_segments=20)[0], want)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda p: p.with_suffix(".json").write_text("[]"), "are damaged: delete"),
        (lambda p: np.save(p, np.zeros((23, 16, 16), np.uint8)), "are damaged: delete"),
        (lambda p: p.write_bytes(b""), "cannot read the region maps"),
        (lambda p: p.with_suffix(".json").unlink(), r"cannot read the region maps .*No such file.*: delete"),
        (
            lambda p: (p.unlink(), p.with_suffix(".json").unlink(), p.with_suffix(".progress").touch()),
            "progress is damaged",
        ),
    ],
)
def test_damaged_maps_are_refused_in_one_line(photos, tmp_path, spoil, said):
    images, path = list_images(photos), tmp_path / "regions.npy"
    region_maps(images, path, size=16, num_segments=20)
    spoil(path)
    with pytest.raises(UsageError, match=said):
        region_maps(images, path, size=16, num_segments=20)


def test_a_folder_that_cannot_be_told_from_a_file_ends_the_scan(tmp_path, monkeypatch):
    """A link into a folder without permission; root has every permission."""
    entry = type("Entry", (), {"name": b"dog", "path": b"dog"})()
    entry.is_dir = (Path(__file__) / "x").stat
    monkeypatch.setattr(os, "scandir", lambda folder: contextlib.nullcontext([entry]))
    with pytest.raises(UsageError, match=r"cannot read dog \(Not a directory\)"):
        list_images(tmp_path)


def test_a_json_beside_the_maps_that_is_not_theirs_is_kept(photos, tmp_path):
    (tmp_path / "photos.json").write_text('{"mine": 1}')
    with pytest.raises(UsageError, match=r"photos.json is not of region maps and would be replaced"):
        region_maps(list_images(photos), tmp_path / "photos.npy", size=16, num_segments=20)
    assert (tmp_path / "photos.json").read_text() == '{"mine": 1}'


def test_non_files_are_no_images_and_undecodable_names_can_be_printed(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no image")
    for i in range(300):
        picture(0, (4, 4)).save(tmp_path / f"{i}.png")
    images = list_images(tmp_path)
    assert len(images) == 303
    _, header = region_maps(images, tmp_path / "regions.npy", prior="grid", size=14)
    assert len(header["unreadable"]) == 3 and "caf?.jpg" in capsys.readouterr().out
