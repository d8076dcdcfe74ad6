// region_pool on the CPU. Equivalent to: region_pool_ref in r2o_ops.py.
//
// One task per image, channels innermost. Each feature cell is read once per region that touches it and added to that
// region's row, weighted by the share of its pixels in the region. Sums run in cell order for any number of threads.
// Floor: one read of the features and of the map, one write of the embeddings.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../common.h"
#include "rows.h"

namespace r2o {

std::tuple<Tensor, Tensor> region_pool_cpu(const Tensor& features, const Tensor& regions, int64_t num_regions) {
  check_region_pool(features, regions, num_regions);
  const int64_t B = features.size(0), C = features.size(1), H = features.size(2), W = features.size(3), R = num_regions;
  const int64_t h = regions.size(1), w = regions.size(2), sy = h / H, sx = w / W;
  const Tensor x = features.to(full_type(features)).permute({0, 2, 3, 1}).contiguous();  // (B, H, W, C)
  const Tensor ids = regions.to(at::kLong).contiguous();
  const auto* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) TORCH_CHECK(id[i] >= 0 && id[i] < R, "region ids must lie in [0, ", R, "), got ", id[i]);

  Tensor p = at::empty({B, R, C}, x.options()), area = at::zeros({B, R}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "region_pool", [&] {
    const auto* x_data = x.const_data_ptr<scalar_t>();
    auto *p_data = p.mutable_data_ptr<scalar_t>(), *area_data = area.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> pixels(R, 0);  // of the current cell, per region
      for (int64_t b = begin; b < end; ++b) {
        auto *sums = p_data + b * R * C, *areas = area_data + b * R;
        std::fill_n(sums, R * C, scalar_t(0));
        for (int64_t cell = 0; cell < H * W; ++cell) {
          const auto* corner = id + (b * h + cell / W * sy) * w + cell % W * sx;
          for (int64_t i = 0; i < sy * sx; ++i) ++pixels[corner[i / sx * w + i % sx]];
          for (int64_t i = 0; i < sy * sx; ++i) {
            const int64_t r = corner[i / sx * w + i % sx];
            if (!pixels[r]) continue;  // added at an earlier pixel
            const scalar_t share = static_cast<scalar_t>(pixels[r]) / (sy * sx);
            rows<scalar_t>.add(sums + r * C, x_data + (b * H * W + cell) * C, share, C);
            areas[r] += share;
            pixels[r] = 0;
          }
        }
        for (int64_t r = 0; r < R; ++r)
          if (areas[r] > 0)
            for (int64_t c = 0; c < C; ++c) sums[r * C + c] /= areas[r];
      }
    });
  });
  return {p, area};
}

TORCH_LIBRARY_IMPL(r2o, CPU, m) { m.impl("region_pool", &region_pool_cpu); }

}  // namespace r2o
