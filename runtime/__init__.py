"""What a run of weeks needs: errors, processes, lists of images, the region cache, loader, checkpoint, report."""

import importlib.util
import sys

if not importlib.util.find_spec(
    "tqdm"
):  # all else comes with torch and torchvision, or is looked for when it is needed
    print("error: the package tqdm is not installed: pip install tqdm", file=sys.stderr)
    sys.exit(2)
