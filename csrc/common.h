// Shared by the CPU and CUDA ops: input checks and the 1-D arithmetic of RoIAlign.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>

#ifdef __CUDACC__
#define R2O_HD __host__ __device__ __forceinline__
#else
#define R2O_HD inline
#endif

namespace r2o {

using at::Tensor;

inline void check_integers(const Tensor& t, const char* name) {
  TORCH_CHECK(c10::isIntegralType(t.scalar_type(), /*includeBool=*/false), name, " must be integers, got ", t.scalar_type());
}

inline void check_same_device(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.device() == b.device(), "all input must be on one device, got ", a.device(), " and ", b.device());
}

// Maximum points per K-means group on a GPU, which stores all N² dot products.
constexpr int64_t kMaxPoints = 8192;
// Bytes of these products, of several groups, that are kept at a time.
constexpr int64_t kGramBytes = int64_t{2} << 30;

// Compute precision of pooling and clustering: float64 for float64 input, else float32.
inline at::ScalarType full_type(const Tensor& t) {
  TORCH_CHECK(t.is_floating_point(), "expected floating point, got ", t.scalar_type());
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_region_pool(const Tensor& features, const Tensor& regions, int64_t num_regions) {
  TORCH_CHECK(features.dim() == 4 && regions.dim() == 3 && features.size(0) == regions.size(0),
              "features must be (B, C, H, W) and regions (B, h, w), got ", features.sizes(), " and ", regions.sizes());
  const auto H = features.size(2), W = features.size(3), h = regions.size(1), w = regions.size(2);
  TORCH_CHECK(H > 0 && W > 0 && h > 0 && w > 0 && h % H == 0 && w % W == 0,
              "a region map of ", h, " x ", w, " does not tile features of ", H, " x ", W);
  TORCH_CHECK(num_regions > 0, "num_regions must be positive, got ", num_regions);
  check_integers(regions, "region ids");
  check_same_device(features, regions);
}

inline void check_kmeans(const Tensor& points, const Tensor& valid, const Tensor& uniforms, int64_t max_iters) {
  TORCH_CHECK(points.dim() == 3 && (points.scalar_type() == at::kFloat || points.scalar_type() == at::kDouble),
              "points must be float32 or float64 (G, N, D), got ", points.scalar_type(), " ", points.sizes());
  TORCH_CHECK(points.size(2) > 0, "points must have at least one dimension, got ", points.sizes());
  TORCH_CHECK(valid.sizes() == points.sizes().slice(0, 2) && valid.scalar_type() == at::kBool,
              "valid must be bool (G, N), got ", valid.scalar_type(), " ", valid.sizes());
  TORCH_CHECK(uniforms.dim() == 3 && uniforms.size(0) == points.size(0) && uniforms.size(1) > 0 && uniforms.size(2) > 0 &&
                  uniforms.scalar_type() == at::kDouble,
              "uniforms must be float64 (G, K, T), got ", uniforms.scalar_type(), " ", uniforms.sizes());
  TORCH_CHECK(max_iters >= 0, "max_iters must not be negative, got ", max_iters);
  check_same_device(points, valid);
  check_same_device(points, uniforms);
}

inline void check_crop_masks(const Tensor& masks, const Tensor& boxes, const Tensor& flips, int64_t num_clusters, int64_t size) {
  TORCH_CHECK(masks.dim() == 3, "masks must be (B, h, w), got ", masks.sizes());
  const auto B = masks.size(0);
  TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == B && boxes.size(1) == 4 && boxes.scalar_type() == at::kFloat,
              "boxes must be float32 (B, 4), got ", boxes.scalar_type(), " ", boxes.sizes());
  TORCH_CHECK(flips.dim() == 1 && flips.size(0) == B && flips.scalar_type() == at::kBool, "flips must be bool (B,), got ",
              flips.scalar_type(), " ", flips.sizes());
  TORCH_CHECK(num_clusters > 0 && size > 0, "num_clusters and size must be positive, got ", num_clusters, " and ", size);
  check_integers(masks, "cluster ids");
  check_same_device(masks, boxes);
  check_same_device(masks, flips);
}

inline void check_mask_pool(const Tensor& weights, const Tensor& pairs) {
  TORCH_CHECK(weights.dim() == 4 && (weights.scalar_type() == at::kFloat || weights.scalar_type() == at::kDouble),
              "weights must be float32 or float64 (B, K, H, W), got ", weights.scalar_type(), " ", weights.sizes());
  TORCH_CHECK(pairs.dim() == 2 && pairs.size(1) == 2, "pairs must be (P, 2), got ", pairs.sizes());
  check_integers(pairs, "pairs");
  check_same_device(weights, pairs);
}

inline void check_mask_pool_features(const Tensor& features, const Tensor& weights) {
  TORCH_CHECK(features.dim() == 4 && weights.dim() == 4 && features.size(0) == weights.size(0) &&
                  features.sizes().slice(2) == weights.sizes().slice(2),
              "features must be (B, C, H, W) and weights (B, K, H, W), got ", features.sizes(), " and ", weights.sizes());
  TORCH_CHECK(full_type(features) == weights.scalar_type(), "weights must be ", full_type(features), ", got ", weights.scalar_type());
  check_same_device(features, weights);
}

inline void check_mask_pool_grad(const Tensor& grad, const Tensor& weights, const Tensor& pairs) {
  TORCH_CHECK(grad.dim() == 2 && grad.size(0) == pairs.size(0) && grad.scalar_type() == weights.scalar_type(), "grad must be ",
              weights.scalar_type(), " (P, C), got ", grad.scalar_type(), " ", grad.sizes());
  check_same_device(grad, weights);
}

// a * b, never contracted into an FMA. An FMA rounds differently, which could change the result of ceil below.
R2O_HD float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  volatile float rounded = a * b;
  return rounded;
#endif
}

// 1-D RoIAlign (aligned, adaptive sampling). The window [low, high], in fractions of `length` pixels, has `size` bins.
// Adds the weight of each pixel in bin `bin` to taps[0 … length). The weights sum to 1 if the window is inside the map.
// RoIAlign is separable: the 2-D weight of a pixel is the product of its two taps. The sample count is rounded as in
// torchvision.
R2O_HD void roi_taps(float low, float high, int size, int bin, int length, float* taps) {
  const float start = product(low, length) - 0.5f, extent = (product(high, length) - 0.5f) - start, step = extent / size;
  // differs: at most 65,536 samples, which a box of 65,536 bins has; infinite and NaN boxes have no weights
  const float wanted = ceilf(extent / size);
  const int samples = wanted <= 65536.0f ? static_cast<int>(wanted) : 0;
  for (int s = 0; s < samples; ++s) {
    float y = start + bin * step + (s + 0.5f) * step / samples;
    if (y < -1.0f || y > length) continue;
    y = y > 0.0f ? y : 0.0f;
    int below = static_cast<int>(y);
    if (below >= length - 1) y = below = length - 1;
    const float fraction = y - below;
    taps[below] += (1.0f - fraction) / samples;
    if (fraction > 0.0f) taps[below + 1] += fraction / samples;
  }
}

}  // namespace r2o
