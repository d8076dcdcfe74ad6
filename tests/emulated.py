"""Every CUDA op beside its reference: `emulated.py ORDERS DEVICE [OP …]`.

test_emulate.py runs it with the emulated r2o_C on the CPU, in several orders of threads; bench/gpu.py on a GPU, under
compute-sanitizer. There the cases are the same, and each op runs ORDERS times, which must give the same bits."""

import ctypes
import sys

import torch
from op_cases import crop_case, kmeans_case, mask_case, pool_case, ragged

import r2o_ops

ops = torch.ops.r2o
half, single, double = torch.float16, torch.float32, torch.float64
torch.set_num_threads(1)


def listed(found) -> list[torch.Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def with_gradient(op):
    """mask_pool and its gradient."""

    def both(features, weights, pairs):
        x = features.detach().clone().requires_grad_()
        h = op(x, weights, pairs)
        h.backward(ragged(h.shape, h.dtype, h.device, 1))
        return h.detach(), x.grad

    return both


def autocast(op):
    """In a region whose products are of half precision, which must not matter."""

    def inside(*args):
        with torch.autocast(args[0].device.type, torch.bfloat16):
            return op(*args)

    return inside


def cases(device: str):
    """(name, op, reference, arguments): ragged and empty shapes, sizes about those of warps and blocks, all dtypes."""
    for i, (B, C, H, W, scale, R, ids, dtype) in enumerate(
        [
            (0, 5, 2, 2, 1, 3, torch.uint8, single),
            (1, 1, 1, 1, 1, 1, torch.int64, double),
            (2, 40, 5, 4, 4, 30, torch.uint8, half),
            (3, 257, 3, 7, 2, 9, torch.int32, torch.bfloat16),
            (1, 300, 6, 6, 1, 5, torch.int16, single),
            (1, 2, 32, 48, 1, 3, torch.uint8, single),  # 48 KB of dynamic shared memory, and a few bytes more
        ]
    ):
        case = pool_case(B, C, H, W, scale, R, ids, dtype, device, i)
        yield "region_pool", ops.region_pool, r2o_ops.region_pool_ref, case
    for i, (G, N, D, K, dtype, iters) in enumerate(
        [
            (0, 8, 3, 2, single, 3),
            (2, 0, 3, 2, single, 3),
            (1, 2, 1, 5, double, 3),  # more clusters than points
            (3, 40, 37, 7, single, 20),
            (2, 30, 130, 21, double, 4),
            (1, 258, 33, 60, single, 2),
            (1, 1030, 4, 3, single, 1),
            (4, 24, 8, 4, single, 0),
            (1, 4100, 2, 9, single, 0),  # eight points a thread in seeding
        ]
    ):
        case = (*kmeans_case(G, N, D, K, dtype, device, i, spread=1000 if D == 4 else 6), iters)  # no equal distances
        yield "kmeans", autocast(ops.kmeans), r2o_ops.kmeans_ref, case
    for i, (B, h, w, K, size) in enumerate([(0, 3, 3, 2, 7), (1, 1, 1, 1, 1), (3, 14, 14, 6, 7), (2, 30, 56, 3, 9)]):
        case = (*crop_case(B, h, w, K, i, device), size)
        yield "crop_masks", ops.crop_masks, r2o_ops.crop_masks_ref, case
    for i, (B, C, H, K, P, dtype) in enumerate(
        [
            (1, 1, 1, 1, 0, single),
            (2, 5, 3, 4, 9, double),
            (3, 257, 2, 3, 270, single),
            (2, 40, 7, 5, 12, torch.bfloat16),
        ]
    ):
        case = mask_case(B, C, H, K, P, dtype, device, i)
        yield "mask_pool", with_gradient(ops.mask_pool), with_gradient(r2o_ops.mask_pool_ref), case


def main(orders: int, device: str, only: list[str]):
    if device == "cpu":
        set_order = ctypes.CDLL(r2o_ops.r2o_C.__file__).r2o_emulate_order
    for name, op, reference, case in cases(device):
        if only and name not in only:
            continue
        cpu = [x.cpu() if isinstance(x, torch.Tensor) else x for x in case]  # not to check PyTorch's kernels as well
        want, first = [x.to(device) for x in listed(reference(*cpu))], None
        for order in range(orders):
            if device == "cpu":
                set_order(order)
            got = listed(op(*case))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, msg=lambda said, name=name: f"{name}: {said}")
            first = first or got
            assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True)), (
                f"{name} depends on the order {order}"
            )
    print("all equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
