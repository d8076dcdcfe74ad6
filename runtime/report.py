"""The output of a pretraining run: a bar and a health line, log.jsonl, strip.png."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import r2o
from runtime import distributed
from runtime.cli import bar, warn
from runtime.loader import ImageRegions
from runtime.pictures import evenly, film_strip, paint
from runtime.storage import save_or_warn


def health(record: dict) -> str:
    """An epoch's record in a line."""
    return (
        "epoch {epoch}: loss {loss:.3f}, spread {spread:.2f}, {masks:.1f} masks and {pairs:.1f} pairs per image, "
        "{clusters:.1f} of {K} clusters used, the largest {largest:.1%}, {skipped} steps skipped, {unreadable} images "
        "unreadable".format(**record)
    )


def alarms(record: dict, masks: str = "predicted") -> list[str]:
    """Signs in an epoch's record that training is failing. masks: of the model, "predicted" or "prior"."""
    found = []
    if record["spread"] < 0.1:
        found.append("the projections have collapsed to a point (spread near 0): lower --lr, or raise --tau")
    if record["pairs"] == 0:
        found.append("no mask is seen by both views, so nothing is learned: are the images larger than a few pixels?")
    if masks == "prior" and record["masks"] < 2:
        found.append("most images are a single segment: --prior fh needs photographs of 224 pixels or so")
    elif masks != "prior" and record["K"] > 1 and record["largest"] > 0.95:
        found.append("one cluster owns almost everything: the features have collapsed")
    if record["skipped"]:
        found.append(f"{record['skipped']} steps were skipped, loss or gradients not finite: consider a lower --lr")
    return found


class Report:
    """Rank 0's bar, health line, log.jsonl, strip.png and TensorBoard log; on other ranks it does nothing.

    masks: of the preview so far, a list of [epoch, K, masks (n, h, w) int16], which is part of the checkpoint.
    """

    def __init__(self, out: Path, schedule: r2o.Schedule, tensorboard: bool):
        self.out, self.schedule, self.tensorboard = out, schedule, tensorboard
        self.masks: list = []
        self.bar = self.board = None
        self.silent = distributed.place().rank > 0

    def start(self, headline: str, data: ImageRegions, step: int):
        """Announce the run, and drop log rows newer than the checkpoint; those epochs are repeated."""
        if self.silent:
            return
        schedule, epochs_done = self.schedule, step // self.schedule.steps_per_epoch
        samples = [data[0, i] for i in evenly(len(data), 32)]  # the same after every epoch
        self.preview = {key: torch.stack([s[key] for s in samples]) for key in ("image", "regions")}
        print(f"{headline}\n{data}")
        print(f"{schedule.epochs} epochs of {schedule.steps_per_epoch} steps of {schedule.batch_size} images")
        if step == schedule.steps:
            print(f"already finished, after step {step}")
        elif step:
            of_epoch = f"{step % schedule.steps_per_epoch} of {schedule.steps_per_epoch} in epoch {epochs_done + 1}"
            print(f"resuming after step {step}, {of_epoch}")
        sys.stdout.flush()
        self.log, path = [], self.out / "log.jsonl"
        if path.exists():
            rows = [row for row in path.read_bytes().splitlines(keepends=True) if row.endswith(b"\n")]
            self.log = rows[:epochs_done]
            save_or_warn(path, lambda f: f.writelines(self.log))
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out / "tensorboard", purge_step=epochs_done + 1)
        self._start_bar(step)

    def _start_bar(self, step: int):
        steps = self.schedule.steps_per_epoch
        title, finished = f"epoch {step // steps + 1}/{self.schedule.epochs}", step == self.schedule.steps
        self.bar = bar(desc=title, total=steps, initial=step % steps, disable=finished)
        self.began, self.began_at = time.perf_counter(), step

    def speed(self, step: int) -> float:
        """Images per second in this epoch."""
        return (step - self.began_at) * self.schedule.batch_size / (time.perf_counter() - self.began)

    def step(self, step: int, stats: dict[str, Tensor], k: int, lr: float, tau: float):
        """Advance the bar to `step`, counted from 1. Only every tenth shows the loss, for which the host waits."""
        if self.silent:
            return
        self.bar.update()
        if (step - 1) % self.schedule.steps_per_epoch % 10 == 0:
            shown = f"loss {stats['loss']:.3f}, K {k}, lr {lr:.2g}, tau {tau:.4f}, {self.speed(step):.0f} images/s"
            self.bar.set_postfix_str(shown, refresh=False)

    def epoch(self, record: dict, model: r2o.R2O, seed: int):
        """Write the health line, a row of log.jsonl, and strip.png."""
        if self.silent:
            return
        self.bar.close()
        step = record["epoch"] * self.schedule.steps_per_epoch
        record["images/s"] = self.speed(step)
        strip = self.draw_strip(model, record["K"], record["epoch"], seed)
        self.log.append(json.dumps(record).encode() + b"\n")
        save_or_warn(self.out / "log.jsonl", lambda f: f.writelines(self.log))
        if self.board:
            try:
                for name, value in record.items():
                    self.board.add_scalar(name, value, record["epoch"])
                self.board.add_image("strip", np.asarray(strip), record["epoch"], dataformats="HWC")
                self.board.flush()
            except OSError as e:
                warn(f"TensorBoard's log is incomplete ({e.strerror})")
        if "loss" not in record:
            print("epoch {epoch}: all {skipped} steps were skipped, loss or gradients were not finite".format(**record))
        else:
            print(f"{health(record)}, {record['images/s']:.0f} images/s")
            for alarm in alarms(record, model.masks):
                warn(f"epoch {record['epoch']}: {alarm}")
        sys.stdout.flush()
        self._start_bar(step)

    @torch.no_grad()
    def draw_strip(self, model: r2o.R2O, k: int, epoch: int, seed: int):
        """Add the preview's masks after this epoch to `masks`; paint image, prior, and up to six epochs."""
        device = next(model.parameters()).device
        images, regions = self.preview["image"].movedim(-1, 1), self.preview["regions"]  # (n, 3, S, S), (n, h, w)
        groups, _ = r2o.kmeans_groups(len(images), 1, model.kmeans_group)
        uniforms = r2o.seeding_uniforms(groups, k, torch.Generator().manual_seed(seed)).to(device)
        encoder = model.mask_encoder.eval()  # as in training, but with batch norm's running statistics
        rows = evenly(len(images), 8)
        m = model.predict_masks(encoder, r2o.normalize(images.to(device)), regions.to(device), k, uniforms).cpu()[rows]
        encoder.train()
        self.masks.append([epoch, k, m.to(torch.int16)])
        shown = [self.masks[i] for i in sorted({*evenly(len(self.masks), 6)})]
        image, prior = images[rows], regions[rows]
        columns = [("image", image), (f"prior, {int(prior.max()) + 1} regions", paint(image, prior))]
        columns += [(f"epoch {e}, K = {k}", paint(image, m)) for e, k, m in shown]
        strip = film_strip(columns, zoom=max(1, 128 // image.shape[-1]))
        save_or_warn(self.out / "strip.png", lambda f: strip.save(f, "PNG"))
        return strip
