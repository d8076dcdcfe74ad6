// kmeans on the CPU. Equivalent to: kmeans_ref in r2o_ops.py.
//
// With at least as many problems as threads, each problem runs on one thread. With fewer, they run in sequence and the
// threads split points (dot products) or columns (sums). Results do not depend on the split. Valid points are packed
// contiguously, minus their mean.
//   Seeding, per round: the scores of all candidates (trials), (n, D) x (D, trials), in one pass over the points.
//   Lloyd, per iteration: the scores of the centers that moved, (n, D) x (D, <= K). Points that changed cluster move
//   from one float64 sum to another. The seeds' scores are known from seeding.
// Floor: K (trials + iterations) n D multiply-adds for large K, K + iterations reads of the points for small K.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common.h"
#include "rows.h"

namespace r2o {
namespace {

// Calls f(begin, end) on blocks of at most kBlock of n points. `work`: multiply-adds per point.
template <typename F>
void for_blocks(int64_t n, int64_t work, const F& f) {
  at::parallel_for(0, (n + kBlock - 1) / kBlock, 1 + (1 << 18) / (kBlock * work + 1), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) f(block * kBlock, std::min(n, (block + 1) * kBlock));
  });
}

// Calls f(begin, end) on ranges of D columns. `rows`: rows accessed per column.
template <typename F>
void for_columns(int64_t D, int64_t rows, const F& f) {
  at::parallel_for(0, D, std::max<int64_t>(64, (1 << 15) / (rows + 1)), f);
}

// State of one problem with n points. The score x·mu - |mu|²/2 is largest for the nearest center.
template <typename T>
struct Problem {
  int64_t n, D, K;
  Tensor x, centers;                   // (n, D), (K, D)
  std::vector<T> mean, sq;             // (D), (n): |x|²
  std::vector<T> score;                // (n, K)
  std::vector<int64_t> label, before;  // (n): current and previous cluster, -1 initially
  std::vector<double> sum;             // (K, D): per cluster
  std::vector<int64_t> size;           // (K)

  Problem(const T* points, const std::vector<int64_t>& kept, int64_t D, int64_t K, const at::TensorOptions& options)
      : n(kept.size()), D(D), K(K), x(at::empty({n, D}, options)), centers(at::empty({K, D}, options)), mean(D, 0), sq(n),
        score(n * K), label(n, -1), before(n), sum(K * D, 0), size(K, 0) {
    auto* out = x.template mutable_data_ptr<T>();
    for_columns(D, n, [&](int64_t begin, int64_t end) {
      for (const int64_t i : kept)
        rows<T>.add(&mean[begin], points + i * D + begin, 1, end - begin);
      for (int64_t d = begin; d < end; ++d) mean[d] /= n;
    });
    for_blocks(n, D, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::copy_n(points + kept[i] * D, D, out + i * D);
        rows<T>.add(out + i * D, mean.data(), -1, D);
        rows<T>.dots(out + i * D, out + i * D, 1, 1, D, &sq[i]);
      }
    });
  }

  // Greedy k-means++ with `trials` candidates per round.
  void seed(const double* uniforms, int64_t trials) {
    const auto* point = x.template const_data_ptr<T>();
    auto* center = centers.template mutable_data_ptr<T>();
    const Tensor copies = at::empty({trials, D}, x.options());
    auto* row = copies.template mutable_data_ptr<T>();
    std::vector<T> distance(n, std::numeric_limits<T>::infinity()), candidate(n * trials);
    std::vector<double> mass(n), left((n / kBlock + 1) * trials);
    std::vector<int64_t> pick(trials);
    const auto closest = [&](int64_t i, int64_t t) { return std::min(distance[i], std::max<T>(sq[i] - 2 * candidate[i * trials + t], 0)); };
    int64_t first = 0;
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) mass[i] = sum += k ? distance[i] : 1;
      for (int64_t t = 0; t < trials; ++t) {  // the first point whose cumulative weight exceeds u times the total
        const double target = std::min(uniforms[k * trials + t] * sum, std::nextafter(sum, 0.0));
        pick[t] = sum > 0 ? std::min(std::upper_bound(mass.begin(), mass.end(), target) - mass.begin(), n - 1) : first;
        std::copy_n(point + pick[t] * D, D, row + t * D);
      }
      for_blocks(n, trials * D, [&](int64_t begin, int64_t end) {
        rows<T>.dots(point + begin * D, row, end - begin, trials, D, &candidate[begin * trials]);
        for (int64_t t = 0; t < trials; ++t) {
          double total = 0;
          for (int64_t i = begin; i < end; ++i) {
            candidate[i * trials + t] -= sq[pick[t]] / 2;
            total += closest(i, t);
          }
          left[begin / kBlock * trials + t] = total;
        }
      });
      for (int64_t block = 1; block * kBlock < n; ++block)
        for (int64_t t = 0; t < trials; ++t) left[t] += left[block * trials + t];
      const int64_t best = std::min_element(left.begin(), left.begin() + trials) - left.begin();
      if (k == 0) first = pick[best];
      for (int64_t i = 0; i < n; ++i) {
        distance[i] = closest(i, best);
        score[i * K + k] = candidate[i * trials + best];
      }
      std::copy_n(row + best * D, D, center + k * D);
    }
  }

  // Assigns each point to its nearest center; ties go to the lowest id. Returns whether any point changed cluster.
  // `moved`: centers whose scores are stale.
  bool assign(const std::vector<int64_t>& moved) {
    const int64_t m = moved.size();
    const Tensor copies = at::empty({m, D}, x.options());
    auto* row = copies.template mutable_data_ptr<T>();
    std::vector<T> half(m);
    for (int64_t j = 0; j < m; ++j) {
      std::copy_n(centers.template const_data_ptr<T>() + moved[j] * D, D, row + j * D);
      rows<T>.dots(row + j * D, row + j * D, 1, 1, D, &half[j]);
    }
    before.swap(label);
    for_blocks(n, m * D + K, [&](int64_t begin, int64_t end) {
      std::vector<T> fresh((end - begin) * m);
      rows<T>.dots(x.template const_data_ptr<T>() + begin * D, row, end - begin, m, D, fresh.data());
      for (int64_t i = begin; i < end; ++i) {
        auto* s = &score[i * K];
        for (int64_t j = 0; j < m; ++j) s[moved[j]] = fresh[(i - begin) * m + j] - half[j] / 2;
        label[i] = std::max_element(s, s + K) - s;
      }
    });
    return label != before;
  }

  // Updates the centers of clusters that gained or lost points; returns their ids. An emptied cluster keeps its center.
  std::vector<int64_t> update() {
    std::vector<int64_t> changed, moved;  // points, clusters
    std::vector<char> touched(K, false);
    for (int64_t i = 0; i < n; ++i)
      if (label[i] != before[i]) {
        changed.push_back(i);
        touched[label[i]] = true;
        ++size[label[i]];
        if (before[i] >= 0) {
          touched[before[i]] = true;
          --size[before[i]];
        }
      }
    for (int64_t k = 0; k < K; ++k)
      if (touched[k] && size[k]) moved.push_back(k);
    const auto* point = x.template const_data_ptr<T>();
    auto* center = centers.template mutable_data_ptr<T>();
    for_columns(D, changed.size(), [&](int64_t begin, int64_t end) {
      for (const int64_t i : changed) {
        for (int64_t d = begin; d < end; ++d) sum[label[i] * D + d] += point[i * D + d];
        if (before[i] >= 0)
          for (int64_t d = begin; d < end; ++d) sum[before[i] * D + d] -= point[i * D + d];
      }
      for (const int64_t k : moved)
        for (int64_t d = begin; d < end; ++d) center[k * D + d] = sum[k * D + d] / size[k];
    });
    return moved;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> kmeans_cpu(const Tensor& points, const Tensor& valid, const Tensor& uniforms, int64_t max_iters) {
  check_kmeans(points, valid, uniforms, max_iters);
  const int64_t G = points.size(0), N = points.size(1), D = points.size(2), K = uniforms.size(1), trials = uniforms.size(2);
  const Tensor all = points.contiguous(), ok = valid.contiguous(), u = uniforms.contiguous();
  Tensor centers = at::zeros({G, K, D}, points.options());
  Tensor assignment = at::full({G, N}, -1, points.options().dtype(at::kLong));
  const auto* is_valid = ok.const_data_ptr<bool>();
  auto* out = assignment.mutable_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "kmeans", [&] {
    at::parallel_for(0, G, G < at::get_num_threads() ? G : 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        std::vector<int64_t> kept;
        for (int64_t i = 0; i < N; ++i)
          if (is_valid[g * N + i]) kept.push_back(i);
        const int64_t n = kept.size();
        if (n == 0) continue;
        Problem<scalar_t> problem(all.const_data_ptr<scalar_t>() + g * N * D, kept, D, std::min(K, n), points.options());
        problem.seed(u.const_data_ptr<double>() + g * K * trials, trials);
        bool changed = problem.assign({});
        for (int64_t i = 0; i < max_iters && changed; ++i) changed = problem.assign(problem.update());
        auto* center = centers.mutable_data_ptr<scalar_t>() + g * K * D;
        for (int64_t k = 0; k < K; ++k)  // spare clusters repeat center 0
          for (int64_t d = 0; d < D; ++d) center[k * D + d] = problem.centers.const_data_ptr<scalar_t>()[(k < n ? k : 0) * D + d] + problem.mean[d];
        for (int64_t i = 0; i < n; ++i) out[g * N + kept[i]] = problem.label[i];
      }
    });
  });
  return {centers, assignment};
}

TORCH_LIBRARY_IMPL(r2o, CPU, m) { m.impl("kmeans", &kmeans_cpu); }

}  // namespace r2o
