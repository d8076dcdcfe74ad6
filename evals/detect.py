"""Object detection and instance segmentation by a fine-tuned Mask R-CNN with FPN (Tables 1, 6; A.2), on COCO or your
own images.

    torchrun --nproc_per_node=8 -m evals.detect --ckpt out/r2o.pth --data /coco      # 1x: 12 epochs
    torchrun --nproc_per_node=8 -m evals.detect --ckpt out/r2o.pth --data /coco --schedule 2x      # 24
    python -m evals.detect --ckpt out/r2o.pth --data train train.json val val.json --size 512 --batch-size 4 --lr 0.01

--data holds train2017, val2017 and annotations/instances_{train,val}2017.json; or it is four paths: the images and the
JSON, in COCO's instances format, to train on, then those to evaluate on. Images are mirrored, scaled so that
their longer side has 0.8 to 1.25 times 1024 pixels, and cropped or padded to 1024 x 1024; for evaluation, scaled to
1024 and padded. Box and mask AP are computed by pycocotools. Rerun the same command to resume.
"""

import contextlib
import hashlib
import io
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import MultiScaleRoIAlign, box_convert

import r2o
from evals import finetune
from evals.coco import decode, load_coco
from evals.truth import readable
from evals.vitdet import SimpleFPN, adamw, set_drop_path
from r2o_vit import ViT
from runtime import cli, distributed
from runtime.cli import natural, need, side
from runtime.images import PackedList, read_image
from runtime.storage import write_json

EPOCHS = {"1x": 12, "2x": 24}
COCO = 5_000, 80, 117_266  # images of val2017, categories, images of train2017 with objects that are not crowds
PAPER = {
    "1x": "Table 1: box AP 41.7, mask AP 38.3 (± 0.02, 0.07, Table 6)",
    "2x": "Table 1: box AP 43.0, mask AP 39.3",
}
VIT = "Table 8, after ImageNet-100: box AP 40.5, mask AP 36.6; MAE 34.8, 31.7"


def parse_args(argv):
    p = cli.Parser(__doc__)
    data = "folder with train2017, val2017, annotations; or 4 paths: images and JSON to train on, then to evaluate on"
    p.add_argument("--data", required=True, nargs="+", type=Path, help=data)
    finetune.add_flags(p, out="detect", batch_size=32, weight_decay=None, epochs=None, lr=None, seeds=[0, 1, 2])
    p.add_argument("--schedule", default="1x", choices=EPOCHS, help="12 or 24 epochs, unless --epochs is given")
    warmup = "steps in which the learning rate rises (default: 1000, or a tenth of all steps if that is less)"
    p.add_argument("--warmup", type=natural, help=warmup)
    p.add_argument("--size", type=side, default=1024, help="longer side of the images, a multiple of 32")
    p.add_argument("--split", default="train2017", help="split to train on")
    p.add_argument("--val-split", default="val2017", help="split to evaluate on")
    args = p.parse_args(argv)
    what = "one path, COCO's folder, or four, IMAGES JSON IMAGES JSON: first to train on, then to evaluate on"
    need(len(args.data) in (1, 4), f"--data takes {what}; got {len(args.data)}")
    if len(args.data) == 1:
        root, splits = args.data[0], (args.split, args.val_split)
        files = [(root / s, root / "annotations" / f"instances_{s}.json") for s in splits]
        args.data = [path for pair in files for path in pair]
    return args


def feature_pyramid(encoder: nn.Module) -> nn.Module:
    if isinstance(encoder, ViT):
        set_drop_path(encoder, 0.2)
        return SimpleFPN(encoder)
    widths = [r2o.channels(getattr(encoder, f"layer{i}")) for i in (1, 2, 3, 4)]
    levels = {f"layer{i + 1}": str(i) for i in range(4)}
    return BackboneWithFPN(encoder, levels, widths, 256, norm_layer=nn.BatchNorm2d)


def mask_rcnn(encoder: nn.Module, classes: int, size: int) -> MaskRCNN:
    """torchvision's, with trained batch norm in backbone, FPN and mask head, and Detectron2's settings where it has
    them; the box head is two fully connected layers, as in the authors' config. classes: without the background."""
    head = MaskRCNNHeads(256, (256,) * 4, 1, norm_layer=nn.BatchNorm2d)
    pools = [MultiScaleRoIAlign(["0", "1", "2", "3"], side, sampling_ratio=0) for side in (7, 14)]  # 0: adaptive
    settings = {"box_roi_pool": pools[0], "mask_roi_pool": pools[1], "rpn_post_nms_top_n_train": 1000}
    sides = {"min_size": size, "max_size": size, "size_divisible": size}
    net = MaskRCNN(feature_pyramid(encoder), classes + 1, mask_head=head, **settings, **sides)
    # torchvision's RoIAlign infers each level's scale from the first image it sees, before padding, and keeps it; for a
    # flat image that is wrong by a factor of 2. So show it a square one first.
    with torch.no_grad():
        levels = net.backbone.eval()(torch.zeros(1, 3, size, size))
        for pool in (net.roi_heads.box_roi_pool, net.roi_heads.mask_roi_pool):
            pool(levels, [torch.zeros(1, 4)], [(size, size)])
    return net.train()


class Objects(Dataset):
    """COCO's images with their objects. [i]: the unchanged image and its id. [epoch, i], for training: (image (3, S, S)
    uint8, Mask R-CNN's target), of images with objects that are not crowds; set `seed` first."""

    def __init__(self, images: Path, file: Path, size: int, trains: bool = True):
        coco, rows = load_coco(images, file)
        need(all(isinstance(row["id"], int) for row in rows), f"the image ids in {file} are no integers: number them")
        self.size, self.seed = size, 0
        self.names = {category: coco.cats[category].get("name", "") for category in sorted(coco.cats)}
        self.categories = [*self.names]  # label i + 1 is categories[i]
        self.label = {category: i + 1 for i, category in enumerate(self.categories)}
        if trains:
            rows = [row | {"annotations": [a for a in row["annotations"] if not a["iscrowd"]]} for row in rows]
            rows = [row for row in rows if row["annotations"]]
        self.rows = PackedList(map(pickle.dumps, rows))
        self.coco = None if trains else coco  # millions of objects, which training workers would gradually copy

    def __len__(self):
        return len(self.rows)

    def row(self, i: int) -> dict:
        return pickle.loads(self.rows[i])

    def whole(self, i: int) -> tuple[Tensor, int]:
        row = self.row(i)
        image = readable(read_image, row["path"])
        (h, w), same = image.shape[1:], tuple(image.shape[1:]) == (row["height"], row["width"])
        sizes = f"{w} x {h} pixels, its annotations {row['width']} x {row['height']}"
        need(same, f"{row['path']} is {sizes}: expected the image that was annotated")
        return image, row["id"]

    def masks(self, i: int) -> Tensor:
        """The masks of all objects of an image: (n, h, w) uint8."""
        row = self.row(i)
        return torch.stack([decode(a["segmentation"], row["height"], row["width"]) for a in row["annotations"]])

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int | dict[str, Tensor]]:
        if isinstance(key, int):
            return self.whole(key)
        epoch, i = map(int, key)
        image, _ = self.whole(i)
        annotations, (h, w) = self.row(i)["annotations"], image.shape[1:]
        rng = np.random.default_rng([self.seed, epoch, i])
        scale = rng.uniform(0.8, 1.25) * self.size / max(h, w)
        shape = max(1, round(scale * h)), max(1, round(scale * w))
        boxes = box_convert(torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32), "xywh", "xyxy")
        sample = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(h, w)),
            "labels": torch.tensor([self.label[a["category_id"]] for a in annotations]),
            "masks": tv_tensors.Mask(self.masks(i)),
        }
        sample = {n: x.as_subclass(Tensor) for n, x in finetune.jitter(rng, sample, shape, self.size).items()}
        image, present = sample.pop("image"), sample["masks"].flatten(1).bool().any(1)  # in some boxes no pixel
        return image, {name: x[present] for name, x in sample.items()}


def detection_loss(ddp: nn.Module, batch) -> Tensor:
    """The sum of Mask R-CNN's losses."""
    device = distributed.place().device
    images, targets = zip(*batch, strict=True)
    targets = [{name: x.to(device, non_blocking=True) for name, x in target.items()} for target in targets]
    return sum(ddp([image.to(device, non_blocking=True) / 255 for image in images], targets).values())


@torch.no_grad()
def find_objects(model: nn.Module, objects: Objects, workers: int) -> list[dict]:
    """Detections in all images, in COCO's result format; those of all ranks on rank 0."""
    from pycocotools import mask as rle

    rank, world, device = distributed.place()
    found = []
    model.eval()
    for image, image_id in finetune.eval_samples(objects, workers, "detecting"):
        (out,) = model([image.to(device) / 255])
        masks = (out["masks"][:, 0] > 0.5).byte().cpu().numpy()
        boxes = box_convert(out["boxes"], "xyxy", "xywh").tolist()
        for box, label, score, mask in zip(boxes, out["labels"].tolist(), out["scores"].tolist(), masks, strict=True):
            segmentation = rle.encode(np.asfortranarray(mask))
            segmentation["counts"] = segmentation["counts"].decode()
            one = {"image_id": int(image_id), "category_id": objects.categories[label - 1], "score": score}
            found.append(one | {"bbox": box, "segmentation": segmentation})
    if world > 1:
        every = [None] * world if rank == 0 else None
        dist.gather_object(found, every)
        return [one for some in every or [] for one in some]
    return found


def average_precision(coco, found: list[dict], kind: str) -> tuple[dict[str, float], str]:
    """COCO's AP, AP50 and AP75 in percent, and pycocotools' summary. kind: "bbox" or "segm"."""
    from pycocotools.cocoeval import COCOeval

    if not found:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}, "no detections: perhaps too few steps"
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
    """Masks (h, w), later ones in front, as one map of ids, -1 where there is none."""
    ids = torch.full(tuple(shape), -1)
    for i, mask in enumerate(masks):
        ids[mask.bool()] = i
    return ids


def picture(objects: Objects, i: int, found: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
    """An image, what was found in it with a score above 0.5, and the truth."""
    image, image_id = objects.whole(i)
    good = [one for one in found if one["image_id"] == image_id and one["score"] > 0.5]
    found = [decode(one["segmentation"], *image.shape[1:]) for one in sorted(good, key=lambda one: one["score"])]
    truth = objects.masks(i) if objects.row(i)["annotations"] else []
    return image, instances(found, image.shape[1:]), instances(truth, image.shape[1:])


def train_and_measure(run: finetune.Run, data: Objects, val: Objects) -> tuple[dict, str]:
    """One run: AP of boxes and masks in percent (on rank 0), and the line about its encoder."""
    args = run.args
    encoder, line, fingerprint = finetune.training_encoder(args)
    torch.manual_seed(run.seed)
    model = distributed.to_device(mask_rcnn(encoder, len(val.categories), args.size))
    data.seed = run.seed
    vit = encoder.arch == "vit_b"
    drops, optimizer_of = ((9 / 12, 11 / 12), adamw) if vit else ((2 / 3, 8 / 9), finetune.sgd)  # A.5, A.2
    finetune.fit(run, model, fingerprint, data, detection_loss, drops, args.warmup, list, optimizer_of=optimizer_of)
    model.transform.size_divisible = 32  # evaluation resizes, and pads no further than the strides need
    found = find_objects(model, val, args.workers)
    if distributed.place().rank > 0:
        return {}, line
    result = {"encoder": line, "lr": run.lr}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        scores, summary = average_precision(val.coco, found, kind)
        print(f"{run.out}, {name}:\n{summary}", flush=True)
        result |= {f"{name} {key}": x for key, x in scores.items()}
    write_json(run.out / "detections.json", found)
    write_json(run.out / "result.json", result)
    finetune.save_strip([picture(val, i, found) for i in range(min(6, len(val)))], run.out / "masks.png")
    return {name: result[name] for name in ("box AP", "mask AP")}, line


def detect(args) -> int:
    images, file, val_images, val_file = args.data
    data, val = Objects(images, file, args.size), Objects(val_images, val_file, args.size, trains=False)
    same = val.names.items() <= data.names.items()
    need(same, f"{val_file} lists categories that {file} lacks or names otherwise: correct one of them")
    need(len(data), f"{file} has no objects to train on that are not crowds")
    sizes = len(val), len(val.categories), len(data)
    val.categories = data.categories  # the evaluation images may have fewer
    vit = finetune.arch_of(args) == "vit_b"
    rates = ([3e-4], [3e-4]) if vit else ([0.1], [0.003, 0.1, 0.3])
    finetune.recipe(args, *rates, epochs=EPOCHS[args.schedule])
    args.weight_decay = (0.1 if vit else 4e-5) if args.weight_decay is None else args.weight_decay
    steps = finetune.steps_of(vars(args), len(data))
    args.warmup = min(1000, steps // 10) if args.warmup is None and args.epochs != 0 else args.warmup
    task = f"{f'COCO {args.val_split}' if sizes[:2] == COCO[:2] else val_file}, {len(val)} images, Mask R-CNN"
    task += f", {args.epochs} epochs" if args.epochs else ""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    settings = {"data": digest, "size": args.size, "split": args.split, "warmup": args.warmup}
    more = {"images": len(val), "training images": len(data), "val split": args.val_split, "epochs": args.epochs}
    more |= settings
    measured = partial(train_and_measure, data=data, val=val)
    paper = PAPER[args.schedule] if not vit else VIT if args.schedule == "1x" else "none for 2x"
    return finetune.sweep(args, settings, measured, task, paper, sizes == COCO, more)


def main(argv=None):
    with distributed.StopSignals():
        cli.run("evals.detect", lambda: detect(parse_args(argv)))


if __name__ == "__main__":
    main()
