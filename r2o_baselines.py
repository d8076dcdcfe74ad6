"""What the paper compares R2O with: DetCon_B (Table 1), contrastive R2O (A.4, Table 7), Odin (A.9). Letters as in
r2o.py, which has their losses."""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather  # differentiable

import r2o


class Contrastive(r2o.R2O):
    """R2O with a contrastive objective, on `samples` masks of every view (DetCon, arXiv 2103.10957).

    objective: "detcon": the online network's predictions against the target's projections; "ntxent" (A.4): the online
    network's projections against each other, without predictor, while the target only predicts masks. The keys are
    those of all ranks, so that the loss is that of the global batch.
    """

    def __init__(self, *args, objective: str = "detcon", samples: int = 16, temperature: float = 0.1, **kwargs):
        super().__init__(*args, **kwargs)
        r2o.check_choice("contrastive objective", objective, "detcon", "ntxent")
        self.samples, self.temperature = samples, temperature
        if objective == "ntxent":  # SimCLR's projector ends in batch norm without a shift
            projector, self.predictor = self.online["projector"], None
            projector.append(nn.BatchNorm1d(projector[-1].out_features))[-1].bias.requires_grad_(False)
            self.target = copy.deepcopy(self.online).requires_grad_(False)

    def represent(self, views, m, boxes, flips, K: int, side, generator) -> tuple[Tensor, int, Tensor]:
        """See R2O.represent(). P is the number of sampled masks of a view, with or without a positive."""
        B, (rank, world) = len(m), r2o.rank_and_world()
        generator = generator and generator.clone_state()  # so that micro-batches still cluster as the full batch would
        uniforms = torch.rand(2, world * B, self.samples, dtype=torch.float64, generator=generator)  # of all ranks
        uniforms = uniforms[:, rank * B :][:, :B].flatten(0, 1)  # (2B, samples)

        c5 = self.encode(self.online["encoder"], views)  # (2B, C, H, W)
        with side:
            weights = hard_masks(m, boxes, flips, K, c5.shape[-1])  # (2B, K, H, W)
            ids = r2o.masks_at(weights.sum((2, 3)), r2o.copy_to_device(uniforms, m.device))  # (2B, samples)
            view = torch.arange(2 * B, device=m.device)[:, None].expand_as(ids)
            rows = torch.stack([view, ids], 2).flatten(0, 1)  # (2P, 2)
            names = ((rank * B + view % B) * K + ids).view(2, -1)  # (2, P): of image and mask
        side.join(m, weights, rows, names)
        q = z = self.online["projector"](r2o.mask_pool(c5, weights, rows))  # (2P, dim)
        if self.predictor is not None:
            q = self.predictor(z)
            with torch.no_grad():
                c5 = self.encode(self.target["encoder"], views)
                z = self.target["projector"](r2o.mask_pool(c5, weights, rows))

        q, keys, key_names = q.view(2, -1, q.shape[1]), of_all_ranks(z.view(2, -1, z.shape[1])), of_all_ranks(names)
        losses = [
            r2o.contrastive_loss(q[v], keys[v], keys[o], names[v], key_names[v], key_names[o], self.temperature)
            for v, o in ((0, 1), (1, 0))
        ]
        return torch.cat(losses), names.shape[1], z.detach()


class Odin(Contrastive):
    """Odin (A.9; arXiv 2203.08777): masks by K-means of each image's own features, from a second EMA network that sees
    the crop that spans both views (spanning_crop()); DetCon's loss. Use the prior "grid" and kmeans_group 1.

    discovery_tau: momentum of the second network. Neither it nor K could be looked up: the paper's full text was not
    available.
    """

    def __init__(self, *args, discovery_tau: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.discovery_tau = discovery_tau
        self.discovery = copy.deepcopy(self.target["encoder"])

    @torch.no_grad()
    def update_target(self, tau: float):
        super().update_target(tau)
        online = list(self.online["encoder"].parameters())
        torch._foreach_lerp_(list(self.discovery.parameters()), online, 1 - self.discovery_tau)

    @property
    def mask_encoder(self) -> nn.Module:
        return self.discovery


def spanning_crop(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest crop of an image (3, h, w) that holds both views, and their boxes (2, 4) in it, xyxy in [0, 1]."""
    h, w = image.shape[1:]
    whole = torch.tensor([w, h, w, h])
    pixels = (boxes * whole).round().long()  # views begin and end at pixels
    (left, top), (right, bottom) = pixels[:, :2].amin(0).tolist(), pixels[:, 2:].amax(0).tolist()
    corner, size = torch.tensor([left, top] * 2), torch.tensor([right - left, bottom - top] * 2)
    return image[:, top:bottom, left:right], (pixels - corner) / size


def hard_masks(m: Tensor, boxes: Tensor, flips: Tensor, num_clusters: int, size: int) -> Tensor:
    """The weights of masks_in_views(), made hard: a cell belongs to the mask that covers most of it. Returns
    (2B, K, size, size) of 0 and 1. differs: DetCon averages over the cells of a cropped map, here RoIAlign does."""
    soft = torch.cat([r2o.crop_masks(m, boxes[:, v], flips[:, v], num_clusters, size) for v in (0, 1)])
    return F.one_hot(soft.argmax(1), num_clusters).permute(0, 3, 1, 2).float()


def of_all_ranks(x: Tensor) -> Tensor:
    """(2, P, …) -> (2, P of all ranks, …), with gradient."""
    return torch.cat(all_gather(x.contiguous()), 1) if dist.is_initialized() else x
