// kmeans on the CPU. Equivalent to: kmeans_ref in r2o.py.
//
// Many problems: one thread each. One problem: its matrix products and loops use all threads. Only the valid points are
// kept, side by side. Seeding: per round, one (n, D) x (D, T) product gives the distances to all T candidates. Lloyd:
// one (n, D) x (D, K) product per iteration, until no point changes cluster; sums run over the points in order, each
// thread with its own columns, so that results do not depend on the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "../common.h"

namespace r2o {
namespace {

// The first point at which the running sum of weights passes u times their total; -1 where the total is 0.
int64_t draw(const std::vector<double>& mass, double u) {
  const double total = mass.back(), target = std::min(u * total, std::nextafter(total, 0.0));
  return total > 0 ? std::upper_bound(mass.begin(), mass.end(), target) - mass.begin() : -1;
}

template <typename T>
Tensor seed(const Tensor& x, const T* sq, const double* uniforms, int64_t K, int64_t trials) {
  const int64_t n = x.size(0);
  std::vector<T> distance(n, std::numeric_limits<T>::infinity()), closest(n * trials);
  std::vector<double> mass(n), left(trials);
  Tensor seeds = at::empty({K}, at::kLong), picks = at::empty({trials}, at::kLong);
  auto *chosen = seeds.mutable_data_ptr<int64_t>(), *pick = picks.mutable_data_ptr<int64_t>();
  for (int64_t k = 0; k < K; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) mass[i] = sum += k ? distance[i] : 1;
    for (int64_t t = 0; t < trials; ++t) {
      pick[t] = draw(mass, uniforms[k * trials + t]);
      if (pick[t] < 0) pick[t] = chosen[0];
    }
    const Tensor dots = at::mm(x, x.index_select(0, picks).t());  // (n, T)
    const auto* dot = dots.const_data_ptr<T>();
    std::fill(left.begin(), left.end(), 0.0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t t = 0; t < trials; ++t) {
        const T d = std::max<T>(sq[i] - 2 * (dot[i * trials + t] - sq[pick[t]] / 2), 0);
        closest[i * trials + t] = std::min(d, distance[i]);
        left[t] += closest[i * trials + t];
      }
    const int64_t best = std::min_element(left.begin(), left.end()) - left.begin();
    chosen[k] = pick[best];
    for (int64_t i = 0; i < n; ++i) distance[i] = closest[i * trials + best];
  }
  return x.index_select(0, seeds);  // (K, D)
}

// Sets label[i] to the nearest centre, the lowest id among equals; returns whether any changed.
template <typename T>
bool assign(const Tensor& x, const Tensor& centers, std::vector<int64_t>& label) {
  const int64_t n = x.size(0), K = centers.size(0);
  const Tensor scores = at::addmm(centers.square().sum(1).div(-2), x, centers.t());  // (n, K)
  const auto* score = scores.const_data_ptr<T>();
  std::atomic<bool> changed{false};
  at::parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t best = std::max_element(score + i * K, score + (i + 1) * K) - (score + i * K);
      if (label[i] != best) changed = true;
      label[i] = best;
    }
  });
  return changed;
}

template <typename T>
void update(const Tensor& x, const std::vector<int64_t>& label, Tensor& centers) {
  const int64_t n = x.size(0), D = x.size(1), K = centers.size(0);
  std::vector<int64_t> size(K, 0);
  for (const int64_t k : label) ++size[k];
  const auto* in = x.const_data_ptr<T>();
  auto* center = centers.mutable_data_ptr<T>();
  at::parallel_for(0, D, std::max<int64_t>(64, (1 << 15) / n), [&](int64_t begin, int64_t end) {
    for (int64_t k = 0; k < K; ++k)
      if (size[k]) std::fill(center + k * D + begin, center + k * D + end, T(0));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = begin; d < end; ++d) center[label[i] * D + d] += in[i * D + d];
    for (int64_t k = 0; k < K; ++k)
      if (size[k])
        for (int64_t d = begin; d < end; ++d) center[k * D + d] /= size[k];
  });
}

}  // namespace

std::tuple<Tensor, Tensor> kmeans_cpu(const Tensor& points, const Tensor& valid, const Tensor& uniforms, int64_t max_iters) {
  check_kmeans(points, valid, uniforms, max_iters);
  const int64_t G = points.size(0), N = points.size(1), D = points.size(2), K = uniforms.size(1), trials = uniforms.size(2);
  Tensor centers = at::zeros({G, K, D}, points.options());
  Tensor assignment = at::full({G, N}, -1, points.options().dtype(at::kLong));
  const Tensor u = uniforms.contiguous(), all = points.contiguous();
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "kmeans", [&] {
    const at::ThreadLocalState caller;  // inference mode and the like, which other threads do not have
    at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
      const at::ThreadLocalStateGuard guard(caller);
      for (int64_t g = begin; g < end; ++g) {
        const Tensor kept = valid[g].nonzero().flatten();
        const int64_t n = kept.size(0);
        if (n == 0) continue;
        const Tensor x = n == N ? all[g] : all[g].index_select(0, kept);  // (n, D)
        const Tensor sq = x.square().sum(1);
        Tensor c = seed<scalar_t>(x, sq.const_data_ptr<scalar_t>(), u.const_data_ptr<double>() + g * K * trials, std::min(K, n), trials);
        std::vector<int64_t> label(n, -1);
        for (int64_t i = 0; assign<scalar_t>(x, c, label) && i < max_iters; ++i) update<scalar_t>(x, label, c);
        centers[g].copy_(c[0].expand({K, D}));  // spare clusters repeat centre 0
        centers[g].narrow(0, 0, c.size(0)).copy_(c);
        const auto* index = kept.const_data_ptr<int64_t>();
        auto* out = assignment.mutable_data_ptr<int64_t>() + g * N;
        for (int64_t i = 0; i < n; ++i) out[index[i]] = label[i];
      }
    });
  });
  return {centers, assignment};
}

TORCH_LIBRARY_IMPL(r2o, CPU, m) { m.impl("kmeans", &kmeans_cpu); }

}  // namespace r2o
