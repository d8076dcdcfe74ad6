// region_pool on the GPU. Equivalent to: region_pool_ref in r2o_ops.py.
//
// One block per image and 4 regions:
//   1. counts the pixels of each region in each feature cell in shared memory (integers, so the order of the atomics
//      does not matter) and lists the cells that each region touches, in order;
//   2. averages the listed cells, with one warp per region and 256 channels, 8 per lane.
// Features are read with channels innermost. Out-of-range ids are ignored.
// Floor: one read of the features and map, one write of the embeddings. A cell is read once per region that touches it.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common.h"
#include "launch.h"

namespace r2o {
namespace {

constexpr int kRegions = 4, kLaneChannels = 8;

// features: (B, H, W, C); ids: (B, h, w); p: (B, R, C); area: (B, R). Shared memory: 2 kRegions H W ints.
template <typename In, typename Id, typename T>
__global__ void pool(const In* features, const Id* ids, T* p, T* area, int R, int C, int H, int W, int h, int w) {
  extern __shared__ int shared[];
  __shared__ int touched[kRegions];
  const int cells = H * W, tall = h / H, wide = w / W, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int *pixels = shared, *list = shared + kRegions * cells;  // both (kRegions, cells)
  const int blocks = (R + kRegions - 1) / kRegions;  // of an image
  const int64_t b = blockIdx.x / blocks;
  const int first = blockIdx.x % blocks * kRegions, regions = min(kRegions, R - first);
  for (int i = threadIdx.x; i < kRegions * cells; i += kThreads) pixels[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < h * w; i += kThreads) {
    const int64_t r = static_cast<int64_t>(ids[b * h * w + i]) - first;
    if (r >= 0 && r < regions) atomicAdd(&pixels[r * cells + i / w / tall * W + i % w / wide], 1);
  }
  __syncthreads();
  if (warp < regions) {  // one warp per region lists its cells
    int found = 0, total = 0;
    for (int start = 0; start < cells; start += kWarp) {
      const int cell = start + lane, count = cell < cells ? pixels[warp * cells + cell] : 0;
      const unsigned lanes = __ballot_sync(kAllLanes, count > 0);
      if (count) list[warp * cells + found + __popc(lanes & ((1u << lane) - 1))] = cell;
      found += __popc(lanes);
      total += count;
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) total += __shfl_down_sync(kAllLanes, total, offset);
    if (lane == 0) {
      touched[warp] = found;
      area[b * R + first + warp] = static_cast<T>(total) / (tall * wide);
    }
  }
  __syncthreads();
  const int chunk = kWarp * kLaneChannels, chunks = (C + chunk - 1) / chunk;
  for (int task = warp; task < regions * chunks; task += kThreads / kWarp) {
    const int r = task / chunks, start = task % chunks * chunk + lane;
    T sum[kLaneChannels] = {};
    int total = 0;
    for (int j = 0; j < touched[r]; ++j) {
      const int cell = list[r * cells + j], count = pixels[r * cells + cell];
      const In* in = features + (b * cells + cell) * C;
      for (int u = 0; u < kLaneChannels; ++u)
        if (start + u * kWarp < C) sum[u] += count * static_cast<T>(in[start + u * kWarp]);
      total += count;
    }
    for (int u = 0; u < kLaneChannels; ++u)
      if (start + u * kWarp < C) p[(b * R + first + r) * C + start + u * kWarp] = total ? sum[u] / total : 0;
  }
}

}  // namespace

std::tuple<Tensor, Tensor> region_pool_cuda(const Tensor& features, const Tensor& regions, int64_t num_regions) {
  check_region_pool(features, regions, num_regions);
  const c10::cuda::CUDAGuard guard(features.device());
  const int64_t B = features.size(0), C = features.size(1), H = features.size(2), W = features.size(3), R = num_regions;
  const int64_t h = regions.size(1), w = regions.size(2);
  const size_t shared = 2 * kRegions * H * W * sizeof(int);
  const auto options = features.options().dtype(full_type(features));
  Tensor p = at::empty({B, R, C}, options), area = at::empty({B, R}, options);
  if (B == 0) return {p, area};
  const Tensor x = features.permute({0, 2, 3, 1}).contiguous();  // (B, H, W, C), no copy if channels_last
  const Tensor ids = (regions.scalar_type() == at::kByte ? regions : regions.to(at::kLong)).contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "region_pool", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto launch = [&](const auto* id) {
      using Id = std::decay_t<decltype(*id)>;
      allow_shared(reinterpret_cast<const void*>(pool<scalar_t, Id, T>), shared);
      pool<scalar_t, Id, T><<<(R + kRegions - 1) / kRegions * B, kThreads, shared, c10::cuda::getCurrentCUDAStream()>>>(
          x.const_data_ptr<scalar_t>(), id, p.mutable_data_ptr<T>(), area.mutable_data_ptr<T>(), R, C, H, W, h, w);
    };
    ids.scalar_type() == at::kByte ? launch(ids.const_data_ptr<uint8_t>()) : launch(ids.const_data_ptr<int64_t>());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {p, area};
}

TORCH_LIBRARY_IMPL(r2o, CUDA, m) { m.impl("region_pool", &region_pool_cuda); }

}  // namespace r2o
