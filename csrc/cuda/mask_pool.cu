// mask_pool and its backward on the GPU. Equivalent to: mask_pool_ref in r2o_ops.py, and its gradient w.r.t. the features.
//
//   forward    h[p] = sum_n w[b_p, k_p, n] f[b_p, :, n] / sum_n w[b_p, k_p, n]            one block per row
//   backward   df[b, :, n] = sum_{p: b_p = b} w[b, k_p, n] dh[p] / sum_n w[b, k_p, n]     one block per (image, cell)
//
// Each thread handles 8 channels, which are innermost, at a time. One thread sums each output in a fixed order, without
// atomics. For backward, pairs are sorted by image. Out-of-range pairs give zero rows and no gradient.
// Floor: one read of the features and one write of the rows; the reverse in backward. Zero-weight cells are skipped.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include "../common.h"
#include "launch.h"

namespace r2o {
namespace {

constexpr int kThreadChannels = 8, kChunk = kThreads * kThreadChannels;

// features: (B, cells, C); weights: (B, K, cells); pairs: (P, 2); h: (P, C).
template <typename In, typename T>
__global__ void pool(const In* features, const T* weights, const int64_t* pairs, T* h, int64_t B, int64_t K, int C, int cells) {
  const int64_t p = blockIdx.x, b = pairs[2 * p], k = pairs[2 * p + 1];
  const bool inside = b >= 0 && b < B && k >= 0 && k < K;
  const T* w = weights + (b * K + k) * cells;
  T total = 0;
  for (int n = 0; inside && n < cells; ++n) total += w[n];
  for (int start = threadIdx.x; start < C; start += kChunk) {
    T sum[kThreadChannels] = {};
    for (int n = 0; total > 0 && n < cells; ++n) {
      if (w[n] == 0) continue;
      const In* in = features + (b * cells + n) * C;
      for (int u = 0; u < kThreadChannels; ++u)
        if (start + u * kThreads < C) sum[u] += w[n] * static_cast<T>(in[start + u * kThreads]);
    }
    for (int u = 0; u < kThreadChannels; ++u)
      if (start + u * kThreads < C) h[p * C + start + u * kThreads] = total > 0 ? sum[u] / total : 0;
  }
}

// totals: (P), the total weight of each pair's mask; 0 for pairs out of range.
template <typename T>
__global__ void sum_weights(const T* weights, const int64_t* pairs, T* totals, int64_t B, int64_t K, int P, int cells) {
  const int p = blockIdx.x * kThreads + threadIdx.x;
  if (p >= P) return;
  const int64_t b = pairs[2 * p], k = pairs[2 * p + 1];
  T total = 0;
  for (int n = 0; b >= 0 && b < B && k >= 0 && k < K && n < cells; ++n) total += weights[(b * K + k) * cells + n];
  totals[p] = total;
}

// The first of P sorted images that is not below b.
__device__ inline int first_of(const int64_t* images, int P, int64_t b) {
  int low = 0, high = P;
  while (low < high) {
    const int middle = (low + high) / 2;
    images[middle] < b ? low = middle + 1 : high = middle;
  }
  return low;
}

// images: (P), sorted; order: (P), where each was in pairs; df: (B, cells, C)
template <typename T>
__global__ void spread(const T* dh, const T* weights, const int64_t* pairs, const int64_t* images, const int64_t* order, const T* totals, T* df, int P,
                       int64_t K, int C, int cells) {
  const int64_t b = blockIdx.x / cells;
  const int n = blockIdx.x % cells, begin = first_of(images, P, b), end = first_of(images, P, b + 1);
  for (int start = threadIdx.x; start < C; start += kChunk) {
    T sum[kThreadChannels] = {};
    for (int j = begin; j < end; ++j) {
      const int64_t p = order[j];
      if (!(totals[p] > 0)) continue;
      const T share = weights[(b * K + pairs[2 * p + 1]) * cells + n] / totals[p];
      if (share == 0) continue;
      for (int u = 0; u < kThreadChannels; ++u)
        if (start + u * kThreads < C) sum[u] += share * dh[p * C + start + u * kThreads];
    }
    for (int u = 0; u < kThreadChannels; ++u)
      if (start + u * kThreads < C) df[blockIdx.x * static_cast<int64_t>(C) + start + u * kThreads] = sum[u];
  }
}

}  // namespace

Tensor mask_pool_cuda(const Tensor& features, const Tensor& weights, const Tensor& pairs) {
  check_mask_pool(weights, pairs);
  check_mask_pool_features(features, weights);
  const c10::cuda::CUDAGuard guard(features.device());
  const int64_t B = features.size(0), C = features.size(1), cells = features.size(2) * features.size(3), K = weights.size(1), P = pairs.size(0);
  Tensor h = at::empty({P, C}, weights.options());
  if (h.numel() == 0) return h;
  const Tensor x = features.permute({0, 2, 3, 1}).contiguous();  // (B, H, W, C), no copy if channels_last
  const Tensor w = weights.contiguous(), rows = pairs.to(at::kLong).contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "mask_pool", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    pool<scalar_t, T><<<P, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        x.const_data_ptr<scalar_t>(), w.const_data_ptr<T>(), rows.const_data_ptr<int64_t>(), h.mutable_data_ptr<T>(), B, K, C, cells);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return h;
}

Tensor mask_pool_backward_cuda(const Tensor& grad, const Tensor& weights, const Tensor& pairs) {
  check_mask_pool(weights, pairs);
  check_mask_pool_grad(grad, weights, pairs);
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t B = weights.size(0), K = weights.size(1), H = weights.size(2), W = weights.size(3), cells = H * W, P = grad.size(0), C = grad.size(1);
  Tensor df = at::empty({B, H, W, C}, grad.options());
  if (df.numel()) {
    const Tensor dh = grad.contiguous(), w = weights.contiguous(), checked = pairs.to(at::kLong).contiguous();
    const auto sorted = at::sort(checked.select(1, 0), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    const Tensor &images = std::get<0>(sorted), &order = std::get<1>(sorted);
    Tensor totals = at::empty({P}, grad.options());
    const auto* pair = checked.const_data_ptr<int64_t>();
    AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "mask_pool_backward", [&] {
      const auto* w_data = w.const_data_ptr<scalar_t>();
      auto* total = totals.mutable_data_ptr<scalar_t>();
      if (P) sum_weights<scalar_t><<<(P + kThreads - 1) / kThreads, kThreads, 0, stream>>>(w_data, pair, total, B, K, P, cells);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      spread<scalar_t><<<B * cells, kThreads, 0, stream>>>(dh.const_data_ptr<scalar_t>(), w_data, pair, images.const_data_ptr<int64_t>(),
                                                           order.const_data_ptr<int64_t>(), total, df.mutable_data_ptr<scalar_t>(), P, K, C, cells);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return df.permute({0, 3, 1, 2});  // (B, C, H, W), channels_last
}

TORCH_LIBRARY_IMPL(r2o, CUDA, m) {
  m.impl("mask_pool", &mask_pool_cuda);
  m.impl("mask_pool_backward", &mask_pool_backward_cuda);
}

}  // namespace r2o
