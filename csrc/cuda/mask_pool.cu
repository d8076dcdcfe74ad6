// mask_pool and its backward on the GPU. Equivalent to: mask_pool_ref in r2o.py, and its gradient by the features.
//
//   forward    h[p] = sum_n w[b_p, k_p, n] f[b_p, :, n] / sum_n w[b_p, k_p, n]            a block per row
//   backward   df[b, :, n] = sum_{p: b_p = b} w[b, k_p, n] dh[p] / sum_n w[b, k_p, n]     a block per (image, cell)
//
// Threads run over channels; every output is written by one thread, in a fixed order, without atomics. Pairs out of
// range give zero rows and no gradient. Floor: one read of the features or rows, one write of the other.
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

// The weight of every row's mask, 0 where the pair is out of range; a thread per row.
template <typename T>
__global__ void total_weight(const T* weights, const int64_t* pairs, T* totals, int64_t P, int64_t B, int64_t K, int cells) {
  const int64_t p = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (p >= P) return;
  const int64_t b = pairs[2 * p], k = pairs[2 * p + 1];
  T total = 0;
  if (b >= 0 && b < B && k >= 0 && k < K)
    for (int n = 0; n < cells; ++n) total += weights[(b * K + k) * cells + n];
  totals[p] = total;
}

template <typename In, typename T>
__global__ void pool(const In* features, const T* weights, const int64_t* pairs, const T* totals, T* h, int C, int64_t K, int cells, int W,
                     int64_t stride_b, int64_t stride_c, int64_t stride_y, int64_t stride_x) {
  const int64_t p = blockIdx.x, b = pairs[2 * p], k = pairs[2 * p + 1];
  const T total = totals[p];
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    T sum = 0;
    if (total > 0)
      for (int n = 0; n < cells; ++n) {
        const T w = weights[(b * K + k) * cells + n];
        if (w != 0) sum += w * static_cast<T>(features[b * stride_b + c * stride_c + n / W * stride_y + n % W * stride_x]);
      }
    h[p * C + c] = total > 0 ? sum / total : 0;
  }
}

template <typename T>
__global__ void spread(const T* dh, const T* weights, const int64_t* pairs, const T* totals, T* df, int64_t P, int C, int64_t K, int cells) {
  const int64_t b = blockIdx.x / cells, n = blockIdx.x % cells;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    T sum = 0;
    for (int64_t p = 0; p < P; ++p)
      if (pairs[2 * p] == b && totals[p] > 0) sum += weights[(b * K + pairs[2 * p + 1]) * cells + n] / totals[p] * dh[p * C + c];
    df[blockIdx.x * static_cast<int64_t>(C) + c] = sum;  // (B, H, W, C)
  }
}

template <typename T>
Tensor total_weights(const Tensor& w, const Tensor& rows, cudaStream_t stream) {
  const int64_t P = rows.size(0);
  Tensor totals = at::empty({P}, w.options());
  total_weight<T><<<(P + 127) / 128, 128, 0, stream>>>(w.const_data_ptr<T>(), rows.const_data_ptr<int64_t>(), totals.mutable_data_ptr<T>(), P,
                                                       w.size(0), w.size(1), w.size(2) * w.size(3));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return totals;
}

}  // namespace

Tensor mask_pool_cuda(const Tensor& features, const Tensor& weights, const Tensor& pairs) {
  check_mask_pool(weights, pairs);
  check_mask_pool_features(features, weights);
  const c10::cuda::CUDAGuard guard(features.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t P = pairs.size(0), C = features.size(1), H = features.size(2), W = features.size(3);
  Tensor h = at::empty({P, C}, weights.options());
  if (h.numel() == 0) return h;
  const Tensor w = weights.contiguous(), rows = pairs.to(at::kLong).contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "mask_pool", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const Tensor totals = total_weights<T>(w, rows, stream);
    pool<scalar_t, T><<<P, 256, 0, stream>>>(features.const_data_ptr<scalar_t>(), w.const_data_ptr<T>(), rows.const_data_ptr<int64_t>(),
                                             totals.const_data_ptr<T>(), h.mutable_data_ptr<T>(), C, w.size(1), H * W, W, features.stride(0),
                                             features.stride(1), features.stride(2), features.stride(3));
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return h;
}

Tensor mask_pool_backward_cuda(const Tensor& grad, const Tensor& weights, const Tensor& pairs) {
  check_mask_pool(weights, pairs);
  check_mask_pool_grad(grad, weights, pairs);
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t B = weights.size(0), H = weights.size(2), W = weights.size(3), P = grad.size(0), C = grad.size(1);
  Tensor df = at::zeros({B, H, W, C}, grad.options());
  if (df.numel() && P) {
    const Tensor dh = grad.contiguous(), w = weights.contiguous(), rows = pairs.to(at::kLong).contiguous();
    AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "mask_pool_backward", [&] {
      const Tensor totals = total_weights<scalar_t>(w, rows, stream);
      spread<scalar_t><<<B * H * W, 256, 0, stream>>>(dh.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(), rows.const_data_ptr<int64_t>(),
                                                      totals.const_data_ptr<scalar_t>(), df.mutable_data_ptr<scalar_t>(), P, C, w.size(1), H * W);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return df.permute({0, 3, 1, 2});  // (B, C, H, W), channels last in memory
}

TORCH_LIBRARY_IMPL(r2o, CUDA, m) {
  m.impl("mask_pool", &mask_pool_cuda);
  m.impl("mask_pool_backward", &mask_pool_backward_cuda);
}

}  // namespace r2o
