// kmeans on the GPU. Equivalent to: kmeans_ref in r2o_ops.py.
//
// K-means needs only the dot products of its points. One matrix product computes all of them (gram, N x N). For the mean
// mu of a cluster's members x_j, x·mu is the mean of x·x_j, and |mu|² is the mean of the members' own x·mu:
//   center    one block per group and 32 columns: x minus the mean of the valid points, 0 for invalid points
//   (bmm)     gram = x xᵀ
//   seed      one block per group, all K rounds: draws T candidates, reads their T rows of gram, keeps the best
//   then, per iteration
//   dots      one block per cluster and 128 points, if the cluster gained or lost a point: x·mu, from the members' rows
//   assign    one block per 32 points: picks the nearest center of each
//   and once
//   means     one block per cluster and 128 columns: the mean of its members
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
constexpr int kWarps = kThreads / kWarp, kLaneColumns = 4, kTile = kWarp * kLaneColumns, kRowsAtOnce = 4;  // of member_sum

// One K-means problem per group g of G. Each has N points and K clusters, of which min(K, valid points) are used.
template <typename T>
struct Problem {
  int N, D, K, words, tiles;  // words: of 32 points; tiles: of kTile points
  const bool* valid;          // (G, N)
  T *x, *mean;                // (G, N, D), (G, D)
  const T* gram;              // (G, N, N)
  int *seeds, *used;          // (G, K), (G): clusters in use
  unsigned* members;          // (G, K, words): a bit for each point that is averaged into the center
  T *dots, *halves;           // (G, K, N), (G, K, tiles): x·mu; addends of |mu|²/2
  int64_t* label;             // (G, N): -1 if invalid
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
    const int64_t pick = picks[best];
    if (k == 0) first = pick;
    for (int64_t i = threadIdx.x; i < n; i += kSeedThreads) distance[i] = closest(i, pick);
    if (threadIdx.x == 0) p.seeds[g * p.K + k] = pick;
    __syncthreads();  // before the next round uses them
  }
}

// Sums, over the members of a cluster, their rows of a matrix (N, columns), in the columns from `first` on, one per thread
// below kTile. member(word): its bits among 32 points. Sets size to the number of members.
template <typename T, typename F>
__device__ T member_sum(const T* rows, int N, int columns, int first, const F& member, int& size) {
  __shared__ unsigned short lists[kWarps][kMaxPoints / kWarps];  // each warp takes every kWarps-th word
  __shared__ T part[kWarps][kTile];
  __shared__ int counts[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int count = 0;
  for (int word = warp; word * kWarp < N; word += kWarps) {
    const unsigned bits = member(word);
    if (bits >> lane & 1) lists[warp][count + __popc(bits & ((1u << lane) - 1))] = word * kWarp + lane;
    count += __popc(bits);
  }
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  T sum[kLaneColumns] = {};
  for (int j = 0; j < count; j += kRowsAtOnce) {
    T value[kRowsAtOnce][kLaneColumns];
    for (int v = 0; v < kRowsAtOnce; ++v)
      for (int u = 0; u < kLaneColumns; ++u) {
        const int column = first + u * kWarp + lane;
        value[v][u] = j + v < count && column < columns ? rows[static_cast<int64_t>(lists[warp][j + v]) * columns + column] : 0;
      }
    for (int v = 0; v < kRowsAtOnce; ++v)
      for (int u = 0; u < kLaneColumns; ++u) sum[u] += value[v][u];
  }
  for (int u = 0; u < kLaneColumns; ++u) part[warp][u * kWarp + lane] = sum[u];
  __syncthreads();
  T total = 0;
  size = 0;
  for (int w = 0; w < kWarps; ++w) {
    size += counts[w];
    if (threadIdx.x < kTile) total += part[w][threadIdx.x];
  }
  return total;
}

// x·mu of 128 points and a cluster, and their part of |mu|²/2. An emptied cluster keeps its center. changed: (G, K + 1),
// of assign; null at first, when the only member is the seed.
template <typename T>
__global__ void dots(Problem<T> p, const bool* changed) {
  const int tile = blockIdx.x % p.tiles;
  const int64_t cluster = blockIdx.x / p.tiles, g = cluster / p.K, k = cluster % p.K;
  if (k >= p.used[g] || (changed && !changed[g * (p.K + 1) + k])) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, seed = p.seeds[cluster];
  const int64_t* label = p.label + g * p.N;
  const auto is_member = [&](int i) { return i < p.N && (changed ? label[i] == k : i == seed); };
  const auto member = [&](int word) { return __ballot_sync(kAllLanes, is_member(word * kWarp + lane)); };
  int size;
  const T sum = member_sum(p.gram + g * p.N * p.N, p.N, p.N, tile * kTile, member, size);
  if (size == 0) return;
  const int i = tile * kTile + threadIdx.x;
  const bool mine = threadIdx.x < kTile && i < p.N;
  if (mine) p.dots[cluster * p.N + i] = sum / size;
  const T half = block_sum(mine && is_member(i) ? sum / size : T(0)) / size / 2;
  if (threadIdx.x == 0) p.halves[blockIdx.x] = half;
  for (int word = warp; tile == 0 && word < p.words; word += kWarps) {
    const unsigned bits = member(word);
    if (lane == 0) p.members[cluster * p.words + word] = bits;
  }
}

// Assigns 32 points to their nearest centers; ties go to the lowest id. Warps stride over clusters. changed: (G, K + 1),
// whether each cluster gained or lost a point, then whether any did. before: changed of the previous iteration, or null.
template <typename T>
__global__ void assign(Problem<T> p, const bool* before, bool* changed) {
  extern __shared__ __align__(16) char shared[];
  __shared__ T best_score[kWarps][kWarp];
  __shared__ int best_id[kWarps][kWarp];
  T* half = reinterpret_cast<T*>(shared);  // (K): |mu|²/2
  const int64_t g = blockIdx.x / p.words;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, i = blockIdx.x % p.words * kWarp + lane, used = p.used[g];
  if (before && !before[g * (p.K + 1) + p.K]) return;
  for (int k = threadIdx.x; k < used; k += kThreads) {
    T sum = 0;
    for (int tile = 0; tile < p.tiles; ++tile) sum += p.halves[(g * p.K + k) * p.tiles + tile];
    half[k] = sum;
  }
  __syncthreads();
  T best = -std::numeric_limits<T>::infinity();
  int id = 0;
  for (int k = warp; i < p.N && k < used; k += kWarps) {
    const T score = p.dots[(g * p.K + k) * p.N + i] - half[k];
    if (score > best) best = score, id = k;
  }
  best_score[warp][lane] = best, best_id[warp][lane] = id;
  __syncthreads();
  const int64_t point = g * p.N + i;
  if (warp || i >= p.N || !p.valid[point]) return;
  for (int w = 1; w < kWarps; ++w)
    if (best_score[w][lane] > best || (best_score[w][lane] == best && best_id[w][lane] < id)) best = best_score[w][lane], id = best_id[w][lane];
  const int64_t old = p.label[point];
  if (old == id) return;
  p.label[point] = id;
  changed += g * (p.K + 1);
  changed[id] = changed[p.K] = true;
  if (old >= 0) changed[old] = true;
}

// The centers, from the points as they were given. Spare clusters repeat center 0; without valid points all are left at 0.
template <typename T>
__global__ void means(const T* points, Problem<T> p, T* out) {
  const int tiles = (p.D + kTile - 1) / kTile, first = blockIdx.x % tiles * kTile, d = first + threadIdx.x;
  const int64_t cluster = blockIdx.x / tiles, g = cluster / p.K, k = cluster % p.K;
  const int used = p.used[g];
  if (used == 0) return;
  const unsigned* members = p.members + (g * p.K + (k < used ? k : 0)) * p.words;
  int size;
  const T sum = member_sum(points + g * p.N * p.D, p.N, p.D, first, [&](int word) { return members[word]; }, size);
  if (threadIdx.x < kTile && d < p.D) out[cluster * p.D + d] = sum / size;
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
  const int64_t at_once = std::max<int64_t>(1, kGramBytes / (N * (N + K) * points.element_size()));
  for (int64_t g = 0; at_once < G && g < G; g += at_once) {  // fewer groups, with less memory
    const int64_t some = std::min(at_once, G - g);
    const auto [c, l] = kmeans_cuda(points.narrow(0, g, some), valid.narrow(0, g, some), uniforms.narrow(0, g, some), max_iters);
    out.narrow(0, g, some).copy_(c), label.narrow(0, g, some).copy_(l);
    if (g + some == G) return {out, label};
  }
  const Tensor in = points.contiguous(), ok = valid.contiguous(), u = uniforms.contiguous();
  Tensor x = at::empty({G, N, D}, options), mean = at::empty({G, D}, options);
  const int64_t words = (N + kWarp - 1) / kWarp, tiles = (N + kTile - 1) / kTile;
  Tensor dot = at::empty({G, K, N}, options), half = at::empty({G, K, tiles}, options);
  Tensor members = at::empty({G, K, words}, integers), seeds = at::empty({G, K}, integers), used = at::empty({G}, integers);
  Tensor square = at::empty({G, N}, options), distance = at::empty({G, N}, options), changed = at::zeros({max_iters + 1, G, K + 1}, flags);
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "kmeans", [&] {
    using T = scalar_t;
    Problem<T> p{};
    p.N = N, p.D = D, p.K = K, p.words = words, p.tiles = tiles;
    p.valid = ok.const_data_ptr<bool>(), p.label = label.mutable_data_ptr<int64_t>();
    p.x = x.mutable_data_ptr<T>(), p.mean = mean.mutable_data_ptr<T>();
    p.dots = dot.mutable_data_ptr<T>(), p.halves = half.mutable_data_ptr<T>();
    p.members = reinterpret_cast<unsigned*>(members.mutable_data_ptr<int>());
    p.seeds = seeds.mutable_data_ptr<int>(), p.used = used.mutable_data_ptr<int>();
    center<T><<<(D + kWarp - 1) / kWarp * G, kThreads, 0, stream>>>(in.const_data_ptr<T>(), p);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const at::NoTF32Guard exact;  // and no autocast: in T, whatever the caller allows other products
    const c10::impl::ExcludeDispatchKeyGuard full(c10::autocast_dispatch_keyset);
    const Tensor gram = at::bmm(x, x.transpose(1, 2));  // (G, N, N)
    p.gram = gram.const_data_ptr<T>();
    seed<T><<<G, kSeedThreads, 0, stream>>>(u.const_data_ptr<double>(), p, square.mutable_data_ptr<T>(), distance.mutable_data_ptr<T>(), trials);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const size_t shared = std::min(K, N) * sizeof(T);
    allow_shared(reinterpret_cast<const void*>(assign<T>), shared);
    bool* now = changed.mutable_data_ptr<bool>();
    for (int64_t i = 0; i <= max_iters; ++i, now += G * (K + 1)) {
      const bool* before = i ? now - G * (K + 1) : nullptr;
      dots<T><<<G * K * tiles, kThreads, 0, stream>>>(p, before);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      assign<T><<<G * words, kThreads, shared, stream>>>(p, before, now);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    means<T><<<(D + kTile - 1) / kTile * G * K, kThreads, 0, stream>>>(in.const_data_ptr<T>(), p, out.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out, label};
}

TORCH_LIBRARY_IMPL(r2o, CUDA, m) { m.impl("kmeans", &kmeans_cuda); }

}  // namespace r2o
