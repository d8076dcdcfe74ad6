"""From image files to batches on the device: the data set, the sampler, and copies that run ahead of training."""

import itertools
import sys

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import r2o
from r2o_baselines import spanning_crop
from runtime import distributed
from runtime.cli import UsageError, printable
from runtime.images import ImageList, read_image


class ImageRegions(Dataset):
    """Images with their region maps, indexed by (epoch, i). All randomness of a sample follows from (seed, epoch, i),
    so it does not depend on workers, ranks or interruptions, and no two samples share any.

    maps, header: from region_maps(); images that it could not read are left out. size: side of a view. policy: see
    draw_views(). spanning: crop the image (and shift its boxes) to span both views, for Odin. A sample is a dict: image
    (S, S, 3) uint8, regions (h, w), num_regions, draw_views()'s entries, unreadable: whether another image replaces it.
    """

    def __init__(self, images: ImageList, maps, header: dict, size=224, seed=0, policy="byol", spanning=False):
        self.images, self.maps, self.size, self.seed = images, maps, size, seed
        self.policy, self.spanning = policy, spanning
        self.num_regions, self.unreadable = header["num_regions"], len(header["unreadable"])
        self.keep = np.delete(np.arange(len(images)), [i for i, _ in header["unreadable"]])

    def __len__(self):
        return len(self.keep)

    def __str__(self):
        return f"{len(self)} images of at most {self.num_regions} regions ({self.unreadable} unreadable)"

    def __getstate__(self):  # workers that are spawned, not forked, open the maps themselves
        return vars(self) | {"maps": self.maps.filename}

    def __setstate__(self, state):
        vars(self).update(state, maps=np.load(state["maps"], mmap_mode="r"))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = int(key[0]), int(key[1])
        for later in range(10):
            i = int(self.keep[(index + later) % len(self)])
            path = self.images.path(i)
            try:
                image = read_image(path)
                break
            except OSError as e:  # it was readable when the maps were made
                print(printable(f"unreadable: {path} ({e}): the next image replaces it"), file=sys.stderr, flush=True)
        else:
            raise UsageError(f"{path} and the 9 images before it can no longer be read: is the disk still there?")
        rng = np.random.default_rng([self.seed, epoch, int(self.keep[index])])
        views = r2o.draw_views(image, self.size, rng, self.policy)
        if self.spanning:
            image, views["boxes"] = spanning_crop(image, views["boxes"])
        regions = np.array(self.maps[i])
        return {
            "image": r2o.resize(image, self.size).permute(1, 2, 0),
            "regions": torch.from_numpy(regions),
            "num_regions": torch.tensor(int(regions.max()) + 1),
            "unreadable": torch.tensor(later > 0),
            **views,
        }


class Batches:
    """Sampler of this rank's share of every batch, for the given optimizer steps. Each epoch is a new permutation of
    the images, each batch a slice of it, split into `accum` micro-batches, each split by rank. Drops the rest."""

    def __init__(self, images: int, batch: int, steps: range, seed: int, rank: int = 0, world: int = 1, accum: int = 1):
        self.images, self.batch, self.steps, self.seed = images, batch, steps, seed
        self.rank, self.world, self.accum = rank, world, accum

    def __iter__(self):
        per_epoch, share = self.images // self.batch, self.batch // self.accum // self.world
        order, epoch = None, None
        for step in self.steps:
            if epoch != step // per_epoch:
                epoch = step // per_epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(self.images)
            for part in range(self.accum):
                start = step % per_epoch * self.batch + (part * self.world + self.rank) * share
                yield [(epoch, i) for i in order[start : start + share]]


def step_seed(*numbers: int) -> int:
    """A seed from all the numbers, of 32 bits: PyTorch's CPU generator ignores the others."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def load_batches(data: Dataset, batches, workers: int, device: torch.device, collate=None) -> DataLoader:
    """One loader over all epochs, so that its workers prefetch across epoch boundaries."""
    settings = {"collate_fn": collate, "pin_memory": device.type == "cuda"}
    settings["prefetch_factor"] = 1 if workers else None  # 16 workers of 8 GPUs then hold 30 GB of batches of 512
    return distributed.make_loader(data, workers, batch_sampler=batches, **settings)


ON_HOST = ("factors", "num_regions")


def copy_ahead(batches, device: torch.device):
    """Batches moved to `device`, except what the host reads. On a GPU each is copied while the previous one is used."""
    if device.type == "cpu":
        yield from batches
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in itertools.chain(batches, [None]):
        coming = None
        if batch is not None:
            with torch.cuda.stream(stream):
                moved = {n: x if n in ON_HOST else x.to(device, non_blocking=True) for n, x in batch.items()}
                coming = moved, stream.record_event()
        if ahead is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(ahead[1])
            for x in ahead[0].values():
                if x.is_cuda:
                    x.record_stream(current)
            yield ahead[0]
        ahead = coming


def network_input(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A batch on the device -> images (B, 3, S, S) and augmented views (2B, 3, S, S), normalized."""
    images = r2o.normalize(batch["image"].movedim(-1, 1)).contiguous(memory_format=torch.channels_last)
    views, flips, factors = (batch[name].transpose(0, 1).flatten(0, 1) for name in ("views", "flips", "factors"))
    views = r2o.augment(views.movedim(-1, 1), flips, factors)
    return images, views.contiguous(memory_format=torch.channels_last)
