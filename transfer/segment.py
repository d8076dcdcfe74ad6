"""Semantic segmentation by a fine-tuned FCN (Tables 1, 2, 5; A.2), on PASCAL VOC 2012 or Cityscapes.

    torchrun --nproc_per_node=8 transfer/segment.py --ckpt out/r2o.pth --data /voc --sbd /sbd
    torchrun --nproc_per_node=8 transfer/segment.py --ckpt out/r2o.pth --data /cityscapes --lr 0.01 0.02 0.04

--data is the folder of VOCdevkit, or that of leftImg8bit and gtFine. Every learning rate is run with every seed, in
OUT/lr0.01-seed0 and so on; the one whose mean over the seeds is best is reported, with the standard deviation. The same
command goes on after an interruption.
"""

import argparse
from pathlib import Path

import finetune
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from finetune import evaluation, files, processes, r2o
from torch import Tensor, nn
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF

from r2o import UsageError

VOID = 255
NAMES = {
    "voc": (
        "background aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike person plant "
        "sheep sofa train tv"
    ).split(),
    "cityscapes": [c.name for c in datasets.Cityscapes.classes if 0 <= c.train_id < 19],
}
# As in the authors' configs. theirs: from their README.
RECIPES = {
    "voc": {"name": "PASCAL VOC", "classes": 21, "crop": 513, "epochs": 45, "lr": [0.01], "theirs": 77.3},
    "cityscapes": {"name": "Cityscapes", "classes": 19, "crop": 769, "epochs": 160, "lr": [0.04], "theirs": 76.6},
}


class FCN(nn.Module):
    """A.2: conv5 with dilation 2 and stride 1, then two 3 x 3 convolutions of 256 channels and dilation 6 with batch
    norm and ReLU, and a 1 x 1 convolution to the classes. Images (B, 3, h, w) normalised -> logits (B, classes, h,
    w)."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = dilate(encoder)
        layers, cin = [], finetune.channels(encoder.layer4)
        for _ in range(2):
            layers += [nn.Conv2d(cin, 256, 3, padding=6, dilation=6, bias=False), nn.BatchNorm2d(256), nn.ReLU(True)]
            nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
            cin = 256
        self.head = nn.Sequential(*layers, nn.Conv2d(256, classes, 1))
        nn.init.normal_(self.head[-1].weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(r2o.encode(self.encoder, x)), x.shape[-2:], mode="bilinear")


def dilate(encoder: nn.Module) -> nn.Module:
    """conv5 (layer4) with stride 1 and its 3 x 3 convolutions with dilation 2, in place; the weights stay."""
    for conv in (m for m in encoder.layer4.modules() if isinstance(m, nn.Conv2d)):
        conv.stride = (1, 1)
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (2, 2)
    return encoder


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def cityscapes_ids() -> dict[int, int]:
    """What a pixel of labelIds.png says -> one of the 19 classes that count, or void."""
    return {c.id % 256: c.train_id if 0 <= c.train_id < 19 else VOID for c in datasets.Cityscapes.classes}


class Scenes(torch.utils.data.Dataset):
    """Images with a class for every pixel. base: a torchvision dataset of PIL (image, label) pairs; ids: what label
    pixels say -> class or VOID. Indexed by (epoch, i) for training: (image (3, S, S), label (S, S)) uint8, at a scale
    of 0.5 to 2, mirrored or not, cut to `crop`. whole(i): the image and label as they are."""

    def __init__(self, base, ids: dict[int, int], where: str, crop: int = 0, scales=(1, 1), seed: int = 0):
        self.base, self.where, self.crop, self.scales, self.seed = base, where, crop, scales, seed
        self.table = torch.full((256,), -1)
        for value, class_ in ids.items():
            self.table[value] = class_

    def __len__(self):
        return len(self.base)

    def whole(self, i: int) -> tuple[Tensor, Tensor]:
        image, label = evaluation.read(lambda _: self.base[i], f"image {i + 1} of {self.where}")
        image, values = TF.pil_to_tensor(image), torch.from_numpy(np.array(label)).long()
        if values.ndim != 2 or values.shape != image.shape[1:]:
            raise UsageError(
                f"the label of image {i + 1} of {self.where} has shape {tuple(values.shape)}, the image "
                f"{tuple(image.shape[1:])}: expected one class id a pixel"
            )
        label = self.table[values.clamp(0, 255)]
        if (bad := (label < 0) | (values > 255)).any():
            known = ", ".join(str(i) for i in range(256) if self.table[i] >= 0)
            raise UsageError(
                f"the label of image {i + 1} of {self.where} has class id {int(values[bad][0])}: expected {known}"
            )
        return image, label.to(torch.uint8)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, i = int(key[0]), int(key[1])
        image, label = self.whole(i)
        rng = np.random.default_rng([self.seed, epoch, i])
        scale = rng.uniform(*self.scales)
        shape = tuple(max(1, round(scale * side)) for side in label.shape)
        image, label, *_ = finetune.crop(rng, image, label[None], shape, self.crop, VOID)
        return image, label[0]


def open_split(data: Path, which: str, split: str, sbd: Path | None = None):
    """A torchvision dataset; VOC's train with SBD's images that are in neither of VOC's splits: train_aug, 10,582."""
    try:
        if which == "cityscapes":
            return datasets.Cityscapes(str(data), split, target_type="semantic")
        voc = datasets.VOCSegmentation(str(data), "2012", split)
        if not sbd:
            return voc
        ours = {Path(p).stem for s in ("train", "val") for p in datasets.VOCSegmentation(str(data), "2012", s).images}
        parts = [voc]
        for name in ("train", "val"):
            part = datasets.SBDataset(str(sbd), name, mode="segmentation")
            new = [i for i, p in enumerate(part.images) if Path(p).stem not in ours]
            parts.append(torch.utils.data.Subset(part, new))
        return torch.utils.data.ConcatDataset(parts)
    except (OSError, RuntimeError, ValueError, ImportError) as e:
        raise UsageError(
            f"cannot open {split} of {data}{f' or {sbd}' if sbd else ''} ({str(e).splitlines()[0]})"
        ) from None


def which_data(data: Path) -> tuple[Path, str]:
    """--data as torchvision wants it, and whose it is."""
    if (data / "leftImg8bit").is_dir():
        return data, "cityscapes"
    for root in (data, data.parent, data.parent.parent):
        if (root / "VOCdevkit/VOC2012").is_dir() and data.resolve().is_relative_to(root.resolve()):
            return root, "voc"
    raise UsageError(f"{data} is neither: expected the folder of VOCdevkit/VOC2012, or of leftImg8bit and gtFine")


# ---------------------------------------------------------------------------------------------------------------------
# The measure
# ---------------------------------------------------------------------------------------------------------------------


def count_pairs(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(classes, classes) pixels, by truth and by prediction; void is left out. predicted, truth: (h, w)."""
    counted = truth != VOID
    pairs = truth[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_ious(pairs: Tensor) -> Tensor:
    """IoU of each class, NaN for one that is neither there nor predicted: (classes, classes) -> (classes,)."""
    hits = pairs.diagonal().double()
    return hits / (pairs.sum(0) + pairs.sum(1) - hits)


@torch.no_grad()
def evaluate(model: nn.Module, scenes: Scenes, classes: int, args, title: str) -> tuple[Tensor, list]:
    """count_pairs() of all images, at their own size; and of this process's first 6: image, prediction, truth."""
    rank, world, device = processes.place()
    own = finetune.share(len(scenes))
    loader = torch.utils.data.DataLoader(
        finetune.Whole(scenes, own), batch_size=None, num_workers=args.workers, worker_init_fn=processes.deaf
    )
    pairs, shown = torch.zeros(classes, classes, dtype=torch.long), []
    model.eval()
    for image, label in files.bar(iterable=loader, desc=title, total=len(own), disable=rank > 0):
        predicted = model(r2o.normalize(image[None].to(device))).argmax(1)[0].cpu()
        pairs += count_pairs(predicted, label, classes)
        if len(shown) < 6:
            shown.append((image, predicted, torch.where(label == VOID, -1, label.long())))
    if world > 1:
        pairs = pairs.to(device)
        dist.all_reduce(pairs)
    return pairs.cpu(), shown


def run(args, which: str, ids: dict, lr: float, seed: int, base, val: Scenes) -> tuple[dict[str, float] | None, str]:
    """One run: mIoU (None: told to stop), and the line about its encoder."""
    rank, world, device = processes.place()
    classes, out = RECIPES[which]["classes"], finetune.folder(args, lr, seed)
    encoder, line, fingerprint = finetune.backbone(args, rank)
    torch.manual_seed(seed)
    model = finetune.to_device(FCN(encoder, classes), world, device)
    scenes = Scenes(base, ids, f"{args.split} of {args.data}", args.crop, args.scales, seed)

    def loss_of(ddp, batch, device):
        images, labels = (x.to(device, non_blocking=True) for x in batch)
        loss = F.cross_entropy(ddp(r2o.normalize(images)), labels.long(), ignore_index=VOID, reduction="sum")
        pixels = (labels != VOID).sum()  # of all processes, so that each pixel weighs alike; DDP averages over them
        if world > 1:
            dist.all_reduce(pixels)
        return loss * world / pixels.clamp(min=1)

    settings = {"data": which, "crop": args.crop, "scales": args.scales}
    if not finetune.fit(model, scenes, None, loss_of, out, settings, fingerprint, args, lr, seed, drops=(0.7, 0.9)):
        return None, line
    pairs, shown = evaluate(model, val, classes, args, f"{out}, evaluating")
    ious = class_ious(pairs)
    miou = 100 * ious.nanmean().item()
    if rank == 0:
        each = {name: None if iou.isnan() else 100 * iou.item() for name, iou in zip(NAMES[which], ious, strict=True)}
        print(f"{out}: mIoU {miou:.2f} over {int((~ious.isnan()).sum())} classes", flush=True)
        evaluation.write_json(out / "result.json", {"mIoU": miou, "IoU": each, "encoder": line, "lr": lr})
        finetune.strip(shown, out / "masks.png")
    return {"mIoU": miou}, line


def segment(args) -> int:
    root, which = which_data(args.data)
    recipe = RECIPES[which]
    for name in ("lr", "epochs", "crop"):
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    finetune.check_flags(args)
    if args.crop < 32:
        raise UsageError(f"--crop must be at least 32, got {args.crop}")
    if not 0 < args.scales[0] <= args.scales[1]:
        raise UsageError(f"--scales must be a smaller and a larger factor, got {args.scales[0]} {args.scales[1]}")
    if args.sbd and which != "voc":
        raise UsageError("--sbd adds to PASCAL VOC, but --data is Cityscapes: leave it out")
    ids = cityscapes_ids() if which == "cityscapes" else {i: i for i in [*range(21), VOID]}
    base = open_split(root, which, args.split, args.sbd)
    val = Scenes(open_split(root, which, args.val_split), ids, f"{args.val_split} of {args.data}")
    task = f"{recipe['name']} {args.val_split}, {len(val)} images, FCN"
    theirs = f"Table 1, mIoU {recipe['theirs']} (their README)"
    more = {"data": which, "images": len(val), "epochs": args.epochs, "split": args.split, "val split": args.val_split}
    return finetune.sweep(args, lambda lr, seed: run(args, which, ids, lr, seed, base, val), task, theirs, more)


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, type=Path, help="the folder of VOCdevkit, or of leftImg8bit and gtFine")
    p.add_argument("--sbd", type=Path, metavar="DIR", help="also train on SBD's images (VOC: train_aug, as the paper)")
    finetune.add_flags(p, out="segment", batch_size=16, weight_decay=1e-4, epochs=None, lr=None, seeds=[0, 1, 2])
    p.add_argument("--crop", type=int, help="side of the training crops (VOC: 513, Cityscapes: 769)")
    scales = "training images are scaled by a random factor between these (default: 0.5 2)"
    p.add_argument("--scales", type=float, nargs=2, default=[0.5, 2.0], metavar=("MIN", "MAX"), help=scales)
    p.add_argument("--split", default="train", help="to train on (default: %(default)s)")
    p.add_argument("--val-split", default="val", help="to evaluate on (default: %(default)s)")
    return p.parse_args(argv)


def main(argv=None):
    processes.run("segment.py", lambda: segment(parse_args(argv)))


if __name__ == "__main__":
    processes.stoppable()
    main()
