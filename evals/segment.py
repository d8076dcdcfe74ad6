"""Semantic segmentation by a fine-tuned FCN (Tables 1, 2, 5; A.2), on PASCAL VOC 2012, Cityscapes or your own images.

    torchrun --nproc_per_node=8 -m evals.segment --ckpt out/r2o.pth --data /voc --sbd /sbd
    torchrun --nproc_per_node=8 -m evals.segment --ckpt out/r2o.pth --data /cityscapes --lr paper
    python -m evals.segment --ckpt out/r2o.pth --data ROOT --classes names.txt --void 255 --epochs 50 --batch-size 4

--data is the folder that holds VOCdevkit; leftImg8bit and gtFine; or images and labels. Every learning rate is run with
every seed, in OUT/lr0.01-seed0 and so on; the one with the best mean over the seeds is reported. Rerun to resume.

Dropout of 0.1 before the last layer and a loss averaged over all pixels, void ones included, are MMSegmentation's
defaults. Its color jitter is left out, and its crops differ (docs/differences.md).
"""

import functools
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import r2o
from evals import finetune
from evals.measures import class_ious, confusion
from evals.scenes import VOID, Recipe, Scenes, open_scenes
from evals.truth import add_suffix_flag
from runtime import cli, distributed
from runtime.cli import need, number
from runtime.storage import write_json


def parse_args(argv):
    p = cli.Parser(__doc__)
    data = "folder of VOCdevkit, of leftImg8bit and gtFine, or of images and labels; or IMAGES LABELS, two folders"
    p.add_argument("--data", required=True, nargs="+", type=Path, help=data)
    classes = "classes of your own labels: a file with a name per line, for ids 0, 1, …; or their number"
    p.add_argument("--classes", metavar="FILE|N", help=classes)
    void = "ids in your own labels to ignore, in training and evaluation"
    p.add_argument("--void", type=number(int, 0, 2**16 - 1), nargs="+", metavar="ID", help=void)
    add_suffix_flag(p)
    p.add_argument("--sbd", type=Path, metavar="DIR", help="also train on SBD's images (VOC: train_aug, as the paper)")
    finetune.add_flags(p, out="segment", batch_size=16, weight_decay=1e-4, epochs=None, lr=None, seeds=[0, 1, 2])
    p.add_argument("--crop", type=number(int, 32), help="side of the training crops (default: 513; Cityscapes: 769)")
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
    and ReLU; dropout; a 1 x 1 convolution to the classes; interpolation. (B, 3, h, w) normalized -> logits (B, classes,
    h, w)."""

    def __init__(self, encoder: nn.Module, classes: int, align_corners: bool = False):
        super().__init__()
        self.encoder, self.align_corners = dilate(encoder), align_corners
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
        return self.interpolate(self.head[-1](features), x.shape[-2:])

    def interpolate(self, scores: Tensor, shape) -> Tensor:
        return F.interpolate(scores, tuple(shape), mode="bilinear", align_corners=self.align_corners)


def dilate(encoder: nn.Module) -> nn.Module:
    """Give conv5 (layer4) stride 1, and its 3 x 3 convolutions dilation 2, in place; the weights stay."""
    for conv in (m for m in encoder.layer4.modules() if isinstance(m, nn.Conv2d)):
        conv.stride = (1, 1)
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (2, 2)
    return encoder


def pixel_loss(ddp: nn.Module, batch) -> Tensor:
    """Cross entropy, averaged over all pixels, of which void ones count as 0, as MMSegmentation's default does."""
    images, labels = (x.to(distributed.place().device, non_blocking=True) for x in batch)
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
        scores = model.interpolate(model(x), label.shape)  # nothing to do unless scenes.shape is given
        predicted = scores.argmax(1)[0].cpu()
        pixels += confusion(predicted, label, classes, VOID)
        if len(shown) < 6:
            shown.append((image, predicted, torch.where(label == VOID, -1, label.long())))
    if world > 1:
        pixels = pixels.to(device)
        dist.all_reduce(pixels)
    return pixels.cpu(), shown


def train_and_measure(run: finetune.Run, recipe: Recipe, train: list, val: Scenes) -> tuple[dict, str]:
    """One run: mIoU in percent, and the line about its encoder."""
    args, names = run.args, recipe.names
    encoder, line, fingerprint = finetune.training_encoder(args)
    torch.manual_seed(run.seed)
    model = distributed.to_device(FCN(encoder, len(names), recipe.align_corners))
    scenes = Scenes(train, recipe, args.crop, args.scales, run.seed)
    finetune.fit(run, model, fingerprint, scenes, pixel_loss, drops=(0.7, 0.9))
    pixels, shown = measure(model, val, len(names), args.workers, f"{run.out}, evaluating")
    ious = class_ious(pixels)
    need(not ious.isnan().all(), f"no pixel of {args.val_split} has a class: all are void")
    miou = 100 * ious.nanmean().item()
    if distributed.place().rank == 0:
        each = {name: None if iou.isnan() else 100 * iou.item() for name, iou in zip(names, ious, strict=True)}
        print(f"{run.out}: mIoU {miou:.2f} over {int((~ious.isnan()).sum())} of {len(names)} classes", flush=True)
        write_json(run.out / "result.json", {"mIoU": miou, "IoU": each, "encoder": line, "lr": run.lr})
        finetune.save_strip(shown, run.out / "masks.png", names)
    return {"mIoU": miou}, line


def segment(args) -> int:
    cnn = "the FCN dilates the last stage of a ResNet, which vit_b lacks: pass another --ckpt, or use evals.detect"
    need(finetune.arch_of(args) != "vit_b", cnn)
    recipe, train, val = open_scenes(args)
    args.crop = args.crop or recipe.crop
    steps = None if recipe.epochs else 30_000
    finetune.recipe(args, list(recipe.lr), list(recipe.sweep), epochs=recipe.epochs, steps=steps)
    settings = {"data": recipe.key, "crop": args.crop, "scales": args.scales}
    more = {"data": recipe.title, "images": len(val), "training images": len(train)}
    more |= {"split": args.split, "val split": args.val_split, "classes": recipe.names}
    more |= {"epochs": args.epochs, "steps": args.steps}
    task = f"{recipe.title} {args.val_split}, {len(val)} images, FCN trained on {len(train)}"
    is_papers_data = (len(train), len(val)) == recipe.images
    measured = functools.partial(train_and_measure, recipe=recipe, train=train, val=Scenes(val, recipe))
    return finetune.sweep(args, settings, measured, task, f"mIoU {recipe.paper}", is_papers_data, more)


def main(argv=None):
    with distributed.StopSignals():
        cli.run("evals.segment", lambda: segment(parse_args(argv)))


if __name__ == "__main__":
    main()
