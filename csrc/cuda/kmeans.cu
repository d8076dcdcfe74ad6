// kmeans on the GPU. Equivalent to: kmeans_ref in r2o_ops.py.
//
// K-means needs only the dot products of its points. One matrix product computes all of them (gram, N x N). For the mean
// mu of a cluster's members x_j, x·mu is the mean of x·x_j, and |mu|² is the mean of the members' own x·mu:
//   sums      one block per 64 points and 256 columns: their sums, and the largest magnitude
//   center    the same blocks: x minus the mean of the valid points, 0 for invalid points
//   (bmm)     gram = x xᵀ; for float32 on tensor cores: x = high + low, both float16, without low·low
//   seed      one block per group, all K rounds: draws T candidates, reads their T rows of gram, keeps the best
//   then, per iteration
//   dots      one block per cluster and 128 points, if the cluster gained or lost a point: x·mu, from the members' rows
//   assign    one block per 32 points: picks the nearest center of each
//   and once
//   means     one block per cluster and 128 columns: the mean of its members
// Initially, each cluster's only member is its seed. Once no point changes cluster, all blocks return immediately.
// The host launches a fixed sequence of kernels and reads nothing back. All sums have a fixed order.
// float32 points are scaled to fit float16, by a power of two, which no step undoes: K-means depends on ratios only.
// Floor: 2 N² D operations for gram (6 in float16), then N² floats per iteration, from L2 if they fit (N = 3200: 41 MB).
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Half.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../common.h"
#include "launch.h"

namespace r2o {
namespace {

constexpr int kSeedThreads = 1024, kMaxTrials = kSeedThreads / kWarp;  // candidates per round: a warp draws each
// Products of float16 with float32 results exist since PyTorch 2.8; before, float32 points stay float32.
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
template <typename T>
constexpr bool kSplit = std::is_same_v<T, float>;
#else
template <typename T>
constexpr bool kSplit = false;
#endif

constexpr int kRows = 64;  // points of a block of sums and center
constexpr int kWarps = kThreads / kWarp, kLaneColumns = 4, kTile = kWarp * kLaneColumns, kRowsAtOnce = 4;  // of member_sum

// One K-means problem per group g of G. Each has N points and K clusters, of which min(K, valid points) are used.
template <typename T>
struct Problem {
  int N, D, K, words, tiles;  // words: of 32 points; tiles: of kTile points
  const bool* valid;          // (G, N)
  T* sums;                    // (G, stretches of kRows points, D): of valid points
  int* most;                  // (G): the bits of the largest magnitude of valid points, a float
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

// The block's place in a grid of (groups, stretches of kRows points, stretches of kThreads columns), a column per thread.
struct Place {
  int stretches, stretch, first, last, d;  // the points first … last - 1, the column
  int64_t g;
  __device__ Place(int N, int D) {
    const int tiles = (D + kThreads - 1) / kThreads, rest = blockIdx.x / tiles;
    stretches = (N + kRows - 1) / kRows, stretch = rest % stretches, g = rest / stretches;
    first = stretch * kRows, last = min(N, first + kRows), d = blockIdx.x % tiles * kThreads + threadIdx.x;
  }
};

template <typename T>
__global__ void sums(const T* points, Problem<T> p) {
  const Place at(p.N, p.D);
  T sum = 0;
  float most = 0;
#pragma unroll 8
  for (int i = at.first; i < at.last; ++i)
    if (at.d < p.D && p.valid[at.g * p.N + i]) {
      const T value = points[(at.g * p.N + i) * p.D + at.d];
      sum += value;
      if (kSplit<T>) most = max(most, fabsf(value));
    }
  if (at.d < p.D) p.sums[(at.g * at.stretches + at.stretch) * p.D + at.d] = sum;
  if constexpr (kSplit<T>) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, offset));
    if (threadIdx.x % kWarp == 0) atomicMax(&p.most[at.g], __float_as_int(most));  // non-negative floats sort like ints
  }
}

// x: (G, N, D), or (2, G, N, D) halves: high, then low.
template <typename T, typename X>
__global__ void center(const T* points, Problem<T> p, X* x, int64_t size) {
  const Place at(p.N, p.D);
  int count = 0;
  for (int i = threadIdx.x; i < p.N; i += kThreads) count += p.valid[at.g * p.N + i];
  count = block_sum(count);
  if (at.d >= p.D) return;
  T mean = 0;
#pragma unroll 8
  for (int s = 0; s < at.stretches; ++s) mean += p.sums[(at.g * at.stretches + s) * p.D + at.d];
  mean /= max(count, 1);
  int exponent;  // minus the mean, no magnitude exceeds twice the largest; float16 ends at 2^16
  frexpf(2 * __int_as_float(p.most[at.g]), &exponent);
#pragma unroll 8
  for (int i = at.first; i < at.last; ++i) {
    const int64_t place = (at.g * p.N + i) * p.D + at.d;
    const T value = p.valid[at.g * p.N + i] ? points[place] - mean : T(0);
    if constexpr (kSplit<T>) {
      const float scaled = ldexpf(value, 15 - exponent);
      x[place] = static_cast<X>(scaled);
      x[size + place] = static_cast<X>(scaled - static_cast<float>(x[place]));
    } else {
      x[place] = value;
    }
  }
}

// Sums each of n values over a warp, n a power of two; lane l receives the sum of value l / (32 / n). Lanes trade half of
// their values until each has one: n + 3 shuffles for n = 8, instead of 40.
template <int n, typename T>
__device__ T warp_sums(T (&value)[n]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = n / 2, offset = kWarp / 2; offset > 0; half /= 2, offset /= 2)
    if (half > 0) {
      for (int v = 0; v < half; ++v) {
        const bool upper = lane & offset;
        const T other = __shfl_xor_sync(kAllLanes, upper ? value[v] : value[v + half], offset);
        value[v] = (upper ? value[v + half] : value[v]) + other;
      }
    } else {
      value[0] += __shfl_xor_sync(kAllLanes, value[0], offset);
    }
  return value[0];
}

// Inclusive prefix sum over the lanes of a warp.
template <typename V>
__device__ V warp_scan(V v) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const V other = __shfl_up_sync(kAllLanes, v, offset);
    if (static_cast<int>(threadIdx.x % kWarp) >= offset) v += other;
  }
  return v;
}

// Greedy k-means++. Each warp has U x 32 points in a row. A point's weight is its squared distance to the nearest seed, 1
// before the first seed, 0 if invalid. Sums are of type T within a warp and double over the warps.
template <typename T, int U>
__global__ void __launch_bounds__(kSeedThreads) seed(const double* uniforms, Problem<T> p, int trials) {
  constexpr int kAtOnce = 32 / U / (sizeof(T) / 4);  // candidates whose rows are read at once
  extern __shared__ __align__(16) char shared[];
  __shared__ double left[kMaxTrials][kWarp];  // total weight of each warp's points, given each candidate
  __shared__ double totals[kMaxTrials];
  __shared__ int picks[kMaxTrials];
  const int n = p.N, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, base = warp * U * kWarp + lane;
  const int64_t g = blockIdx.x;
  const T* gram = p.gram + g * n * n;
  T *weight = reinterpret_cast<T*>(shared), *square = weight + n;  // both (N)
  int count = 0;
  for (int u = 0; u < U; ++u)
    if (const int i = base + u * kWarp; i < n) {
      const bool valid = p.valid[g * n + i];
      weight[i] = valid, square[i] = gram[static_cast<int64_t>(i) * (n + 1)];
      count += valid;
    }
  const int own = warp_sum(count), used = min(p.K, block_sum(count));
  if (lane == 0) left[0][warp] = own;
  if (threadIdx.x == 0) p.used[g] = used;
  __syncthreads();
  int best = 0, first = 0;
  for (int k = 0; k < used; ++k) {
    if (warp < trials) {  // draws the first point whose cumulative weight exceeds u * total
      const double mass = left[best][lane], running = warp_scan(mass), total = __shfl_sync(kAllLanes, running, kWarp - 1);
      const double target = fmin(uniforms[(g * p.K + k) * trials + warp] * total, nextafter(total, 0.0));
      int pick = first;  // if the total weight is 0
      if (total > 0) {
        const int owner = __ffs(__ballot_sync(kAllLanes, running > target)) - 1;
        double passed = __shfl_sync(kAllLanes, running - mass, owner);
        unsigned past = 0;
        for (int start = owner * U * kWarp; start < min(n, (owner + 1) * U * kWarp) && !past; start += kWarp) {
          const T own = start + lane < n ? weight[start + lane] : 0, sum = warp_scan(own);
          const unsigned some = __ballot_sync(kAllLanes, own > 0);
          past = __ballot_sync(kAllLanes, own > 0 && passed + sum > target);
          if (some) pick = start + (past ? __ffs(past) - 1 : kWarp - 1 - __clz(some));
          passed += __shfl_sync(kAllLanes, sum, kWarp - 1);
        }
      }
      if (lane == 0) picks[warp] = pick;
    }
    __syncthreads();
    // A point's weight if the candidate with this row of gram becomes a seed
    const auto closest = [&](int i, T product, T half) {
      const T nearest = k ? weight[i] : weight[i] > 0 ? std::numeric_limits<T>::infinity() : T(0);
      return min(nearest, max(square[i] - 2 * (product - half), T(0)));
    };
    for (int t = 0; t < trials; t += kAtOnce) {
      T product[kAtOnce][U], sums[kAtOnce] = {};
      for (int v = 0; v < kAtOnce; ++v) {  // all loads before the first use
        const T* row = gram + static_cast<int64_t>(picks[min(t + v, trials - 1)]) * n;
        for (int u = 0; u < U; ++u) product[v][u] = t + v < trials && base + u * kWarp < n ? row[base + u * kWarp] : 0;
      }
      for (int v = 0; v < kAtOnce; ++v) {
        const T half = square[picks[min(t + v, trials - 1)]] / 2;
        for (int u = 0; u < U; ++u)
          if (base + u * kWarp < n) sums[v] += closest(base + u * kWarp, product[v][u], half);
      }
      const T sum = warp_sums(sums);
      constexpr int kLanes = kWarp / kAtOnce;
      if (lane % kLanes == 0 && t + lane / kLanes < trials) left[t + lane / kLanes][warp] = sum;
    }
    __syncthreads();
    if (warp < trials) {
      const double total = warp_sum(left[warp][lane]);
      if (lane == 0) totals[warp] = total;
    }
    __syncthreads();
    best = 0;
    for (int t = 1; t < trials; ++t)
      if (totals[t] < totals[best]) best = t;
    const int pick = picks[best];
    const T* row = gram + static_cast<int64_t>(pick) * n;
    for (int u = 0; u < U; ++u)
      if (const int i = base + u * kWarp; i < n) weight[i] = closest(i, row[i], square[pick] / 2);
    if (k == 0) first = pick;
    if (threadIdx.x == 0) p.seeds[g * p.K + k] = pick;
    __syncthreads();  // before the next round reads weights and writes picks
  }
}

// Sums the rows of a cluster's members in a matrix (N, columns), in the columns from `first` on, one column per thread
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

// x: (1 or 2, G, N, D) -> (G, N, N)
Tensor products(const Tensor& x) {
  const at::NoTF32Guard exact;  // and no autocast: in the precision of x, whatever the caller allows other products
  const c10::impl::ExcludeDispatchKeyGuard full(c10::autocast_dispatch_keyset);
  const Tensor high = x[0];
  if (x.size(0) == 1) return at::bmm(high, high.transpose(1, 2));
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
  const Tensor low = x[1];
  Tensor gram = at::bmm(high, high.transpose(1, 2), at::kFloat);
  at::baddbmm_out(gram, gram, high, low.transpose(1, 2), at::kFloat);
  at::baddbmm_out(gram, gram, low, high.transpose(1, 2), at::kFloat);
  return gram;
#endif
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
  for (int64_t g = 0; at_once < G && g < G; g += at_once) {  // fewer groups at a time, to limit memory
    const int64_t some = std::min(at_once, G - g);
    const auto [c, l] = kmeans_cuda(points.narrow(0, g, some), valid.narrow(0, g, some), uniforms.narrow(0, g, some), max_iters);
    out.narrow(0, g, some).copy_(c), label.narrow(0, g, some).copy_(l);
    if (g + some == G) return {out, label};
  }
  const Tensor in = points.contiguous(), ok = valid.contiguous(), u = uniforms.contiguous();
  const int64_t stretches = (N + kRows - 1) / kRows, blocks = G * stretches * ((D + kThreads - 1) / kThreads);
  Tensor sum = at::empty({G, stretches, D}, options), most = at::zeros({G}, integers);
  const int64_t words = (N + kWarp - 1) / kWarp, tiles = (N + kTile - 1) / kTile;
  Tensor dot = at::empty({G, K, N}, options), half = at::empty({G, K, tiles}, options);
  Tensor members = at::empty({G, K, words}, integers), seeds = at::empty({G, K}, integers), used = at::empty({G}, integers);
  Tensor changed = at::zeros({max_iters + 1, G, K + 1}, flags);
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "kmeans", [&] {
    using T = scalar_t;
    using X = std::conditional_t<kSplit<T>, c10::Half, T>;
    Tensor x = at::empty({kSplit<T> ? 2 : 1, G, N, D}, options.dtype(c10::CppTypeToScalarType<X>::value));
    Problem<T> p{};
    p.N = N, p.D = D, p.K = K, p.words = words, p.tiles = tiles;
    p.valid = ok.const_data_ptr<bool>(), p.label = label.mutable_data_ptr<int64_t>();
    p.sums = sum.mutable_data_ptr<T>(), p.most = most.mutable_data_ptr<int>();
    p.dots = dot.mutable_data_ptr<T>(), p.halves = half.mutable_data_ptr<T>();
    p.members = reinterpret_cast<unsigned*>(members.mutable_data_ptr<int>());
    p.seeds = seeds.mutable_data_ptr<int>(), p.used = used.mutable_data_ptr<int>();
    sums<T><<<blocks, kThreads, 0, stream>>>(in.const_data_ptr<T>(), p);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    center<T, X><<<blocks, kThreads, 0, stream>>>(in.const_data_ptr<T>(), p, x.mutable_data_ptr<X>(), G * N * D);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const Tensor gram = products(x);
    x = Tensor();
    p.gram = gram.const_data_ptr<T>();
    const auto seeding = N <= 4 * kSeedThreads ? seed<T, 4> : seed<T, 8>;
    allow_shared(reinterpret_cast<const void*>(seeding), 2 * N * sizeof(T));
    seeding<<<G, kSeedThreads, 2 * N * sizeof(T), stream>>>(u.const_data_ptr<double>(), p, trials);
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
