// region_pool on the GPU. Equivalent to: region_pool_ref in r2o.py.
//
// 1. count_pixels, a thread per pixel: how many pixels of each feature cell belong to each region, in integers, so that
//    the atomics' order does not matter.
// 2. mean_features, a block per (image, region), threads over channels: walks the cells the region touches, in order.
// Floor: one read of the features and of the map, one write of the embeddings. Ids out of range are left out.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../common.h"

namespace r2o {
namespace {

__global__ void count_pixels(const int64_t* ids, int* count, int64_t pixels, int h, int w, int H, int W, int R) {  // count: (B, R, H W)
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;  // in (B, h, w)
  if (i >= pixels || ids[i] < 0 || ids[i] >= R) return;
  const int64_t b = i / (h * w);
  const int y = i / w % h, x = i % w, cell = y / (h / H) * W + x / (w / W);
  atomicAdd(&count[(b * R + ids[i]) * H * W + cell], 1);
}

template <typename T, typename Full>
__global__ void mean_features(const T* features, const int* count, Full* p, Full* area, int C, int W, int cells, int pixels_per_cell,
                              int64_t stride_b, int64_t stride_c, int64_t stride_y, int64_t stride_x, int R) {
  const int64_t row = blockIdx.x;  // b R + r
  const int* n = count + row * cells;
  int total = 0;
  for (int cell = 0; cell < cells; ++cell) total += n[cell];
  if (threadIdx.x == 0) area[row] = static_cast<Full>(total) / pixels_per_cell;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    const T* in = features + row / R * stride_b + c * stride_c;
    Full sum = 0;
    for (int cell = 0; cell < cells; ++cell)
      if (n[cell]) sum += n[cell] * static_cast<Full>(in[cell / W * stride_y + cell % W * stride_x]);
    p[row * C + c] = total ? sum / total : 0;
  }
}

}  // namespace

std::tuple<Tensor, Tensor> region_pool_cuda(const Tensor& features, const Tensor& regions, int64_t num_regions) {
  check_region_pool(features, regions, num_regions);
  const c10::cuda::CUDAGuard guard(features.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t B = features.size(0), C = features.size(1), H = features.size(2), W = features.size(3), R = num_regions;
  const int64_t h = regions.size(1), w = regions.size(2), pixels = B * h * w;
  const auto options = features.options().dtype(full_type(features));
  Tensor p = at::empty({B, R, C}, options), area = at::empty({B, R}, options);
  if (B == 0) return {p, area};
  const Tensor ids = regions.to(at::kLong).contiguous();
  Tensor count = at::zeros({B, R, H * W}, features.options().dtype(at::kInt));
  count_pixels<<<(pixels + 255) / 256, 256, 0, stream>>>(ids.const_data_ptr<int64_t>(), count.mutable_data_ptr<int>(), pixels, h, w, H, W, R);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "region_pool", [&] {
    using Full = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    mean_features<scalar_t, Full><<<B * R, 256, 0, stream>>>(
        features.const_data_ptr<scalar_t>(), count.const_data_ptr<int>(), p.mutable_data_ptr<Full>(), area.mutable_data_ptr<Full>(), C, W,
        H * W, h / H * (w / W), features.stride(0), features.stride(1), features.stride(2), features.stride(3), R);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {p, area};
}

TORCH_LIBRARY_IMPL(r2o, CUDA, m) { m.impl("region_pool", &region_pool_cuda); }

}  // namespace r2o
