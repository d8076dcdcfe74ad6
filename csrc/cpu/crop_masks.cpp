// crop_masks on the CPU. Equivalent to: crop_masks_ref in r2o_ops.py, flip(roi_align(one_hot(m), boxes * w, size)).
//
// RoIAlign is separable, so no one-hot map is built. Each bin visits the window where both taps are non-zero and adds
// their product to the weight of the pixel's cluster. One task per image.
// Floor: one read of the map, one write of the weights.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../common.h"

namespace r2o {

Tensor crop_masks_cpu(const Tensor& masks, const Tensor& boxes, const Tensor& flips, int64_t num_clusters, int64_t size) {
  check_crop_masks(masks, boxes, flips, num_clusters, size);
  const int64_t B = masks.size(0), h = masks.size(1), w = masks.size(2), K = num_clusters, S = size;
  const Tensor ids = masks.to(at::kLong).contiguous(), box = boxes.contiguous(), flip = flips.contiguous();
  const auto* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) TORCH_CHECK(id[i] >= 0 && id[i] < K, "cluster ids must lie in [0, ", K, "), got ", id[i]);

  Tensor weights = at::zeros({B, K, S, S}, boxes.options());
  auto* out = weights.mutable_data_ptr<float>();
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> taps_y(S * h), taps_x(S * w);  // one row per bin
    std::vector<int64_t> left(S), right(S);           // non-zero columns of each bin
    for (int64_t b = begin; b < end; ++b) {
      const auto* xyxy = box.const_data_ptr<float>() + b * 4;
      const bool mirrored = flip.const_data_ptr<bool>()[b];
      std::fill(taps_y.begin(), taps_y.end(), 0.0f);
      std::fill(taps_x.begin(), taps_x.end(), 0.0f);
      for (int64_t i = 0; i < S; ++i) {
        auto* tx = &taps_x[i * w];
        roi_taps(xyxy[1], xyxy[3], S, i, h, &taps_y[i * h]);
        roi_taps(xyxy[0], xyxy[2], S, mirrored ? S - 1 - i : i, w, tx);
        for (left[i] = 0; left[i] < w && tx[left[i]] == 0.0f;) ++left[i];
        for (right[i] = w; right[i] > left[i] && tx[right[i] - 1] == 0.0f;) --right[i];
      }
      for (int64_t i = 0; i < S; ++i)
        for (int64_t y = 0; y < h; ++y) {
          const float ty = taps_y[i * h + y];
          if (ty == 0.0f) continue;
          const auto* row = id + (b * h + y) * w;
          for (int64_t j = 0; j < S; ++j)
            for (int64_t x = left[j]; x < right[j]; ++x) out[((b * K + row[x]) * S + i) * S + j] += ty * taps_x[j * w + x];
        }
    }
  });
  return weights;
}

TORCH_LIBRARY_IMPL(r2o, CPU, m) { m.impl("crop_masks", &crop_masks_cpu); }

}  // namespace r2o
