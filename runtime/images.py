"""Image files: reading them, and lists of millions of them."""

import codecs
import errno
import hashlib
import io
import os
import struct
import warnings
from array import array
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as TF

from runtime.cli import UsageError, need

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".gif", b".bmp", b".tif", b".tiff", b".ppm", b".pgm")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it warns at half of read_image()'s limit
DAMAGE = (ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)  # Pillow's, besides OSError


def read_image(path: str | Path) -> Tensor:
    """Any image file as uint8 RGB (3, h, w), EXIF applied; an animation's first frame. Raises OSError if it is damaged
    or has more than 179 million pixels, Pillow's limit."""
    data = Path(path).read_bytes()  # opened once: a network disk may take long for each
    try:
        with Image.open(io.BytesIO(data)) as file:
            # torchvision crashes on damaged GIFs (pytorch/vision issue 9551), and ignores a WebP's orientation.
            if file.format not in ("GIF", "WEBP"):
                try:
                    code = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    image = decode_image(code, ImageReadMode.RGB, apply_exif_orientation=True)
                    return image if image.dtype == torch.uint8 else (image.int() // 257).to(torch.uint8)  # 16-bit PNG
                except RuntimeError:  # a format that torchvision does not read (BMP, TIFF, …), or damaged
                    pass
            if file.mode[0] in "IF":
                raise OSError(f"{file.mode} pixels: save it with 8 bits a channel")
            return TF.pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))
    except UnidentifiedImageError:
        raise OSError("not an image, or of an unknown format") from None
    except DAMAGE as e:
        raise OSError(f"{type(e).__name__}: {e}") from None


class PackedList:
    """An immutable list of byte strings, kept as one string and the end of each. Forked workers share its memory:
    unlike reading a list of millions of objects, reading it writes no reference counts."""

    def __init__(self, items):
        text, ends = bytearray(), array("q", [0])
        for item in items:
            text += item
            ends.append(len(text))
        self._text, self._ends = bytes(text), np.array(ends)

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._text[self._ends[i] : self._ends[i + 1]]


class ImageList(PackedList):
    """Relative paths of the images below `root`. names_hash identifies the names, fingerprint names and sizes."""

    def __init__(self, root: Path, files):
        """files: (relative path, size in bytes), in the order of the list."""
        self.root, sizes = root, array("q")

        def names():
            for name, size in files:
                sizes.append(size)
                yield name

        super().__init__(names())
        digest = hashlib.sha256(self._text)
        digest.update(self._ends)
        self.names_hash = digest.hexdigest()[:16]
        digest.update(sizes)
        self.fingerprint = digest.hexdigest()[:16]

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self[i]))


def list_images(folder: str | Path, subset: str | Path | None = None, train: bool = True) -> ImageList:
    """All images below `folder`, folder by folder in byte order. train: use folder/train if it exists.

    subset: a text file that selects some of them, one per line: a folder ("n01440764"), a file in it
    ("n01440764/1.JPEG"), or a bare file name ("n01440764_1.JPEG"). Raises UsageError if there are none.
    """
    root = Path(folder)
    if not root.is_dir():
        problem = f"not a folder: {folder}" if root.exists() else f"no such folder: {folder}"
        raise UsageError(f"{problem}; expected a folder of images, flat or nested")
    root = root / "train" if train and (root / "train").is_dir() else root
    wanted = read_subset(subset) if subset else None
    found = set()  # of wanted
    images = ImageList(root, _scan(os.fsencode(root), b"", set(), wanted, found, wanted is None))
    if wanted and (missing := sorted(wanted - found)):
        first = f"the first: {os.fsdecode(missing[0])}; expected folders or files below it"
        raise UsageError(f"{len(missing)} of the {len(wanted)} lines of {subset} match nothing in {root}, {first}")
    need(len(images), f"no images in {root}; expected files that end in {b' '.join(EXTENSIONS).decode()}")
    return images


def read_subset(path: str | Path) -> set[bytes]:
    """The lines of a --subset file. Raises UsageError if there are none."""
    try:
        text = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
        lines = {line.strip().rstrip(b"/") for line in text.splitlines()} - {b""}
    except OSError as e:
        raise UsageError(f"cannot read --subset {path} ({e.strerror}): expected a text file of names") from None
    need(lines, f"--subset {path} is empty: expected the name of a folder or an image per line")
    return lines


def _scan(folder: bytes, inside: bytes, seen: set, wanted: set | None, found: set, take: bool):
    """Yield (relative path, size) of the images in `folder`, then of those in its subfolders. take: yield all."""
    if (real := os.path.realpath(folder)) in seen:  # a link to a folder that was scanned
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda e: e.name)
    except OSError as e:
        raise UsageError(f"cannot read the folder {os.fsdecode(folder)} ({e.strerror})") from None
    folders = []
    for entry in entries:
        name = entry.name
        try:
            is_folder = entry.is_dir()
        except OSError as e:
            unreadable = f"cannot read {os.fsdecode(entry.path)} ({e.strerror})"
            need(e.errno == errno.ELOOP, unreadable)  # a link to itself is like a dangling one
            is_folder = False
        if is_folder:
            folders.append(entry)
        elif name.lower().endswith(EXTENSIONS) and (entry.is_symlink() or entry.is_file()):
            if wanted is not None and (hits := {inside + name, name} & wanted):
                found.update(hits)
            elif not take:
                continue
            try:
                yield inside + name, entry.stat().st_size
            except OSError:  # a dangling link: unreadable, like other damage
                yield inside + name, -1
    for entry in folders:
        name = inside + entry.name
        hits = () if wanted is None else {name, entry.name} & wanted
        found.update(hits)
        yield from _scan(entry.path, name + b"/", seen, wanted, found, take or bool(hits))
