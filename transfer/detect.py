"""Object detection and instance segmentation by a fine-tuned Mask R-CNN with FPN (Tables 1, 6; A.2), on COCO.

    torchrun --nproc_per_node=8 transfer/detect.py --ckpt out/r2o.pth --data /coco                 # 1x: 12 epochs
    torchrun --nproc_per_node=8 transfer/detect.py --ckpt out/r2o.pth --data /coco --schedule 2x   # 24

--data holds train2017, val2017 and annotations/instances_{train,val}2017.json. Images are mirrored, scaled to 0.8 to
1.25 times 1024 pixels on their longer side, and cut or padded to 1024 x 1024; for evaluation, scaled to 1024 and
padded. Box and mask AP are pycocotools'. The same command goes on after an interruption.
"""

import argparse
import contextlib
import io
from pathlib import Path

import finetune
import numpy as np
import torch
import torch.distributed as dist
from finetune import evaluation, files, processes, r2o
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from r2o import UsageError

EPOCHS = {"1x": 12, "2x": 24}


def mask_rcnn(encoder: nn.Module, classes: int, size: int) -> MaskRCNN:
    """torchvision's, with batch norm, all of it trained, in the backbone, the FPN and the mask head; the box head is
    two fully connected layers, as in the authors' config. classes: without the background."""
    widths = [finetune.channels(getattr(encoder, f"layer{i}")) for i in (1, 2, 3, 4)]
    levels = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(encoder, levels, widths, 256, norm_layer=nn.BatchNorm2d)
    head = MaskRCNNHeads(256, (256,) * 4, 1, norm_layer=nn.BatchNorm2d)
    net = MaskRCNN(backbone, classes + 1, min_size=size, max_size=size, size_divisible=size, mask_head=head)
    # torchvision's RoIAlign guesses each level's scale from the first image that it meets, as it is before padding, and
    # keeps it: wrong by a factor of 2 where that is flat. So a square one comes first.
    with torch.no_grad():
        levels = net.backbone.eval()(torch.zeros(1, 3, size, size))
        for pool in (net.roi_heads.box_roi_pool, net.roi_heads.mask_roi_pool):
            pool(levels, [torch.zeros(1, 4)], [(size, size)])
    return net.train()


class Objects(torch.utils.data.Dataset):
    """COCO's images with their objects. Indexed by (epoch, i) for training: (image (3, S, S) uint8, target of Mask
    R-CNN), of images with objects that are no crowds; set `seed` first. whole(i): the image as it is, and its id."""

    def __init__(self, data: Path, split: str, size: int, trains: bool = True):
        coco, rows = evaluation.load_coco(data / split, data / "annotations" / f"instances_{split}.json")
        self.size, self.seed = size, 0
        self.categories = sorted(coco.cats)  # label i + 1 is categories[i]
        self.label = {category: i + 1 for i, category in enumerate(self.categories)}
        if trains:
            rows = [row | {"annotations": [a for a in row["annotations"] if not a["iscrowd"]]} for row in rows]
            rows = [row for row in rows if row["annotations"]]
        self.rows = evaluation.Packed(rows)
        self.coco = None if trains else coco  # in training, millions of objects that workers would come to copy

    def __len__(self):
        return len(self.rows)

    def whole(self, i: int) -> tuple[Tensor, int]:
        row = self.rows[i]
        image = evaluation.read(r2o.read_image, row["path"])
        if tuple(image.shape[1:]) != (row["height"], row["width"]):
            raise UsageError(
                f"{row['path']} is {image.shape[2]} x {image.shape[1]} pixels, its annotations {row['width']} x "
                f"{row['height']}: expected the image that was annotated"
            )
        return image, row["id"]

    def masks(self, i: int) -> Tensor:
        """Of all objects of an image: (n, h, w) uint8."""
        row = self.rows[i]
        return torch.stack(
            [evaluation.decode(a["segmentation"], row["height"], row["width"]) for a in row["annotations"]]
        )

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        epoch, i = int(key[0]), int(key[1])
        image, _ = self.whole(i)
        rng, annotations, (h, w) = (
            np.random.default_rng([self.seed, epoch, i]),
            self.rows[i]["annotations"],
            image.shape[1:],
        )
        scale = rng.uniform(0.8, 1.25) * self.size / max(h, w)
        shape = max(1, round(scale * h)), max(1, round(scale * w))
        image, masks, mirrored, top, left = finetune.crop(rng, image, self.masks(i), shape, self.size, 0)
        x, y, width, height = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).unbind(1)
        x = w - x - width if mirrored else x
        boxes = torch.stack([x, y, x + width, y + height], 1)
        boxes = boxes * torch.tensor([shape[1] / w, shape[0] / h] * 2) - torch.tensor([left, top] * 2)
        boxes = boxes.clamp(0, self.size)
        labels = torch.tensor([self.label[a["category_id"]] for a in annotations])
        kept = masks.flatten(1).bool().any(1) & (boxes[:, 2:] - boxes[:, :2] > 1e-3).all(1)  # the rest is outside
        return image, {"boxes": boxes[kept], "labels": labels[kept], "masks": masks[kept]}


@torch.no_grad()
def find(model: nn.Module, objects: Objects, args) -> list[dict]:
    """Detections in all images, in COCO's result format, of all processes, on rank 0."""
    from pycocotools import mask as rle

    rank, world, device = processes.place()
    own, found = finetune.share(len(objects)), []
    loader = torch.utils.data.DataLoader(
        finetune.Whole(objects, own), batch_size=None, num_workers=args.workers, worker_init_fn=processes.deaf
    )
    model.eval()
    for image, image_id in files.bar(iterable=loader, desc="detecting", total=len(own), disable=rank > 0):
        (out,) = model([image.to(device) / 255])
        masks = (out["masks"][:, 0] > 0.5).byte().cpu().numpy()
        boxes = torch.cat([out["boxes"][:, :2], out["boxes"][:, 2:] - out["boxes"][:, :2]], 1)
        for box, label, score, mask in zip(
            boxes.tolist(), out["labels"].tolist(), out["scores"].tolist(), masks, strict=True
        ):
            segmentation = rle.encode(np.asfortranarray(mask))
            segmentation["counts"] = segmentation["counts"].decode()
            one = {"image_id": int(image_id), "category_id": objects.categories[label - 1], "score": score}
            found.append(one | {"bbox": box, "segmentation": segmentation})
    if world > 1:
        every = [None] * world if rank == 0 else None
        dist.gather_object(found, every)
        found = [one for some in every or [] for one in some]
    return found


def average_precision(coco, found: list[dict], kind: str) -> tuple[dict[str, float], str]:
    """COCO's AP, AP50 and AP75 in percent, and pycocotools' summary. kind: "bbox" or "segm"."""
    from pycocotools.cocoeval import COCOeval

    if not found:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}, "no detections"
    other = {"bbox": "segmentation", "segm": "bbox"}[kind]
    with contextlib.redirect_stdout(io.StringIO()):
        results = coco.loadRes([{key: x for key, x in one.items() if key != other} for one in found])
        scores = COCOeval(coco, results, kind)
        scores.evaluate()
        scores.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as summary:
        scores.summarize()
    return {name: 100 * float(scores.stats[i]) for i, name in enumerate(("AP", "AP50", "AP75"))}, summary.getvalue()


def instances(masks, shape) -> Tensor:
    """Masks (h, w), the later in front, as one map of ids, -1 where there is none."""
    ids = torch.full(tuple(shape), -1)
    for i, mask in enumerate(masks):
        ids[mask.bool()] = i
    return ids


def picture(objects: Objects, i: int, found: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
    """An image, what was found in it with a score above 0.5, and the truth."""
    image, image_id = objects.whole(i)
    good = [one for one in found if one["image_id"] == image_id and one["score"] > 0.5]
    found = [evaluation.decode(one["segmentation"], *image.shape[1:]) for one in sorted(good, key=lambda f: f["score"])]
    truth = objects.masks(i) if objects.rows[i]["annotations"] else []
    return image, instances(found, image.shape[1:]), instances(truth, image.shape[1:])


def run(args, lr: float, seed: int, data: Objects, val: Objects) -> tuple[dict[str, float] | None, str]:
    """One run: AP of boxes and masks (None: told to stop), and the line about its encoder."""
    rank, world, device = processes.place()
    out = finetune.folder(args, lr, seed)
    encoder, line, fingerprint = finetune.backbone(args, rank)
    torch.manual_seed(seed)
    model = finetune.to_device(mask_rcnn(encoder, len(val.categories), args.size), world, device)
    data.seed = seed

    def loss_of(ddp, batch, device):
        images, targets = zip(*batch, strict=True)
        targets = [{name: x.to(device, non_blocking=True) for name, x in target.items()} for target in targets]
        return sum(ddp([image.to(device, non_blocking=True) / 255 for image in images], targets).values())

    settings = {"size": args.size, "split": args.split, "warmup": args.warmup}
    drops, warmup = (2 / 3, 8 / 9), args.warmup
    if not finetune.fit(model, data, list, loss_of, out, settings, fingerprint, args, lr, seed, drops, warmup):
        return None, line
    found = find(model, val, args)
    if rank > 0:
        return {}, line
    result = {"encoder": line, "lr": lr}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        scores, summary = average_precision(val.coco, found, kind)
        print(f"{out}, {name}:\n{summary}", flush=True)
        result |= {f"{name} {key}": x for key, x in scores.items()}
    evaluation.write_json(out / "detections.json", found)
    evaluation.write_json(out / "result.json", result)
    finetune.strip([picture(val, i, found) for i in range(min(6, len(val)))], out / "masks.png")
    return {name: result[name] for name in ("box AP", "mask AP")}, line


def detect(args) -> int:
    args.epochs = EPOCHS[args.schedule] if args.epochs is None else args.epochs
    finetune.check_flags(args)
    evaluation.check_size(args.size)
    if args.size % 32 or args.warmup < 0:
        raise UsageError(f"--size must be a multiple of 32 and --warmup 0 or more, got {args.size} and {args.warmup}")
    data = Objects(args.data, args.split, args.size)
    val = Objects(args.data, args.val_split, args.size, trains=False)
    if val.categories != data.categories:
        raise UsageError(
            f"{args.split} and {args.val_split} of {args.data} list different categories: mend one of them"
        )
    task = f"COCO {args.val_split}, {len(val)} images, Mask R-CNN" + (f", {args.epochs} epochs" if args.epochs else "")
    more = {
        "images": len(val),
        "epochs": args.epochs,
        "split": args.split,
        "val split": args.val_split,
        "size": args.size,
    }
    theirs = "Table 1, box AP 41.7, mask AP 38.3 (their README)"
    return finetune.sweep(args, lambda lr, seed: run(args, lr, seed, data, val), task, theirs, more)


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, type=Path, help="the folder of train2017, val2017 and annotations")
    finetune.add_flags(p, out="detect", batch_size=64, weight_decay=4e-5, epochs=None, lr=[0.1], seeds=[0])
    p.add_argument("--schedule", default="1x", choices=EPOCHS, help="12 or 24 epochs, unless --epochs (default: 1x)")
    warmup = "steps in which the learning rate rises (default: %(default)s)"
    p.add_argument("--warmup", type=int, default=500, help=warmup)
    p.add_argument("--size", type=int, default=1024, help="longer side of the images (default: %(default)s)")
    p.add_argument("--split", default="train2017", help="to train on (default: %(default)s)")
    p.add_argument("--val-split", default="val2017", help="to evaluate on (default: %(default)s)")
    return p.parse_args(argv)


def main(argv=None):
    processes.run("detect.py", lambda: detect(parse_args(argv)))


if __name__ == "__main__":
    processes.stoppable()
    main()
