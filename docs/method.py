# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # R2O in pictures
#
# R2O learns features of images without labels. In every step it
#
# 1. draws masks on each image, by clustering the features of small regions that are fixed beforehand (sections 1 to 5);
# 2. crops two views of the image, and the masks with them, and trains the features to agree inside each mask between the views
#    (sections 6 to 9).
#
# The number of clusters, K, falls over training, so masks grow from regions to objects (10, 11). The last sections show failures
# (12, 13). The functions of [r2o.py](../r2o.py) make every picture; `make tour` writes this page and its notebook,
# [method.ipynb](method.ipynb), from [method.py](method.py), in five minutes on two cores. The photographs are scikit-image's, and
# the encoder of sections 2 to 8 is [weights/tiny.pth](weights.md#weightstinypth), trained at 64 pixels.
#
# There are two networks: the *online* network is trained; the *target* network, a slow average of it, predicts the masks and
# provides the targets of the loss. Each has an encoder, of which two stages are used, C4 and C5 (strides 16 and 32 in a ResNet,
# 4 and 8 here), followed by a projector, a small MLP. k-NN accuracy is the share of images that the labels of their nearest neighbors
# in feature space classify correctly. BYOL is the method that compares whole views; DetCon compares fixed masks. Tables, figures and A.n are those of
# the paper ([arXiv 2208.11821](https://arxiv.org/abs/2208.11821)), and so are most letters:
#
# | here | code | shape | |
# |---|---|---|---|
# | regions | `regions` | (B, h, w) | for each of B images a coarse map: every pixel has the id of its region |
# | f | `c4`, `c5` | (B, C, H, W) | features of a stage; each of its H W places is a *cell* |
# | p | `p` | (B, R, C) | embeddings of R regions |
# | mu | `mu` | (G, K, C) | centers of the K clusters of each of G groups of images |
# | m | `m` | (B, H, W) | a cluster's id for each cell of C4; the cells of one id are a *mask* |
# | m1, m2 | `weights` | (2B, K, H, W) | the share of each cell of C5 that a mask covers, in view 1 and in view 2 |
# | h, q, z | `pool_pairs()`, `q`, `z` | (2P, …) | features of a mask, its prediction, its projection |
# | tau | `tau` | | how slowly the target network follows |

# %%
import os
import subprocess
import sys
from pathlib import Path

CLONE = ""  # in Colab: the address to clone r2o from
if "google.colab" in sys.modules:
    if not Path("/content/r2o").exists():
        assert CLONE, "set CLONE to the address of the repository"
        subprocess.run(["git", "clone", CLONE, "/content/r2o"], check=True)
        tools = "setuptools", "pybind11", "ninja", "scikit-image", "tqdm"
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *tools], check=True)
    os.chdir("/content/r2o")  # without building the ops: plain PyTorch runs
ROOT = Path.cwd() if Path("r2o.py").exists() else Path.cwd().parent
sys.path.insert(0, str(ROOT))

# %%
import copy
import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Image, display
from matplotlib.patches import Rectangle
from skimage import data, io as files

import r2o
from demo import mean_overlap, predict, scene
from evals.common import calibrate, group_masks
from evals.measures import best_overlap, objects_of
from runtime.loader import network_input
from runtime.pictures import palette, resize_labels
from runtime.report import alarms, health
from runtime.weights import load_encoder

SMALL = "TOUR_SMALL" in os.environ  # for the tests: a training of seconds
SCENES, EPOCHS, BATCH = (16, 4, 16) if SMALL else (1000, 16, 64)
SAFE = [[0, 114, 178], [230, 159, 0], [204, 121, 167], [240, 228, 66], [0, 158, 115], [60, 60, 60]]
plt.rcParams |= {"font.size": 9, "axes.titlesize": 9, "figure.constrained_layout.use": True}
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7"])


def outline(picture, ids, line):
    """A picture (h, w, 3) in [0, 1] with lines between the regions of ids (h, w)."""
    edge = torch.zeros_like(ids, dtype=torch.bool)
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edge[1:] |= ids[1:] != ids[:-1]
    return torch.where(edge[..., None], torch.tensor(line), picture)


def paint(image, ids):
    """Masks over a gray image (3, S, S); up to six in colors that the color-blind tell apart, with lines between them."""
    ids = resize_labels(ids, image.shape[1:])
    few = ids.max() < len(SAFE)
    color = torch.tensor(SAFE)[ids] / 255 if few else palette(ids)
    mixed = 0.85 * color + 0.15 * r2o.gray(image[None] / 255)[0].movedim(0, -1)
    return outline(mixed, ids, [1.0, 1.0, 1.0]) if few else mixed


def draw(pictures, columns=None, side=2.1, labels=()):
    """A grid of (title, image (3, h, w) uint8, colors (h, w, 3) or values (h, w)). labels: of its rows."""
    columns = columns or len(pictures)
    rows = -(-len(pictures) // columns)
    lines = sum(max(t.count("\n") + bool(t) for t, _ in pictures[r * columns :][:columns]) for r in range(rows))
    size = side * columns + 0.2 * bool(labels), (side + 0.05) * rows + 0.22 * lines
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis, (title, picture) in zip(axes.flat, pictures):
        axis.imshow(picture.movedim(0, -1) if len(picture) == 3 else picture, interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, label in zip(axes[:, 0], labels):
        axis.set_ylabel(label)
    return figure, axes


def show(name, figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
    display(Image(file.getvalue(), format="png"), metadata={"filename": f"{name}.png"})


def about(value, quoted, within=0.05):
    """Fail if a number of the text is not what was just computed."""
    assert abs(value - quoted) <= within * abs(quoted), f"the text says {quoted}, now it is {value:.4g}"


def about_training(value, quoted):
    """The same for what differs between processors, and from the tests' short training."""
    SMALL or about(value, quoted, within=0.25)


# %% [markdown]
# ## 1. The prior
#
# Before training, every image is divided once into regions; this division is called the prior. The paper uses about 100 SLIC superpixels, patches of similar
# color:
#
# ```python
# segments = slic(np.asarray(rgb, dtype=np.float32) / 255, n_segments=num_segments, start_label=0)
# names, ids = np.unique(segments[2::4, 2::4], return_inverse=True)
# ```
#
# See [slic_regions](../r2o.py#L54). The code also has a grid ([grid_regions](../r2o.py#L96)), and DetCon's prior, the segments of
# Felzenszwalb and Huttenlocher ([fh_regions](../r2o.py#L76)).

# %%
S, B = 128, 32
names = "coffee.png", "astronaut.png", "chelsea.png", "motorcycle_left.png", "rocket.jpg"
photos = [files.imread(Path(data.__file__).with_name(name))[..., :3] for name in names]
photos = [torch.from_numpy(x.copy()).movedim(-1, 0) for x in photos]
images, rng = [r2o.resize(x, S) for x in photos], np.random.default_rng(1)
while len(images) < B:  # the rest of a group: crops of these photographs
    photo = photos[len(images) % len(photos)]
    top, left, h, w = r2o.draw_crop(rng, *photo.shape[1:])
    if 3 * h * w > photo[0].numel():
        images.append(r2o.resize(photo[:, top : top + h, left : left + w], S))
images = torch.stack(images)  # (B, 3, S, S)
regions = torch.stack([r2o.slic_regions(x, 100, S // 4) for x in images])  # (B, h, w)
priors = {"SLIC": regions[0], "grid": r2o.grid_regions(10, S // 4)}
priors["Felzenszwalb, Huttenlocher"] = r2o.fh_regions(r2o.resize(photos[0], 224), S // 4)


def unexplained(image, ids):
    """Variance of color inside regions, in percent of the image's."""
    x = F.interpolate(image[None].float(), ids.shape, mode="area")  # (1, 3, h, w)
    p, area = r2o.region_pool(x, ids[None], 256)
    between = (area[0] * (p[0] - x.mean((2, 3))).square().sum(1)).sum() / area.sum()
    return 100 - 100 * float(between / x.var((2, 3), correction=0).sum())


pictures = [("image\n(3, 128, 128)", images[0])]
for title, ids in priors.items():
    lined = outline(images[0].movedim(0, -1) / 255, resize_labels(ids, (S, S)), [0.0, 0.6, 1.0])
    pictures.append((f"{title}\n{int(ids.max()) + 1} regions", lined))
show("prior", draw(pictures)[0])
about(unexplained(images[0], priors["SLIC"]), 11)
about(unexplained(images[0], priors["grid"]), 26)

# %% [markdown]
# *Look at the cup's rim: SLIC's lines follow it, the grid's cross it. Lines are jagged since the map has 32 x 32 pixels. DetCon's
# prior has few, large regions.* Inside SLIC's regions 11 % of the color variance is left, inside the grid's cells 26 %; a region that
# spans two things has an embedding that fits neither. With a 14 x 14 grid the paper loses 2.5 points of k-NN accuracy in A.7 but 7.9 in
# Table 4, for what seems to be the same setting.
#
# ## 2. Region embeddings
#
# The target network turns the image into C4. The embedding of region i is the mean of the features f_c of cells c, weighted by the
# area a_ic of each cell that the region covers:
#
# $$p_i = \frac{\sum_c a_{ic} f_c}{\sum_c a_{ic}}$$
#
# ```python
# p, area = region_pool(c4, regions, num_regions)  # (B, R, C), (B, R)
# length = p.norm(dim=-1, keepdim=True)  # (B, R, 1)
# ```
#
# See [predict_masks](../r2o.py#L106), which then divides p by its length. [region_pool](../r2o_ops.py#L108) is one of four ops in C++
# and CUDA. In a ResNet a cell covers 4 x 4 pixels of the map; here the map has C4's own resolution, so an area is 0 or 1.

# %%
encoder, _ = load_encoder(ROOT / "weights/tiny.pth")
with torch.no_grad():
    c4 = r2o.encode_c4(encoder, r2o.normalize(images))  # (B, C, H, W)
p, area = r2o.region_pool(c4, regions, 256)
f = F.normalize(c4[0].movedim(0, -1), dim=2)  # (H, W, C)
components = torch.linalg.svd(f.flatten(0, 1) - f.mean((0, 1)), full_matrices=False)[2][:3].T
low, high = (f.flatten(0, 1) @ components).quantile(torch.tensor([0.02, 0.98]), dim=0)
of_cells, of_regions = (((x @ components - low) / (high - low)).clamp(0, 1) for x in (f, F.normalize(p[0], dim=1)))
count = int((area[0] > 0).sum())
pictures = [("image\n(3, 128, 128)", images[0]), (f"C4, three components of\n{tuple(c4[0].shape)}", of_cells)]
show("embeddings", draw([*pictures, (f"p, the same components of\n({count}, 64)", of_regions[regions[0].long()])])[0])
about(32 * 32 / count, 13)

# %% [markdown]
# *The 64 channels reduced to three by PCA and shown as red, green and blue: similar colors are similar features. Right: one color per
# region.* Without regions, K-means would get single cells: 13 times as many points, and noisier ones.
#
# ## 3. K-means
#
# The embeddings of all regions of 32 images together (section 4) are divided into K clusters, so that the sum of squared distances
# from their centers is small:
#
# $$\min_{\mu} \sum_i \min_k \lVert p_i - \mu_k \rVert^2$$
#
# m holds the id of the center nearest to each C4 cell's features x, normalized to unit length as p is. Since
# |x - mu|² = |x|² - 2 (x mu - |mu|² / 2), this is the center with the largest score:
#
# ```python
# scores = x @ mu.mT / length - mu.square().sum(-1)[:, None] / 2  # (G, cells, K)
# ```
#
# See [predict_masks](../r2o.py#L106). [kmeans](../r2o_ops.py#L184) starts from centers far apart (greedy k-means++) and iterates at most
# 20 times. Eq. (3) differs a little: [differences.md](differences.md).

# %%
masks = {k: group_masks(c4, regions, k, "pixel", seed=0) for k in (128, 74, 16, 4)}  # each (B, H, W)
pictures = []
for i in (0, 1):
    pictures.append(("image", images[i]))
    pictures += [(f"K = {k}: {len(m[i].unique())} masks", paint(images[i], m[i])) for k, m in masks.items()]
show("kmeans", draw(pictures, columns=5, side=1.8)[0])


def masks_per_image(m):
    return float(r2o.mask_stats(m, int(m.max()) + 1, 1)["masks"])


about(masks_per_image(masks[128]), 74)
about(masks_per_image(masks[4]), 3.2)

# %% [markdown]
# *From left to right K falls, and many small masks become a few large ones. An image contains only some of the K clusters, so it has
# fewer masks than K; a mask need not be connected. Colors do not match across pictures.* At K = 128 an image has 74 masks on average, at
# K = 4 it has 3.2. The paper's k-NN accuracy is 69.0 % with the regions themselves as masks and 75.7 with clusters at a fixed K (Table 4).
#
# ## 4. A group shares its clusters
#
# The 32 images form a group (`kmeans_group`). The paper clusters them together for efficiency; the loss never compares one image with another.
#
# ```python
# p, valid = (in_groups(x, len(uniforms)).flatten(1, 2) for x in (p, valid))  # (G, N, C), (G, N)
# mu, cluster = kmeans_seeded(p, valid, uniforms, iters)  # Eq. (3)
# ```
#
# See [cluster_regions](../r2o.py#L142). N is the number of regions in a group; ids that an image lacks are not `valid`; `uniforms` are
# random numbers for the first centers.

# %%
shared = group_masks(c4, regions, 6, "pixel", seed=0)
alone = torch.cat([group_masks(c4[i : i + 1], regions[i : i + 1], 6, "pixel", seed=0) for i in range(B)])
shown = (0, 5, 1, 2, 3, 4)
pictures = [("", images[i]) for i in shown] + [("", paint(images[i], m[i])) for m in (shared, alone) for i in shown]
show("group", draw(pictures, columns=len(shown), side=1.5, labels=["images", "shared clusters", "each alone"])[0])
about(masks_per_image(shared), 5.1)

# %% [markdown]
# *Six of the 32 images (five photographs and crops of them), K = 6. Look at the rocket: clustered alone (third row), it must have 6
# clusters, which cut up the plain sky; in the group (second row), the sky is one mask. There a color is the same cluster in all
# images.* In the group an image has 5.1 masks on average. The price: what is rare in the group shares a cluster with
# something else.
#
# ## 5. Pixels or regions
#
# Regions decide what is clustered. Which center a cell is assigned to is another question: the nearest to the cell itself, as in the paper
# (`--assign pixel`), or its region's, as in the authors' code (`--assign region`):
#
# ```python
# if assign == "region":
#     return cluster.clamp(min=0).gather(1, regions.flatten(1).long()).view(regions.shape)
# ```

# %%
by_region = group_masks(c4, regions, 6, "region", seed=0)
pictures = [("image", images[0]), ("pixel", paint(images[0], shared[0])), ("region", paint(images[0], by_region[0]))]
show("assign", draw([*pictures, ("cells that differ", shared[0] != by_region[0])])[0])
about(100 * (shared != by_region).float().mean(), 23)

# %% [markdown]
# *One image's masks at K = 6 in the group; yellow cells differ, mostly along outlines.* Over all 32 images 23 % differ. Region masks
# follow the prior's outlines; pixel masks follow the features, each of which has seen pixels on both sides of an outline.
#
# ## 6. Two views, and the mask in each
#
# Two boxes are cropped, resized, mirrored or not, and recolored to make two views. The masks are cropped, resized and mirrored
# alike:
#
# ```python
# m1, m2 = (crop_masks(m, boxes[:, v], flips[:, v], num_clusters, size) for v in (0, 1))  # (B, K, H, W)
# ```
#
# See [masks_in_views](../r2o.py#L192). [crop_masks](../r2o_ops.py#L230) crops and resizes K maps, 1 inside a mask and 0 outside (RoIAlign).


# %%
def make_batch(images, regions, rng):
    """What runtime.loader gives to a step."""
    drawn = [r2o.draw_views(x, x.shape[-1], rng) for x in images]
    views = {key: torch.stack([d[key] for d in drawn]) for key in drawn[0]}
    return {"image": images.movedim(1, -1), "regions": regions, **views}


batch = make_batch(images, regions, np.random.default_rng(59))
_, views = network_input(batch)  # (2B, 3, S, S), the first views then the second
weights, _ = r2o.masks_in_views(masks[4], batch["boxes"], batch["flips"], 4, S // 8)  # (2B, K, H, W)
one = int(weights[[0, B]].sum((2, 3)).amin(0).argsort()[-2])  # of the masks in both views, the second largest
black, white = r2o.normalize(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
visible = ((views - black) / (white - black)).clamp(0, 1)
titles = [f"view {v + 1}{', mirrored' * bool(batch['flips'][0, v])}" for v in (0, 1)]
pictures = [("image and boxes", images[0]), (titles[0], visible[0]), (titles[1], visible[B])]
pictures += [("m, K = 4", paint(images[0], masks[4][0])), ("m1 of a mask", weights[0, one])]
figure, axes = draw([*pictures, ("m2 of the same mask", weights[B, one])], columns=3)
for v in (0, 1):
    x0, y0, x1, y1 = (batch["boxes"][0, v] * S).tolist()
    axes[0, 0].add_patch(Rectangle((x0, y0), x1 - x0 - 1, y1 - y0 - 1, fill=False, edgecolor="wk"[v], linewidth=2.5))
    axes[0, 0].text(x0 + 4, y0 + 12, v + 1, color="kw"[v], backgroundcolor="wk"[v], fontsize=8)
show("views", figure)

# %% [markdown]
# *Follow the mask around the spoon in m. Yellow cells of a view are inside it, violet ones outside, green ones partly inside. A
# piece of it lies in one corner of m but in the other corner of m1: view 1 is mirrored.* If masks were not mirrored too, wrong places
# would be compared.
#
# ## 7. Rows
#
# Only masks that both views see can be compared. P is the number of these pairs (image, mask); each becomes one row in all later steps.
#
# ```python
# in_both = (m1.sum((2, 3)) > 1e-3) & (m2.sum((2, 3)) > 1e-3)
# return torch.cat([m1, m2]), in_both.nonzero()  # on a GPU the host waits here, to learn P
# ```
#
# See the end of [masks_in_views](../r2o.py#L192).

# %%
K = 74
weights, pairs = r2o.masks_in_views(masks[K], batch["boxes"], batch["flips"], K, S // 8)
seen = (weights.sum((2, 3)) > 1e-3).view(2, B, K)
figure, axis = plt.subplots(figsize=(7.6, 3.5))
drawn = axis.imshow(seen.sum(0), cmap=plt.get_cmap("Blues", 3), vmin=-0.5, vmax=2.5, aspect="auto")
figure.colorbar(drawn, ticks=[0, 1, 2], label="views that see the mask")
axis.set(xlabel=f"mask, K = {K}", ylabel="image")
show("rows", figure)
about(100 * len(pairs) / (B * K), 44)
about(100 - 100 * seen.float().mean(), 48)

# %% [markdown]
# *Each square is one mask of one image. Only the dark ones are used, 44 % of all: both views see them.* The authors' code keeps a row
# per view for every square. In this batch 48 % of those rows would be zero vectors, and would enter batch norm's statistics.
#
# ## 8. Features of a mask
#
# h is the mean of C5's features f_c over a mask, weighted by w = m1 or m2:
#
# $$h = \frac{\sum_c w_c f_c}{\sum_c w_c}$$
#
# ```python
# image, cluster = pairs.unbind(1)
# rows = torch.cat([pairs, torch.stack([image + len(c5) // 2, cluster], 1)])  # (2P, 2)
# return F.pad(mask_pool(c5, weights, rows), (0, 0, 0, 0 if len(pairs) else 2))
# ```
#
# See [pool_pairs](../r2o.py#L200), which calls [mask_pool](../r2o_ops.py#L257).

# %%
K, shown = 16, 3
weights, pairs = r2o.masks_in_views(masks[K], batch["boxes"], batch["flips"], K, S // 8)
with torch.no_grad():
    h = r2o.pool_pairs(r2o.encode(encoder, views), weights, pairs)  # (2P, C)
h1, h2 = F.normalize(h - h.mean(0), dim=1).chunk(2)  # of the first views, and of the second


def compared(x1, x2, pairs):
    """Cosines of rows of the first views (P, D) and of the second: (P, P); at pairs of one mask; of two of one image."""
    cosine = F.normalize(x1, dim=1) @ F.normalize(x2, dim=1).T
    same_image, same_mask = pairs[:, :1] == pairs[:, 0], torch.eye(len(pairs), dtype=torch.bool)
    return cosine, cosine[same_mask].mean(), cosine[same_image & ~same_mask].mean()


cosine, same, others = compared(h1, h2, pairs)
of_image = (pairs[:, 0] == shown).nonzero()[:, 0]
n, ids = len(of_image), pairs[of_image, 1].tolist()
pictures = [("image", images[shown]), ("its masks, K = 16", paint(images[shown], masks[K][shown]))]
figure, axes = draw([*pictures, ("cosine of h", cosine[of_image][:, of_image])], side=2.6)
axes[0, 2].images[0].set(cmap="PuOr", clim=(-1, 1))
axes[0, 2].set(xlabel="mask in view 2", ylabel="mask in view 1", xticks=range(n), yticks=range(n))
axes[0, 2].set(xticklabels=ids, yticklabels=ids)
axes[0, 2].tick_params(labelsize=7)
figure.colorbar(axes[0, 2].images[0])
show("pooled", figure)
about(same, 0.52)
assert others < 0.1

# %% [markdown]
# *Right: each square compares a mask in view 1 with a mask in view 2, after subtracting the mean of all h. The diagonal (the same mask)
# should be the most violet; some other pairs are violet too. The axes skip masks that one view does not see. Here one encoder makes
# both h.* Over the 32 images the cosine is 0.52 for the same mask and below 0.1 for two masks of an image. With K = 1 the mask is the whole
# view, h is the usual global mean, and R2O is BYOL (A.10).
#
# ## 9. The loss
#
# The online network theta has one more MLP behind its projector, the predictor: together they turn h into q. The target network xi turns
# its h into z, without gradient. The loss, Eq. (5), sums Eq. (4) over both directions and averages over pairs:
#
# $$\left\lVert \frac{q}{\lVert q \rVert} - \frac{z}{\lVert z \rVert} \right\rVert^2 = 2 - 2 \cos(q, z) \qquad \text{Eq. (4)}$$
#
# Here q and z belong to the same image and mask in different views (`roll` swaps them). In `represent()` of [R2O](../r2o.py#L281):
#
# ```python
# q = self.predictor(self.online["projector"](pool_pairs(c5, weights, pairs)))  # (2P, dim)
# with torch.no_grad():
#     c5 = self.encode(self.target["encoder"], views)
#     z = self.target["projector"](pool_pairs(c5, weights, pairs))  # (2P, dim)
# return byol_loss(q, z.roll(len(pairs), 0)), len(pairs), z
# ```
#
# Then theta takes a step, and xi moves a little towards it, xi <- tau xi + (1 - tau) theta, in `update()` of
# [train.py](../train.py):
#
# ```python
# optimizer.step()
# model.update_target(tau)
# ```
#
# From here on, a small encoder is trained on 1,000 of `make demo`'s scenes of patterned objects for 16 epochs of 15 steps: K is 32 up to
# epoch 2, then falls to 6. The notebook has the loop. The curves are Eq. (4) on held-out scenes, with K = 6 throughout.


# %%
def train(model, images, regions, schedule, tau=None):
    """Yields loss and statistics of every step. tau: if given, instead of the schedule's."""
    optimizer = r2o.LARS([x for x in model.parameters() if x.requires_grad], lr=0)
    rng, generator, order = np.random.default_rng(0), torch.Generator().manual_seed(0), None
    for step in range(schedule.steps):
        k, lr, momentum = schedule(step)
        at = step % schedule.steps_per_epoch * schedule.batch_size
        order = order if at else rng.permutation(len(images))
        chosen = order[at : at + schedule.batch_size]
        batch = make_batch(images[chosen], regions[chosen], rng)
        where = batch["regions"], batch["boxes"], batch["flips"]
        loss, stats = model(*network_input(batch), *where, k, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        model.update_target(momentum if tau is None else tau)
        yield {"loss": loss.item(), "K": k, **{name: float(x) for name, x in stats.items()}}


def make_scenes(count, first):
    """Images (n, 3, 64, 64) uint8, ids of their objects (n, 64, 64), regions (n, 16, 16)."""
    images, truth = (torch.from_numpy(np.stack(x)) for x in zip(*map(scene, range(first, first + count))))
    images = images.movedim(-1, 1)
    return images, truth.long(), torch.stack([r2o.slic_regions(x, 100, 16) for x in images])


@torch.no_grad()
def compare(model, batch, k=6):
    """Losses, Eq. (4), of predictions for the same mask in the other view, and for other masks of the image there."""
    model = copy.deepcopy(model)  # whose statistics of batch norm may change
    m = predict(model.target["encoder"], batch["image"].movedim(-1, 1), batch["regions"], k, "pixel")
    _, views = network_input(batch)
    weights, pairs = r2o.masks_in_views(m, batch["boxes"], batch["flips"], k, views.shape[-1] // 8)
    h, h_target = (
        r2o.pool_pairs(r2o.encode(net["encoder"], views), weights, pairs) for net in (model.online, model.target)
    )
    q, z = model.predictor(model.online["projector"](h)), model.target["projector"](h_target)
    return [2 - 2 * float(x) for x in compared(q.chunk(2)[0], z.chunk(2)[1], pairs)[1:]]


scenes, _, scene_regions = make_scenes(SCENES, first=0)
held_out, truth, held_regions = make_scenes(32 if SMALL else 192, first=10**6)
steps, hold = SCENES // BATCH, round(EPOCHS * 40 / 300)  # of an epoch; epochs
schedule = r2o.Schedule(steps, EPOCHS, BATCH, lr=1, lr_k=0, k_start=32, k_end=6, hold_epochs=hold)
torch.manual_seed(0)
model = r2o.R2O("tiny", hidden=512, dim=64)
untrained = copy.deepcopy(model.target["encoder"])
calibrate(untrained, r2o.normalize(held_out).split(64))
test = make_batch(held_out[:B], held_regions[:B], np.random.default_rng(0))
log, losses, film = [], [compare(model, test)], {0: untrained}
for stats in train(model, scenes, scene_regions, schedule):
    log.append(stats)
    epoch, rest = divmod(len(log), steps)
    if rest == 0:
        losses.append(compare(model, test))
        film[epoch] = copy.deepcopy(model.target["encoder"]).eval()
figure, axis = plt.subplots(figsize=(6, 3))
for values, style, label in zip(zip(*losses), ("-", "--"), ("the same mask", "another mask of the image")):
    axis.plot(values, style, label=label)
axis.set(xlabel="epoch", ylabel="loss, Eq. (4), in the other view", ylim=(0, None))
axis.legend()
show("loss", figure)
about_training(losses[-1][0], 0.68)
about_training(losses[-1][1], 1.33)

# %% [markdown]
# *Look at the gap. In the first epoch both losses fall: every q moves to the average of all z, which fits any mask equally. Then the loss
# for the same mask keeps falling, to 0.68, while that for other masks of the image rises, to 1.33:* to do better than the average, q must
# show which mask it comes from. No term of the loss pushes masks apart.
#
# ## 10. The schedule
#
# Why let K fall? The paper's reason is that it works: k-NN accuracy is 75.7 % with K = 64 throughout, 80.0 with K rising, 85.5 with K
# falling, but 73.8 if it falls from 16 (Table 9). A plausible reason: early features tell which patches look alike, not which form an
# object, so small masks are safe; later features can join patches, and then learn from larger masks.
#
# K is K_0 = 128 up to epoch t_a = 40, then falls along a quarter of a cosine to K_f = 4 at the end, epoch T = 300:
#
# $$K(t) = \left\lfloor K_f + (K_0 - K_f) \cos\left(\frac{\pi}{2} \cdot \frac{t - t_a}{T - t_a}\right) \right\rfloor$$
#
# ```python
# t = min((epoch - hold_epochs) / max(epochs - hold_epochs, 1e-9), 1.0)
# left = 1 - t if schedule == "linear" else math.cos(math.pi / 2 * t)
# return math.floor(k_end + left * (k_start - k_end) + 1e-9)
# ```
#
# See [num_clusters](../r2o.py#L535). The formula that the paper prints, Eq. (A1), ends at K = 103; this one agrees with its Fig. 5.
# [Schedule](../r2o.py#L568) gives K, learning rate and tau of every step.

# %%
paper = r2o.Schedule(steps_per_epoch=1_281_167 // 4096)
ks, rates, taus = np.array([paper(epoch * paper.steps_per_epoch - 1) for epoch in range(1, 301)]).T
figure, axis = plt.subplots(figsize=(6.4, 3))
axis.plot(range(1, 301), ks / 128, label="K / 128", linewidth=2)
axis.plot(range(1, 301), rates / 38.4, "--", label="learning rate / 38.4")
axis.plot(range(1, 301), (taus - 0.99) / 0.01, ":", label="(tau - 0.99) / 0.01")
for epoch in (40, 100, 200, 300):
    axis.text(epoch + 4, ks[epoch - 1] / 128 + 0.03, f"K = {ks[epoch - 1]:.0f}", fontsize=8)
axis.set(xlabel="epoch of 300 of ImageNet", xlim=(0, 330), ylim=(0, 1.12))
axis.legend(loc="center left")
show("schedule", figure)
about(ks[99], 119, within=0)
about(ks[199], 74, within=0)
about(max(rates), 38.4)

# %% [markdown]
# *K and the learning rate are divided by their peaks; tau, 0.99 to 1, is mapped to 0 to 1: the target moves less and less.* K is 119 and 74
# at epochs 100 and 200. The learning rate warms up for three epochs to 38.4. As in the authors' code, it has a factor of K / 16, so it
# falls faster than a cosine; the training of section 9 lacks this factor.
#
# ## 11. Masks over training
#
# The target network's masks of held-out scenes, in the training of section 9:

# %%
columns = {
    "image": held_out,
    "prior": held_regions,
    "untrained\nK = 6": predict(untrained, held_out, held_regions, 6, "pixel"),
}
for epoch in range(0, EPOCHS + 1, EPOCHS // 4):
    k = schedule(max(epoch * steps - 1, 0))[0]
    columns[f"epoch {epoch}\nK = {k}"] = m = predict(film[epoch], held_out, held_regions, k, "pixel")
columns["objects"] = truth
pictures = [("", x[i] if x is held_out else paint(held_out[i], x[i])) for i in (0, 2, 5, 9) for x in columns.values()]
pictures[: len(columns)] = [(title, x) for title, (_, x) in zip(columns, pictures)]
show("film", draw(pictures, columns=len(columns), side=1.1)[0])
about_training(mean_overlap(columns["untrained\nK = 6"], truth), 0.3)
about_training(mean_overlap(m, truth), 0.33)

# %% [markdown]
# *Compare the third column with the second to last: K = 6 before and after training (the fourth is the untrained network at K = 32).
# Objects are patterned, backgrounds are not, and both are light or dark at random. Before, lightness counts as much as pattern; after, one
# mask covers most dotted and checked objects, dark or light. Colors do not match across columns.* Best overlap is the IoU of an object with
# the mask that fits it best; its mean is 0.3 before training and 0.33 after.
#
# ## 12. A collapse
#
# If all z are the same vector, every prediction is right and nothing is learned. The picture has the first four epochs with and without
# a predictor, and with a target that lags behind (tau from 0.99) or equals the online network (tau = 0). Below it is what train.py prints
# after the last epoch of the run with neither predictor nor lag.


# %%
def first_steps(predictor, tau):
    torch.manual_seed(0)
    model = r2o.R2O("tiny", hidden=512, dim=64)
    model.predictor = torch.nn.Identity() if not predictor else model.predictor
    return list(itertools.islice(train(model, scenes, scene_regions, schedule, tau), 4 * steps))


runs = {"predictor, lagging target": log[: 4 * steps], "predictor, tau = 0": first_steps(True, 0.0)}
runs |= {"no predictor, lagging target": first_steps(False, None), "no predictor, tau = 0": first_steps(False, 0.0)}
figure, axes = plt.subplots(1, 2, figsize=(7.6, 2.8))
for axis, name, title in zip(axes, ("loss", "spread"), ("loss, Eq. (5)", "spread of z (0: a point)")):
    for (label, rows), style in zip(runs.items(), ("-", ":", "--", "-.")):
        axis.plot([row[name] for row in rows], style, label=label)
    axis.set(xlabel="step", title=title, ylim=(0, None))
axes[0].legend()
show("collapse", figure)
last = {name: np.mean([row[name] for row in runs["no predictor, tau = 0"][-steps:]]) for name in log[0]}
last |= {"epoch": 4, "K": runs["no predictor, tau = 0"][-1]["K"], "skipped": 0, "unreadable": 0}
print(health(last), *(f"warning: epoch 4: {alarm}" for alarm in alarms(last)), sep="\n")
assert (
    SMALL
    or runs["no predictor, tau = 0"][-1]["spread"]
    < 0.1
    < runs["no predictor, lagging target"][-1]["spread"]
    < 0.6
    < runs["predictor, tau = 0"][-1]["spread"]
)

# %% [markdown]
# *Right: spread is the standard deviation of the normalized z over rows, times the square root of their dimension; it is 1 if they point
# everywhere. Without a predictor it falls: slowly if the target lags, to below 0.1 within 60 steps if it does not. With a predictor it
# stays near 0.8, even at tau = 0. Left: the collapsed run has the lowest loss, so watch the spread.*
#
# ## 13. Where masks fail

# %%
flat = torch.full((1, 3, S, S), 127, dtype=torch.uint8)
frame = predict(encoder, flat, r2o.slic_regions(flat[0], 100, S // 4)[None], 4, "pixel")
pairs_of = [(x, o) for x, ids in zip(m, truth) for o in objects_of(ids)[0]]
sizes, overlaps = np.array([(int(o.sum()), float(best_overlap(x, o[None]))) for x, o in pairs_of]).T
pictures = [("one gray, K = 4", paint(flat[0], frame[0])), ("a dark sky", images[4])]
pictures += [
    ("its masks, K = 16", paint(images[4], masks[16][4])),
    (f"{len(sizes)} objects, K = 6", torch.ones(1, 1, 3)),
]
figure, axes = draw(pictures, side=2.4)
axis = axes[0, 3]
axis.images[0].remove()
axis.scatter(sizes, overlaps, s=6, alpha=0.6)
axis.set(xlabel="area, pixels of 4,096", ylabel="best overlap, IoU", ylim=(0, 1), xlim=(0, None), aspect="auto")
axis.set(xticks=[0, 400, 800], yticks=[0, 0.5, 1])
show("failures", figure)
about_training(overlaps[sizes < 200].mean(), 0.08)
about_training(overlaps[sizes >= 400].mean(), 0.4)

# %% [markdown]
# * **Border cells** (left). A gray image should be one mask, but has strips along its borders: zero padding sets border cells apart, and
#   where nothing else differs they become masks.
# * **One color** (second and third). The sky is cut in two at K = 16: where nothing else differs, lightness and the distance from the border decide.
# * **Small objects** (right; each dot is an object). Mean best overlap is 0.08 for objects under 200 pixels (about 12 cells) and 0.4 for
#   those over 400 pixels. A mask often covers several objects, and then fits the small ones worst.
#
# The paper's own failures are in A.10.
#
# ## Where next
#
# [r2o.py](../r2o.py) has all of this in the same order. [ablations.md](ablations.md) compares variants with one part changed;
# [differences.md](differences.md) lists departures from the paper and its code; [running.md](running.md) trains on your own images.
