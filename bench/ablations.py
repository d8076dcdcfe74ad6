"""Does it work? Tables 4, 7 and 9 of the paper, at a scale that two cores can repeat.

    python bench/ablations.py --data tiny-imagenet-100 --photos CUB_200_2011   # all of docs/ablations.md but the scenes
    python bench/ablations.py --report      # only write the document again, from the results so far

Sweeps the learning rate, trains every row with every seed, as many at a time as there are cores and with one thread
each, evaluates it, and writes a JSON per run, the document and its plots. Rerun the same command to resume.
"""

import concurrent.futures
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).parent.parent))
import ablations_doc
import ablations_rows as rows
from ablations_rows import Run, finished

from evals.truth import list_pairs, read_ids, readable
from runtime import cli, distributed
from runtime.cli import UsageError, need
from runtime.images import list_images, read_image
from runtime.storage import lock_output, make_folder, save_atomically, write_json

ROOT = Path(__file__).parent.parent

stop = threading.Event()


def call(program: list, folder: Path, device: str, poll=lambda: None):
    """Run a program of the project with one thread; its output goes to folder/log.txt."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    with open(folder / "log.txt", "ab") as log:
        settings = {"cwd": ROOT, "env": env, "stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *map(str, program)], **settings)
        while process.poll() is None and not stop.wait(1):
            poll()
        if stop.is_set():
            process.terminate()  # train.py saves
        status = process.wait()
    need(status == 0, f"{folder.name} ended with status {status}, {folder}/log.txt says why")


def train_run(run: Run, folder: Path, data: Path, args, bar):
    """Train with train.py, which resumes by itself; advance the bar by its epochs."""
    flags, log, seen = run.settings({})["train.py"], folder / "log.jsonl", 0
    prior = "-".join(re.findall(r"--(?:prior|segments) (\S+)", flags)) or "slic"
    regions = args.out / "regions" / f"{'held-out-' * run.sweep}{prior}.npy"  # shared by runs

    def poll():
        nonlocal seen
        epochs = len(log.read_text().splitlines()) if log.exists() else 0
        bar.update(epochs - seen)
        seen = epochs

    where = ["--data", data, "--out", folder, "--regions", regions, "--workers", args.workers]
    call(["train.py", *flags.split(), *where], folder, args.device, poll)
    poll()


def evaluate_run(run: Run, folder: Path, data: Path, args) -> dict[str, float]:
    """MEASURES of the encoder; of a run of the sweep, which must not see photographs or test images, only k-NN."""
    encoder = ["--ckpt", folder / "r2o.pth"] if run.epochs else ["--ckpt", f"random:{run.seed}", "--arch", "tiny"]

    def result(kind: str, *program) -> dict:
        file = folder / f"{kind}.json"
        call([*program, *encoder, *rows.EVALUATIONS[kind].split(), "--json", file], folder, args.device)
        return json.loads(file.read_text())

    workers, photos = ["--workers", args.workers], ["--data", args.photos / "images", args.photos / "segmentations"]
    (accuracy,) = result("k-NN", "-m", "evals.knn", "--data", data, *workers)["k"].values()
    figures = {"k-NN": accuracy["top-1"]}
    if not run.sweep:
        figures["foreground"] = result("foreground", "eval_cub.py", *photos)["foreground IoU"]
        for row in result("overlap", "-m", "evals.abo", *photos, *workers)["rows"]:
            figures[f"{row['assign']} {row['K']}" if row["K"] else row["masks"]] = row["average best overlap"]
        out = folder / f"fine-tuning-{rows.digest(rows.EVALUATIONS)}"
        flags = [*rows.EVALUATIONS["fine-tuning"].split(), "--data", args.small, "--out", out, *workers]
        call(["-m", "evals.segment", *encoder, *flags], folder, args.device)
        ((tuned,),) = json.loads((out / "results.json").read_text())["runs"].values()
        figures["fine-tuned"] = tuned["mIoU"]
    return figures


def carry_out(run: Run, data: dict, args, bar):
    folder = make_folder(args.out / run.folder(data))
    images = held_out(args) if run.sweep else args.data
    if run.epochs:
        train_run(run, folder, images, args, bar)
    figures, log = evaluate_run(run, folder, images, args), folder / "log.jsonl"
    last = json.loads(log.read_text().splitlines()[-1]) if run.epochs else {}
    packages = ("torch", "torchvision", "scikit-image", "numpy")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    about = {"row": run.row, "seed": run.seed, "epochs": run.epochs, "settings": run.settings(data)}
    about |= {"figures": figures, "last epoch": last, "hardware": machine(args.device)}
    write_json(run.file(args.results, data), about | {"versions": versions | {"r2o": args.commit}})


def held_out(args) -> Path:
    return args.out / f"held-out-{rows.HELD}"


def hold_out(args):
    """Link the training images: HELD of every class in the folder val, the others in train."""
    images, classes = list_images(args.data), {}
    for i in range(len(images)):
        classes.setdefault(Path(os.fsdecode(images[i])).parts[0], []).append(Path(images.path(i)).resolve())
    for name, paths in classes.items():
        for part, some in (("val", paths[: rows.HELD]), ("train", paths[rows.HELD :])):
            folder = make_folder(held_out(args) / part / name)
            for path in some:
                if not (folder / path.name).is_symlink():
                    (folder / path.name).symlink_to(path)


def shrink_photos(args):
    """Save the photographs for evals.segment, at most SIDE pixels long: every third as val, the others as train. Labels
    are 1 for the foreground and 255 for void pixels."""
    for i, (photo, mask) in enumerate(list_pairs(args.photos / "images", args.photos / "segmentations")):
        folders = [make_folder(args.small / kind / ("val" if i % 3 == 2 else "train")) for kind in ("images", "labels")]
        image_path, label_path = (folder / f"{i:05}.png" for folder in folders)
        if label_path.exists():  # it is saved last
            continue
        ids = readable(read_ids, mask)
        label = Image.fromarray(torch.where(ids < 0, 255, ids.clamp(max=1)).byte().numpy())
        image = TF.to_pil_image(readable(read_image, photo))
        for picture, path, how in ((image, image_path, Image.BICUBIC), (label, label_path, Image.NEAREST)):
            picture.thumbnail((rows.SIDE, rows.SIDE), how)
            save_atomically(path, lambda f: picture.save(f, "PNG"))


def commit() -> str:
    program = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    return subprocess.run(program, capture_output=True, text=True).stdout.strip()


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"{found[1] if found else platform.machine()}, 1 thread of {distributed.cores()}"


def identify(args) -> dict:
    """What figures depend on besides flags. Raises UsageError if the results are of anything else."""
    lists = {"images": list_images(args.data)}
    lists["test images"] = list_images(args.data / "val", train=False)
    lists["photographs"] = list_images(args.photos / "images")
    lists["masks"] = list_images(args.photos / "segmentations")
    data = {name: f"{len(x)}, fingerprint {x.fingerprint}" for name, x in lists.items()} | {"device": args.device}
    file = make_folder(args.results) / "data.json"
    if not file.exists():
        write_json(file, data)
    other = f"the results in {args.results} are of other data or another device: pass another --results"
    need(json.loads(file.read_text()) == data, other)
    return data


def execute(runs: list[Run], data: dict, args, title: str):
    """Carry out what is not finished, several at a time. A run that fails does not end the others."""
    done = finished(runs, args.results, data)
    total, failed = sum(run.epochs for run in runs), []
    bar = cli.bar(desc=title, total=total, initial=sum(run.epochs for run in done), unit="epoch")
    with bar, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(carry_out, run, data, args, bar) for run in runs if run not in done]
        try:
            for job in concurrent.futures.as_completed(jobs):
                if isinstance(job.exception(), UsageError):
                    cli.warn(str(job.exception()))
                    failed.append(job.exception())
                else:
                    job.result()
                    ablations_doc.write(args.results, args.doc)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    need(not failed, f"{len(failed)} of {len(runs)} runs failed; {failed[0] if failed else ''}; rerun the command")


def parse_args(argv):
    p = cli.Parser(__doc__)
    p.add_argument("--data", type=Path, help="a folder with train and val, each with a folder of images per class")
    p.add_argument("--photos", type=Path, help="a folder with images and segmentations, as CUB_200_2011 is laid out")
    p.add_argument("--out", type=Path, default=Path("out/ablations"), help="folder for the runs")
    results = "folder for a JSON per run"
    p.add_argument("--results", type=Path, default=ROOT / "bench/results/ablations", help=results)
    p.add_argument("--doc", type=Path, default=ROOT / "docs/ablations.md", help="document; its plots go beside it")
    p.add_argument("--jobs", type=cli.count, default=distributed.cores(), help="runs at a time")
    p.add_argument("--workers", type=cli.natural, default=0, help="loader processes of each run")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--report", action="store_true", help="only write the document again")
    args = p.parse_args(argv)
    cli.need_package("matplotlib", "the document")
    need(args.report or (args.data and args.photos), "expected --data and --photos, or --report")
    need(args.device == "cpu" or torch.cuda.is_available(), "PyTorch sees no GPU: leave --device cuda out")
    for name in ("data", "photos", "out", "results", "doc"):
        path = getattr(args, name)
        setattr(args, name, path and path.absolute())  # programs run in the project's folder
    return args


def work(args) -> int:
    if not args.report:
        args.commit = commit()  # now, and not when a run ends: files may change meanwhile
        data = identify(args)
        lock = lock_output(make_folder(args.out))  # noqa: F841 (held until this function returns)
        ablations_doc.write(args.results, args.doc)  # now, so that nothing is wrong with it later
        args.small = args.out / f"photos-{rows.SIDE}-{data['photographs'].split()[-1]}"
        hold_out(args)
        shrink_photos(args)
        execute(rows.sweep_runs(), data, args, "sweep")
        rates = rows.choose(finished(rows.sweep_runs(), args.results, data))
        execute(rows.programme(rates), data, args, "ablations")
    ablations_doc.write(args.results, args.doc)
    return 0


def main(argv=None):
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cli.run("ablations.py", lambda: work(parse_args(argv)))


if __name__ == "__main__":
    main()
