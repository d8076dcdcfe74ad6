// crop_masks on the GPU. Equivalent to: crop_masks_ref in r2o_ops.py, flip(roi_align(one_hot(m), boxes * w, size)).
//
// One block per image. The taps along y and x, one row of each per bin, are computed once into shared memory. One thread
// per bin then visits the window where both taps are non-zero and adds their product to the weight of the pixel's
// cluster. Each thread writes only its own bins, so the summation order is fixed. Out-of-range ids are ignored.
// Floor: one read of the map, one write of the weights.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../common.h"
#include "launch.h"

namespace r2o {
namespace {

__global__ void crop(const int64_t* ids, const float* boxes, const bool* flips, float* weights, int h, int w, int K, int size) {
  extern __shared__ float taps[];  // (size, h), then (size, w)
  float *taps_y = taps, *taps_x = taps + size * h;
  const int64_t b = blockIdx.x;
  const float* xyxy = boxes + b * 4;
  for (int i = threadIdx.x; i < size * (h + w); i += blockDim.x) taps[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * size; i += blockDim.x) {
    const int bin = i % size;
    if (i < size)
      roi_taps(xyxy[1], xyxy[3], size, bin, h, taps_y + bin * h);
    else
      roi_taps(xyxy[0], xyxy[2], size, flips[b] ? size - 1 - bin : bin, w, taps_x + bin * w);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < size * size; i += blockDim.x) {
    const float *ty = taps_y + i / size * h, *tx = taps_x + i % size * w;
    int left = 0, right = w;
    while (left < w && tx[left] == 0.0f) ++left;
    while (right > left && tx[right - 1] == 0.0f) --right;
    for (int y = 0; y < h; ++y) {
      if (ty[y] == 0.0f) continue;
      for (int x = left; x < right; ++x) {
        const int64_t id = ids[(b * h + y) * w + x];
        if (id >= 0 && id < K) weights[((b * K + id) * size) * size + i] += ty[y] * tx[x];
      }
    }
  }
}

}  // namespace

Tensor crop_masks_cuda(const Tensor& masks, const Tensor& boxes, const Tensor& flips, int64_t num_clusters, int64_t size) {
  check_crop_masks(masks, boxes, flips, num_clusters, size);
  const c10::cuda::CUDAGuard guard(masks.device());
  const int64_t B = masks.size(0), h = masks.size(1), w = masks.size(2);
  const size_t shared = size * (h + w) * sizeof(float);
  allow_shared(reinterpret_cast<const void*>(crop), shared);
  Tensor weights = at::zeros({B, num_clusters, size, size}, boxes.options());
  if (B == 0 || h == 0 || w == 0) return weights;
  const Tensor ids = masks.to(at::kLong).contiguous(), box = boxes.contiguous(), flip = flips.contiguous();
  crop<<<B, 64, shared, c10::cuda::getCurrentCUDAStream()>>>(ids.const_data_ptr<int64_t>(), box.const_data_ptr<float>(), flip.const_data_ptr<bool>(),
                                                            weights.mutable_data_ptr<float>(), h, w, num_clusters, size);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return weights;
}

TORCH_LIBRARY_IMPL(r2o, CUDA, m) { m.impl("crop_masks", &crop_masks_cuda); }

}  // namespace r2o
