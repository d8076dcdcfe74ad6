"""What a run of weeks needs: errors, processes, lists of images, the region cache, loader, checkpoint, report."""

import importlib.util
import sys

if missing := [name for name in ("torch", "torchvision", "tqdm") if not importlib.util.find_spec(name)]:
    print(f"error: {' and '.join(missing)} not installed: pip install {' '.join(missing)}", file=sys.stderr)
    sys.exit(2)
