"""Semantic segmentation by a fine-tuned FCN (Tables 1, 2, 5; A.2), on PASCAL VOC 2012 or Cityscapes.

    torchrun --nproc_per_node=8 -m evals.segment --ckpt out/r2o.pth --data /voc --sbd /sbd
    torchrun --nproc_per_node=8 -m evals.segment --ckpt out/r2o.pth --data /cityscapes --lr paper

--data is the folder that holds VOCdevkit, or leftImg8bit and gtFine. Every learning rate is run with every seed, in
OUT/lr0.01-seed0 and so on; the one with the best mean over the seeds is reported. Rerun to resume.

Where the paper is silent, MMSegmentation's defaults hold, as it says: dropout of 0.1 before the last layer, and a loss
averaged over all pixels, void ones included.
"""

import functools
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets, tv_tensors
from torchvision.transforms.v2 import functional as TF

import r2o
from evals import finetune
from evals.measures import class_ious, confusion
from evals.truth import readable
from runtime import cli, distributed
from runtime.cli import UsageError, need, number
from runtime.storage import write_json

VOID = 255
VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike person plant sheep "
)
VOC += "sofa train tv"
NAMES = {"voc": VOC.split(), "cityscapes": [c.name for c in datasets.Cityscapes.classes if 0 <= c.train_id < 19]}
CROPS = {"voc": 513, "cityscapes": 769}  # A.2, which also gives 30,000 steps and the learning rates it sweeps
WHOLE = {"voc": None, "cityscapes": (1025, 2049)}  # what images are resized to, before scaling and for evaluation
LR = {"voc": [0.01], "cityscapes": [0.04]}  # the authors' configs'
SWEEPS = {"voc": [0.001, 0.003, 0.01, 0.03, 0.1], "cityscapes": [0.004, 0.01, 0.04]}
IMAGES = {"voc": 1_449, "cityscapes": 500}  # of val, by which the data set is recognized
TITLES = {"voc": "PASCAL VOC", "cityscapes": "Cityscapes"}
PAPER = {
    "voc": "77.3 (Table 1), 77.2 ± 0.15 (Table 5); after COCO 74.3 (Table 2), after ImageNet-100 72.1 (Table 4)",
    "cityscapes": "76.6 (Table 1), 76.9 ± 0.38 (Table 5); after COCO 76.4 (Table 2)",
}


def parse_args(argv):
    p = cli.Parser(__doc__)
    p.add_argument("--data", required=True, type=Path, help="folder of VOCdevkit, or of leftImg8bit and gtFine")
    p.add_argument("--sbd", type=Path, metavar="DIR", help="also train on SBD's images (VOC: train_aug, as the paper)")
    finetune.add_flags(p, out="segment", batch_size=16, weight_decay=1e-4, epochs=None, lr=None, seeds=[0, 1, 2])
    p.add_argument("--crop", type=number(int, 32), help="side of the training crops (VOC: 513, Cityscapes: 769)")
    scales = "training images are scaled by a random factor between these"
    scale = number(float, 0, above=True)
    p.add_argument("--scales", type=scale, nargs=2, default=[0.5, 2.0], metavar=("MIN", "MAX"), help=scales)
    p.add_argument("--split", default="train", help="split to train on")
    p.add_argument("--val-split", default="val", help="split to evaluate on")
    args = p.parse_args(argv)
    low, high = args.scales
    need(low <= high, f"--scales must be a smaller and a larger factor, got {low} {high}")
    return args


class FCN(nn.Module):
    """A.2: conv5 with dilation 2 and stride 1; two 3 x 3 convolutions of 256 channels and dilation 6 with batch norm
    and ReLU; dropout; a 1 x 1 convolution to the classes. (B, 3, h, w) normalized -> logits (B, classes, h, w)."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = dilate(encoder)
        layers, cin = [], r2o.channels(encoder.layer4)
        for _ in range(2):
            layers += [nn.Conv2d(cin, 256, 3, padding=6, dilation=6, bias=False), nn.BatchNorm2d(256), nn.ReLU(True)]
            nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
            cin = 256
        self.head = nn.Sequential(*layers, nn.Conv2d(256, classes, 1))
        nn.init.normal_(self.head[-1].weight, std=0.01)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        features = F.dropout2d(self.head[:-1](r2o.encode(self.encoder, x)), 0.1, self.training)
        return F.interpolate(self.head[-1](features), x.shape[-2:], mode="bilinear")


def dilate(encoder: nn.Module) -> nn.Module:
    """Give conv5 (layer4) stride 1, and its 3 x 3 convolutions dilation 2, in place; the weights stay."""
    for conv in (m for m in encoder.layer4.modules() if isinstance(m, nn.Conv2d)):
        conv.stride = (1, 1)
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (2, 2)
    return encoder


def cityscapes_ids() -> dict[int, int]:
    """The value of a pixel of labelIds.png -> one of the 19 evaluated classes, or VOID."""
    return {c.id % 256: c.train_id if 0 <= c.train_id < 19 else VOID for c in datasets.Cityscapes.classes}


class Scenes(Dataset):
    """Images with a class for every pixel. base: a torchvision data set of PIL (image, label) pairs. ids: value of a
    label pixel -> class or VOID. [i]: the unchanged image (3, h, w) and label (h, w), uint8. [epoch, i], for training:
    scaled by a random factor from its own size, or from `shape`, mirrored or not, cropped to `crop`."""

    def __init__(self, base, ids: dict[int, int], where: str, crop: int = 0, scales=(1, 1), seed: int = 0, shape=None):
        self.base, self.where, self.crop, self.scales, self.seed = base, where, crop, scales, seed
        self.shape = shape
        self.table = torch.full((256,), -1)
        for value, class_ in ids.items():
            self.table[value] = class_

    def __len__(self):
        return len(self.base)

    def whole(self, i: int) -> tuple[Tensor, Tensor]:
        image, label = readable(lambda _: self.base[i], f"image {i + 1} of {self.where}")
        image, values = TF.pil_to_tensor(image), torch.from_numpy(np.array(label)).long()
        name, shapes = f"the label of image {i + 1} of {self.where}", (tuple(values.shape), tuple(image.shape[1:]))
        same = shapes[0] == shapes[1]
        need(same, f"{name} has shape {shapes[0]}, the image {shapes[1]}: expected one class id per pixel")
        label = self.table[values.clamp(0, 255)]
        if (bad := (label < 0) | (values > 255)).any():
            known = ", ".join(str(i) for i in range(256) if self.table[i] >= 0)
            raise UsageError(f"{name} has class id {int(values[bad][0])}: expected {known}")
        return image, label.to(torch.uint8)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        if isinstance(key, int):
            return self.whole(key)
        epoch, i = map(int, key)
        image, label = self.whole(i)
        rng = np.random.default_rng([self.seed, epoch, i])
        scale = rng.uniform(*self.scales)
        shape = tuple(max(1, round(scale * side)) for side in self.shape or label.shape)
        sample = {"image": tv_tensors.Image(image), "label": tv_tensors.Mask(label[None])}
        sample = finetune.jitter(rng, sample, shape, self.crop, VOID)
        return sample["image"].as_subclass(Tensor), sample["label"].as_subclass(Tensor)[0]


def open_split(data: Path, which: str, split: str, sbd: Path | None = None):
    """A torchvision data set. sbd: add SBD's images that are in neither of VOC's splits (train_aug, 10,582 images)."""
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
            parts.append(Subset(part, [i for i, p in enumerate(part.images) if Path(p).stem not in ours]))
        return ConcatDataset(parts)
    except (OSError, RuntimeError, ValueError, ImportError) as e:
        where = f"{data} or {sbd}" if sbd else f"{data}"
        raise UsageError(f"cannot open {split} of {where} ({str(e).splitlines()[0]})") from None


def which_data(data: Path) -> tuple[Path, str]:
    """--data as torchvision wants it, and which data set it is."""
    if (data / "leftImg8bit").is_dir():
        return data, "cityscapes"
    for root in (data, data.parent, data.parent.parent):
        if (root / "VOCdevkit/VOC2012").is_dir() and data.resolve().is_relative_to(root.resolve()):
            return root, "voc"
    raise UsageError(f"{data} is neither: expected the folder of VOCdevkit/VOC2012, or of leftImg8bit and gtFine")


def pixel_loss(ddp: nn.Module, batch) -> Tensor:
    """Cross entropy, averaged over all pixels, of which void ones count as 0, as MMSegmentation's default does."""
    images, labels = (x.to(distributed.place()[2], non_blocking=True) for x in batch)
    loss = F.cross_entropy(ddp(r2o.normalize(images)), labels.long(), ignore_index=VOID, reduction="sum")
    return loss / labels.numel()


@torch.no_grad()
def measure(model: nn.Module, scenes: Scenes, classes: int, workers: int, title: str) -> tuple[Tensor, list]:
    """confusion() of all images, at their labels' size; and image, prediction and truth of this rank's first 6. The
    model sees images of scenes.shape, if it is given."""
    _, world, device = distributed.place()
    pixels, shown = torch.zeros(classes, classes, dtype=torch.long), []
    model.eval()
    for image, label in finetune.eval_samples(scenes, workers, title):
        x = r2o.normalize(image[None].to(device))
        if scenes.shape:
            x = F.interpolate(x, scenes.shape, mode="bilinear", antialias=True)
        scores = F.interpolate(model(x), label.shape, mode="bilinear")  # nothing to do unless scenes.shape is given
        predicted = scores.argmax(1)[0].cpu()
        pixels += confusion(predicted, label, classes, VOID)
        if len(shown) < 6:
            shown.append((image, predicted, torch.where(label == VOID, -1, label.long())))
    if world > 1:
        pixels = pixels.to(device)
        dist.all_reduce(pixels)
    return pixels.cpu(), shown


def train_and_measure(run: finetune.Run, names: list[str], ids: dict, base, val: Scenes) -> tuple[dict, str]:
    """One run: mIoU in percent, and the line about its encoder."""
    args = run.args
    encoder, line, fingerprint = finetune.training_encoder(args)
    torch.manual_seed(run.seed)
    model = distributed.to_device(FCN(encoder, len(names)))
    scenes = Scenes(base, ids, f"{args.split} of {args.data}", args.crop, args.scales, run.seed, val.shape)
    finetune.fit(run, model, fingerprint, scenes, pixel_loss, drops=(0.7, 0.9))
    pixels, shown = measure(model, val, len(names), args.workers, f"{run.out}, evaluating")
    ious = class_ious(pixels)
    miou = 100 * ious.nanmean().item()
    if distributed.place()[0] == 0:
        each = {name: None if iou.isnan() else 100 * iou.item() for name, iou in zip(names, ious, strict=True)}
        print(f"{run.out}: mIoU {miou:.2f} over {int((~ious.isnan()).sum())} classes", flush=True)
        write_json(run.out / "result.json", {"mIoU": miou, "IoU": each, "encoder": line, "lr": run.lr})
        finetune.save_strip(shown, run.out / "masks.png")
    return {"mIoU": miou}, line


def segment(args) -> int:
    root, which = which_data(args.data)
    cnn = "the FCN dilates the last stage of a ResNet, which vit_b lacks: pass another --ckpt, or use evals.detect"
    need(finetune.arch_of(args) != "vit_b", cnn)
    args.crop = args.crop or CROPS[which]
    finetune.recipe(args, LR[which], SWEEPS[which], steps=30_000)
    need(not args.sbd or which == "voc", "--sbd adds to PASCAL VOC, but --data is Cityscapes: leave it out")
    ids = cityscapes_ids() if which == "cityscapes" else {i: i for i in [*range(21), VOID]}
    base = open_split(root, which, args.split, args.sbd)
    val = Scenes(open_split(root, which, args.val_split), ids, f"{args.val_split} of {args.data}", shape=WHOLE[which])
    task = f"{TITLES[which]} {args.val_split}, {len(val)} images, FCN"
    more = {"data": which, "images": len(val), "split": args.split, "val split": args.val_split}
    more |= {"epochs": args.epochs, "steps": args.steps}
    settings = {"data": which, "crop": args.crop, "scales": args.scales}
    measured = functools.partial(train_and_measure, names=NAMES[which], ids=ids, base=base, val=val)
    return finetune.sweep(args, settings, measured, task, f"mIoU {PAPER[which]}", len(val) == IMAGES[which], more)


def main(argv=None):
    with distributed.StopSignals():
        cli.run("evals.segment", lambda: segment(parse_args(argv)))


if __name__ == "__main__":
    main()
