// kmeans on the GPU. Equivalent to: kmeans_ref in r2o_ops.py.
//
// K-means needs only the dot products of its points: for the mean mu of a cluster's members x_j, x·mu is the mean of
// x·x_j. One matrix product computes all of them (gram, N x N). Distances and scores are then sums of its entries:
//   center    one block per group and 32 columns: x minus the mean of the valid points, 0 for invalid points
//   (bmm)     gram = x xᵀ
//   seed      one block per group, all K rounds: draws T candidates, reads their T rows of gram, keeps the best
//   then, per iteration
//   assign    one block per point: sums its row of gram over each cluster's members and picks the nearest center
//   means     one block per cluster that gained or lost a point: lists its members in order and averages them
// Initially, each cluster's only member is its seed. Once no point changes cluster, all blocks return immediately.
// The host launches a fixed sequence of kernels and reads nothing back. All sums have a fixed order.
// Floor: 2 N² D operations for gram, then N² floats per iteration, from L2 if they fit (N = 3200: 41 MB).
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../common.h"
#include "launch.h"

namespace r2o {
namespace {

constexpr int kSeedThreads = 1024, kMaxTrials = 32, kAtOnce = 4;  // maximum candidates per round; candidates per pass

// One K-means problem per group g of G. Each has N points and K clusters, of which min(K, valid points) are used.
template <typename T>
struct Problem {
  int N, D, K;
  const bool* valid;     // (G, N)
  T *x, *mean;           // (G, N, D), (G, D)
  const T* gram;         // (G, N, N)
  T *centers, *half;     // (G, K, D), (G, K): |mu|²/2
  int *members, *size;   // (G, K, N), (G, K): points averaged into each center
  int* used;             // (G): clusters in use
  int64_t* label;        // (G, N): -1 if invalid
};

template <typename V>
__device__ V warp_sum(V v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_down_sync(kAllLanes, v, offset);
  return __shfl_sync(kAllLanes, v, 0);
}

// Sum over a block of at most 1024 threads, returned to all.
template <typename V>
__device__ V block_sum(V v) {
  __shared__ V part[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  v = warp_sum(v);
  __syncthreads();  // the previous call may still read part
  if (lane == 0) part[warp] = v;
  __syncthreads();
  return warp_sum(lane < static_cast<int>(blockDim.x) / kWarp ? part[lane] : V(0));
}

// Each block handles 32 columns, one per lane. Its 8 warps stride over the points.
template <typename T>
__global__ void center(const T* points, Problem<T> p) {
  __shared__ T sums[kThreads];
  __shared__ int counts[kThreads];
  const int blocks = (p.D + kWarp - 1) / kWarp;  // of a group
  const int64_t g = blockIdx.x / blocks, base = g * p.N;
  const int lane = threadIdx.x % kWarp, stretch = threadIdx.x / kWarp, stretches = kThreads / kWarp, d = blockIdx.x % blocks * kWarp + lane;
  T sum = 0;
  int count = 0;
  for (int i = stretch; i < p.N; i += stretches)
    if (p.valid[base + i]) {
      if (d < p.D) sum += points[(base + i) * p.D + d];
      ++count;
    }
  sums[threadIdx.x] = sum;
  counts[threadIdx.x] = count;
  __syncthreads();
  sum = 0, count = 0;
  for (int s = 0; s < stretches; ++s) sum += sums[s * kWarp + lane], count += counts[s * kWarp + lane];
  const T mean = count ? sum / count : 0;
  if (d < p.D) {
    for (int i = stretch; i < p.N; i += stretches) p.x[(base + i) * p.D + d] = p.valid[base + i] ? points[(base + i) * p.D + d] - mean : 0;
    if (stretch == 0) p.mean[g * p.D + d] = mean;
  }
  if (d == 0 && stretch == 0) p.used[g] = min(p.K, count);
}

// Greedy k-means++. A point's weight is its squared distance to the nearest seed, 1 before the first seed, 0 if invalid.
// squares, distances: (G, N), scratch for |x|² and distances.
template <typename T>
__global__ void __launch_bounds__(kSeedThreads) seed(const double* uniforms, Problem<T> p, T* squares, T* distances, int trials) {
  __shared__ double part[kWarp];  // total weight per warp
  __shared__ double part_left[kMaxTrials][kWarp], left[kMaxTrials];  // total distance given each candidate
  __shared__ int picks[kMaxTrials];
  const int64_t g = blockIdx.x, n = p.N;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, stretch = (n + kSeedThreads - 1) / kSeedThreads;
  const int64_t begin = min(n, static_cast<int64_t>(threadIdx.x) * stretch), end = min(n, begin + stretch);
  const T* gram = p.gram + g * n * n;
  const bool* valid = p.valid + g * n;
  T *square = squares + g * n, *distance = distances + g * n;
  const auto weight = [&](int64_t i, int k) { return valid[i] ? (k ? static_cast<double>(distance[i]) : 1.0) : 0.0; };
  const auto closest = [&](int64_t i, int64_t pick) {  // distance from point i to the nearest of the seeds and pick
    return fmin(distance[i], fmax(square[i] - 2 * (gram[pick * n + i] - square[pick] / 2), static_cast<T>(0)));
  };
  for (int64_t i = begin; i < end; ++i) square[i] = gram[i * n + i], distance[i] = std::numeric_limits<T>::infinity();
  int first = 0;
  for (int k = 0; k < p.used[g]; ++k) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += weight(i, k);
    double running = sum;  // inclusive scan over lanes
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const double other = __shfl_up_sync(kAllLanes, running, offset);
      if (lane >= offset) running += other;
    }
    if (lane == kWarp - 1) part[warp] = running;
    if (threadIdx.x < trials) picks[threadIdx.x] = first;  // kept if the total weight is 0
    __syncthreads();
    double total = 0, before = 0;
    for (int w = 0; w < kSeedThreads / kWarp; ++w) {
      if (w == warp) before = total;
      total += part[w];
    }
    for (int t = 0; t < trials; ++t) {  // the first point whose cumulative weight exceeds u * total
      const double target = fmin(uniforms[(g * p.K + k) * trials + t] * total, nextafter(total, 0.0));
      if (target < before || target >= before + part[warp]) continue;  // in another warp
      const unsigned some = __ballot_sync(kAllLanes, sum > 0), past = __ballot_sync(kAllLanes, sum > 0 && before + running > target);
      if (lane != (past ? __ffs(past) - 1 : kWarp - 1 - __clz(some))) continue;
      double passed = before + (running - sum);
      for (int64_t i = begin; i < end; ++i)
        if (weight(i, k) > 0) {
          picks[t] = i;
          passed += weight(i, k);
          if (passed > target) break;
        }
    }
    __syncthreads();
    for (int t = 0; t < trials; t += kAtOnce) {
      double sums[kAtOnce] = {};
      for (int64_t i = threadIdx.x; i < n; i += kSeedThreads)
        for (int u = 0; u < kAtOnce; ++u)
          if (valid[i] && t + u < trials) sums[u] += closest(i, picks[t + u]);
      for (int u = 0; u < kAtOnce && t + u < trials; ++u) {
        const double total_left = warp_sum(sums[u]);
        if (lane == 0) part_left[t + u][warp] = total_left;
      }
    }
    __syncthreads();
    if (warp < trials) {
      const double total_left = warp_sum(part_left[warp][lane]);
      if (lane == 0) left[warp] = total_left;
    }
    __syncthreads();
    int best = 0;
    for (int t = 1; t < trials; ++t)
      if (left[t] < left[best]) best = t;
    const int64_t pick = picks[best], cluster = g * p.K + k;
    if (k == 0) first = pick;
    for (int64_t i = threadIdx.x; i < n; i += kSeedThreads) distance[i] = closest(i, pick);
    for (int d = threadIdx.x; d < p.D; d += kSeedThreads) p.centers[cluster * p.D + d] = p.x[(g * n + pick) * p.D + d];
    if (threadIdx.x == 0) {
      p.members[cluster * n] = pick;
      p.size[cluster] = 1;
      p.half[cluster] = square[pick] / 2;
    }
    __syncthreads();  // before the next round uses them
  }
}

// Assigns one point to its nearest center; ties go to the lowest id. Warps stride over clusters. changed: (G, K + 1),
// whether each cluster gained or lost a point, then whether any did. before: changed of the previous iteration, or null.
template <typename T>
__global__ void assign(Problem<T> p, const bool* before, bool* changed) {
  extern __shared__ __align__(16) char shared[];
  __shared__ T best_score[kThreads / kWarp];
  __shared__ int best_id[kThreads / kWarp];
  T* row = reinterpret_cast<T*>(shared);  // (N)
  const int64_t point = blockIdx.x, g = point / p.N;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (!p.valid[point] || (before && !before[g * (p.K + 1) + p.K])) return;
  for (int i = threadIdx.x; i < p.N; i += kThreads) row[i] = p.gram[point * p.N + i];
  __syncthreads();
  T best = -std::numeric_limits<T>::infinity();
  int id = 0;
  for (int k = warp; k < p.used[g]; k += kThreads / kWarp) {
    const int64_t cluster = g * p.K + k;
    const int size = p.size[cluster];
    T sum = 0;
    if (size) {
      for (int j = lane; j < size; j += kWarp) sum += row[p.members[cluster * p.N + j]];
    } else {  // an emptied cluster keeps its center and has no members
      for (int d = lane; d < p.D; d += kWarp) sum += p.x[point * p.D + d] * p.centers[cluster * p.D + d];
    }
    const T score = warp_sum(sum) / max(size, 1) - p.half[cluster];
    if (score > best) best = score, id = k;
  }
  if (lane == 0) best_score[warp] = best, best_id[warp] = id;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kThreads / kWarp; ++w)
    if (best_score[w] > best || (best_score[w] == best && best_id[w] < id)) best = best_score[w], id = best_id[w];
  const int64_t old = p.label[point];
  if (old == id) return;
  p.label[point] = id;
  changed += g * (p.K + 1);
  changed[id] = changed[p.K] = true;
  if (old >= 0) changed[old] = true;
}

// Lists and averages the members of one cluster, in order. An emptied cluster keeps its center.
template <typename T>
__global__ void means(Problem<T> p, const bool* changed) {
  const int64_t cluster = blockIdx.x, g = cluster / p.K, k = cluster % p.K;
  if (!changed[g * (p.K + 1) + k]) return;
  int* members = p.members + cluster * p.N;
  int size = 0;
  for (int first = 0; first < p.N; first += kThreads) {
    const int i = first + threadIdx.x;
    size = append(members, size, i < p.N && p.label[g * p.N + i] == k, i);
  }
  if (threadIdx.x == 0) p.size[cluster] = size;
  if (size == 0) return;
  T square = 0;
  for (int d = threadIdx.x; d < p.D; d += kThreads) {
    T sum = 0;
    for (int j = 0; j < size; ++j) sum += p.x[(g * p.N + members[j]) * p.D + d];
    const T mean = sum / size;
    p.centers[cluster * p.D + d] = mean;
    square += mean * mean;
  }
  square = block_sum(square);
  if (threadIdx.x == 0) p.half[cluster] = square / 2;
}

// Adds the mean back. Spare clusters repeat center 0; without valid points all centers are 0.
template <typename T>
__global__ void finish(Problem<T> p, T* out) {
  const int64_t g = blockIdx.x / p.K;
  const int used = p.used[g], k = blockIdx.x % p.K;
  for (int d = threadIdx.x; d < p.D; d += blockDim.x)
    out[blockIdx.x * static_cast<int64_t>(p.D) + d] = used ? p.centers[(g * p.K + (k < used ? k : 0)) * p.D + d] + p.mean[g * p.D + d] : 0;
}

}  // namespace

std::tuple<Tensor, Tensor> kmeans_cuda(const Tensor& points, const Tensor& valid, const Tensor& uniforms, int64_t max_iters) {
  check_kmeans(points, valid, uniforms, max_iters);
  const c10::cuda::CUDAGuard guard(points.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t G = points.size(0), N = points.size(1), D = points.size(2), K = uniforms.size(1), trials = uniforms.size(2);
  TORCH_CHECK(N <= kMaxPoints && trials <= kMaxTrials, "on a GPU a group has at most ", kMaxPoints, " points and a round ", kMaxTrials,
              " candidates, got ", N, " and ", trials);
  const auto options = points.options(), integers = options.dtype(at::kInt), flags = options.dtype(at::kBool);
  Tensor out = at::zeros({G, K, D}, options), label = at::full({G, N}, -1, options.dtype(at::kLong));
  if (points.numel() == 0) return {out, label};
  const int64_t at_once = std::max<int64_t>(1, kGramBytes / (N * N * points.element_size()));
  for (int64_t g = 0; at_once < G && g < G; g += at_once) {  // fewer groups, with less memory
    const int64_t some = std::min(at_once, G - g);
    const auto [c, l] = kmeans_cuda(points.narrow(0, g, some), valid.narrow(0, g, some), uniforms.narrow(0, g, some), max_iters);
    out.narrow(0, g, some).copy_(c), label.narrow(0, g, some).copy_(l);
    if (g + some == G) return {out, label};
  }
  const Tensor in = points.contiguous(), ok = valid.contiguous(), u = uniforms.contiguous();
  Tensor x = at::empty({G, N, D}, options), mean = at::empty({G, D}, options);
  Tensor centers = at::empty({G, K, D}, options), half = at::empty({G, K}, options);
  Tensor members = at::empty({G, K, N}, integers), size = at::empty({G, K}, integers), used = at::empty({G}, integers);
  Tensor square = at::empty({G, N}, options), distance = at::empty({G, N}, options), changed = at::zeros({max_iters + 1, G, K + 1}, flags);
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "kmeans", [&] {
    using T = scalar_t;
    Problem<T> p{};
    p.N = N, p.D = D, p.K = K, p.valid = ok.const_data_ptr<bool>(), p.label = label.mutable_data_ptr<int64_t>();
    p.x = x.mutable_data_ptr<T>(), p.mean = mean.mutable_data_ptr<T>();
    p.centers = centers.mutable_data_ptr<T>(), p.half = half.mutable_data_ptr<T>();
    p.members = members.mutable_data_ptr<int>(), p.size = size.mutable_data_ptr<int>(), p.used = used.mutable_data_ptr<int>();
    center<T><<<(D + kWarp - 1) / kWarp * G, kThreads, 0, stream>>>(in.const_data_ptr<T>(), p);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const at::NoTF32Guard exact;  // and no autocast: in T, whatever the caller allows other products
    const c10::impl::ExcludeDispatchKeyGuard full(c10::autocast_dispatch_keyset);
    const Tensor gram = at::bmm(x, x.transpose(1, 2));  // (G, N, N)
    p.gram = gram.const_data_ptr<T>();
    seed<T><<<G, kSeedThreads, 0, stream>>>(u.const_data_ptr<double>(), p, square.mutable_data_ptr<T>(), distance.mutable_data_ptr<T>(), trials);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const size_t shared = N * sizeof(T);
    allow_shared(reinterpret_cast<const void*>(assign<T>), shared);
    bool* now = changed.mutable_data_ptr<bool>();
    for (int64_t i = 0; i <= max_iters; ++i, now += G * (K + 1)) {
      assign<T><<<G * N, kThreads, shared, stream>>>(p, i ? now - G * (K + 1) : nullptr, now);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      if (i == max_iters) break;
      means<T><<<G * K, kThreads, 0, stream>>>(p, now);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    finish<T><<<G * K, kThreads, 0, stream>>>(p, out.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out, label};
}

TORCH_LIBRARY_IMPL(r2o, CUDA, m) { m.impl("kmeans", &kmeans_cuda); }

}  // namespace r2o
