// mask_pool and its backward on the CPU. Equivalent to: mask_pool_ref in r2o_ops.py, and its gradient w.r.t. the features.
//
//   forward    h[p] = sum_n w[b_p, k_p, n] f[b_p, :, n] / sum_n w[b_p, k_p, n]       one task per row
//   backward   df[b, :, n] = sum_{p: b_p = b} w[b, k_p, n] dh[p] / sum_n w[b, k_p, n]   one task per image, rows in order
//
// Channels are innermost in both. Cells with zero mask weight are skipped.
// Floor: one read of the features and one write of the rows; the reverse in backward.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "../common.h"
#include "rows.h"

namespace r2o {
namespace {

Tensor checked_pairs(const Tensor& pairs, int64_t B, int64_t K) {
  const Tensor checked = pairs.to(at::kLong).contiguous();
  const auto* row = checked.const_data_ptr<int64_t>();
  for (int64_t p = 0; p < checked.size(0); ++p)
    TORCH_CHECK(row[2 * p] >= 0 && row[2 * p] < B && row[2 * p + 1] >= 0 && row[2 * p + 1] < K, "pairs must lie in [0, ", B, ") x [0, ",
                K, "), got (", row[2 * p], ", ", row[2 * p + 1], ")");
  return checked;
}

// Calls add(n, share) for each non-zero cell n of one mask; share = w[n] / sum(w).
template <typename T, typename F>
void for_each_cell(const T* w, int64_t cells, const F& add) {
  T total = 0;
  for (int64_t n = 0; n < cells; ++n) total += w[n];
  for (int64_t n = 0; n < cells; ++n)
    if (w[n] != 0 && total > 0) add(n, w[n] / total);
}

}  // namespace

Tensor mask_pool_cpu(const Tensor& features, const Tensor& weights, const Tensor& pairs) {
  check_mask_pool(weights, pairs);
  check_mask_pool_features(features, weights);
  const int64_t B = features.size(0), C = features.size(1), K = weights.size(1), cells = features.size(2) * features.size(3);
  const Tensor checked = checked_pairs(pairs, B, K), w = weights.contiguous();
  const Tensor x = features.to(weights.scalar_type()).permute({0, 2, 3, 1}).contiguous();  // (B, H, W, C)
  Tensor h = at::zeros({checked.size(0), C}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "mask_pool", [&] {
    const auto *x_data = x.const_data_ptr<scalar_t>(), *w_data = w.const_data_ptr<scalar_t>();
    const auto* row = checked.const_data_ptr<int64_t>();
    auto* h_data = h.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, checked.size(0), 8, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t b = row[2 * p], k = row[2 * p + 1];
        for_each_cell(w_data + (b * K + k) * cells, cells, [&](int64_t n, scalar_t share) {
          rows<scalar_t>.add(h_data + p * C, x_data + (b * cells + n) * C, share, C);
        });
      }
    });
  });
  return h;
}

Tensor mask_pool_backward_cpu(const Tensor& grad, const Tensor& weights, const Tensor& pairs) {
  check_mask_pool(weights, pairs);
  check_mask_pool_grad(grad, weights, pairs);
  const int64_t B = weights.size(0), K = weights.size(1), H = weights.size(2), W = weights.size(3), cells = H * W, C = grad.size(1);
  const Tensor checked = checked_pairs(pairs, B, K), w = weights.contiguous(), dh = grad.contiguous();
  Tensor df = at::zeros({B, H, W, C}, grad.options());
  const auto* row = checked.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> of_image(B);
  for (int64_t p = 0; p < checked.size(0); ++p) of_image[row[2 * p]].push_back(p);
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "mask_pool_backward", [&] {
    const auto *dh_data = dh.const_data_ptr<scalar_t>(), *w_data = w.const_data_ptr<scalar_t>();
    auto* df_data = df.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (const int64_t p : of_image[b])
          for_each_cell(w_data + (b * K + row[2 * p + 1]) * cells, cells, [&](int64_t n, scalar_t share) {
            rows<scalar_t>.add(df_data + (b * cells + n) * C, dh_data + p * C, share, C);
          });
    });
  });
  return df.permute({0, 3, 1, 2});  // (B, C, H, W), channels_last
}

TORCH_LIBRARY_IMPL(r2o, CPU, m) {
  m.impl("mask_pool", &mask_pool_cpu);
  m.impl("mask_pool_backward", &mask_pool_backward_cpu);
}

}  // namespace r2o
