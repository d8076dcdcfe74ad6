// kmeans on the GPU. Equivalent to: kmeans_ref in r2o.py.
//
// The host only launches, always the same number of kernels; nothing is read back.
//   Seeding, per round:   draw      a block per group: T candidates, by a running sum of the distances
//                         bmm       their dot products with all points, (N, D) x (D, T)
//                         measure   a block per (group, candidate): the total distance it would leave
//                         choose    a block per group: keeps the best candidate and the distances it leaves
//   Lloyd, per iteration: baddbmm   the scores, (N, D) x (D, K)
//                         assign    a warp per point: the nearest centre, lowest id among equals; raises changed[g]
//                         update    a block per centre: the mean of its points, in order; returns at once where the
//                                   group's assignment did not change, which then holds in all iterations to come
// All sums have a fixed order. Floor: K - 1 + 2 iterations reads of the points, from L2 at training size.
#include <ATen/Dispatch.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "../common.h"

namespace r2o {
namespace {

constexpr int kThreads = 256;

// Group g's T candidates for seed k: the first point at which the running sum of weights passes u times their total. A
// point weighs its distance from the seeds so far (1 for the first seed), 0 where not valid. Copies their rows.
template <typename T>
__global__ void draw(const T* points, const bool* valid, const T* distance, const double* uniforms, const int64_t* seeds, int64_t* picks, T* rows,
                     int k, int N, int D, int K, int trials) {
  __shared__ double start[kThreads + 1];  // running sum before each thread's stretch of points
  const int64_t g = blockIdx.x;
  const int stretch = (N + kThreads - 1) / kThreads, begin = min(N, static_cast<int>(threadIdx.x) * stretch), end = min(N, begin + stretch);
  const auto weight = [&](int i) { return valid[g * N + i] ? (k ? static_cast<double>(distance[g * N + i]) : 1.0) : 0.0; };
  double sum = 0;
  for (int i = begin; i < end; ++i) sum += weight(i);
  start[threadIdx.x + 1] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    start[0] = 0;
    for (int t = 1; t <= kThreads; ++t) start[t] += start[t - 1];
  }
  __syncthreads();
  const double total = start[kThreads];
  for (int t = 0; t < trials; ++t) {
    const double target = fmin(uniforms[(g * K + k) * trials + t] * total, nextafter(total, 0.0));
    if (total > 0 && start[threadIdx.x] <= target && target < start[threadIdx.x + 1]) {  // this thread's stretch
      double running = start[threadIdx.x];
      int pick = begin;
      for (int i = begin; i < end; ++i)
        if (weight(i) > 0) {
          pick = i;
          running += weight(i);
          if (running > target) break;
        }
      picks[g * trials + t] = pick;
    } else if (total <= 0 && threadIdx.x == 0) {
      picks[g * trials + t] = k ? seeds[g * K] : 0;  // no other point is left
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(trials) * D; i += blockDim.x)
    rows[g * trials * D + i] = points[(g * N + picks[g * trials + i / D]) * D + i % D];
}

template <typename T>
__device__ T distance_to(const T* dot, const T* sq, T sq_pick) {
  return fmax(*sq - 2 * (*dot - sq_pick / 2), static_cast<T>(0));
}

// left[g, t]: the total distance to the nearest seed if candidate t were the next one.
template <typename T>
__global__ void measure(const T* dots, const T* sq, const bool* valid, const T* distance, const int64_t* picks, double* left, int N, int trials) {
  __shared__ double partial[kThreads];
  const int64_t g = blockIdx.x / trials, t = blockIdx.x % trials;
  const T sq_pick = sq[g * N + picks[blockIdx.x]];
  double sum = 0;
  for (int64_t i = g * N + threadIdx.x; i < (g + 1) * N; i += kThreads)
    if (valid[i]) sum += fmin(distance_to(dots + i * trials + t, sq + i, sq_pick), distance[i]);
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) left[blockIdx.x] = partial[0];
}

// The candidate that leaves least becomes seed k.
template <typename T>
__global__ void choose(const T* dots, const T* sq, const int64_t* picks, const double* left, const T* rows, T* distance, int64_t* seeds, T* centers,
                       int k, int N, int D, int K, int trials) {
  const int64_t g = blockIdx.x;
  int best = 0;
  for (int t = 1; t < trials; ++t)
    if (left[g * trials + t] < left[g * trials + best]) best = t;
  const int64_t pick = picks[g * trials + best];
  for (int64_t i = g * N + threadIdx.x; i < (g + 1) * N; i += blockDim.x)
    distance[i] = fmin(distance_to(dots + i * trials + best, sq + i, sq[g * N + pick]), distance[i]);
  for (int d = threadIdx.x; d < D; d += blockDim.x) centers[(g * K + k) * D + d] = rows[(g * trials + best) * D + d];
  if (threadIdx.x == 0) seeds[g * K + k] = pick;
}

__global__ void count_valid(const bool* valid, int* count, int N) {  // a block per group
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  int n = 0;
  for (int i = threadIdx.x; i < N; i += blockDim.x) n += valid[static_cast<int64_t>(blockIdx.x) * N + i];
  atomicAdd(&total, n);
  __syncthreads();
  if (threadIdx.x == 0) count[blockIdx.x] = total;
}

// label: -1 where not valid. A group of n < K valid points has n clusters.
template <typename T>
__global__ void assign(const T* scores, const bool* valid, const int* count, int64_t* label, int* changed, int64_t rows, int N, int K) {
  const int64_t row = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows || !valid[row]) return;
  const int clusters = min(K, count[row / N]);
  T best = -std::numeric_limits<T>::infinity();
  int id = 0;
  for (int k = lane; k < clusters; k += 32)
    if (scores[row * K + k] > best) best = scores[row * K + (id = k)];
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_down_sync(0xffffffff, best, offset);
    const int other_id = __shfl_down_sync(0xffffffff, id, offset);
    if (other > best || (other == best && other_id < id)) best = other, id = other_id;
  }
  if (lane == 0 && label[row] != id) {
    label[row] = id;
    changed[row / N] = 1;
  }
}

template <typename T>
__global__ void update(const T* points, const int64_t* label, const int* changed, T* centers, int N, int D, int K) {
  const int64_t g = blockIdx.x / K, k = blockIdx.x % K;
  if (!changed[g]) return;
  for (int d = threadIdx.x; d < D; d += blockDim.x) {
    T sum = 0;
    int size = 0;
    for (int64_t i = g * N; i < (g + 1) * N; ++i)
      if (label[i] == k) sum += points[i * D + d], ++size;
    if (size) centers[blockIdx.x * static_cast<int64_t>(D) + d] = sum / size;  // an emptied cluster keeps its centre
  }
}

// Spare clusters repeat centre 0; without a valid point all centres are 0.
template <typename T>
__global__ void fill_spare(const int* count, T* centers, int D, int K) {
  const int64_t g = blockIdx.x / K, k = blockIdx.x % K;
  if (k < count[g]) return;
  for (int d = threadIdx.x; d < D; d += blockDim.x) centers[blockIdx.x * static_cast<int64_t>(D) + d] = count[g] ? centers[g * K * D + d] : 0;
}

}  // namespace

std::tuple<Tensor, Tensor> kmeans_cuda(const Tensor& points, const Tensor& valid, const Tensor& uniforms, int64_t max_iters) {
  check_kmeans(points, valid, uniforms, max_iters);
  const c10::cuda::CUDAGuard guard(points.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t G = points.size(0), N = points.size(1), D = points.size(2), K = uniforms.size(1), trials = uniforms.size(2);
  Tensor centers = at::zeros({G, K, D}, points.options());
  Tensor label = at::full({G, N}, -1, points.options().dtype(at::kLong));
  if (points.numel() == 0) return {centers, label};
  const Tensor x = points.contiguous(), ok = valid.contiguous(), u = uniforms.contiguous(), sq = x.square().sum(-1);
  const auto integers = points.options().dtype(at::kInt), longs = points.options().dtype(at::kLong);
  Tensor count = at::empty({G}, integers), changed = at::zeros({max_iters + 1, G}, integers);
  Tensor picks = at::zeros({G, trials}, longs), seeds = at::zeros({G, K}, longs), rows = at::empty({G, trials, D}, points.options());
  Tensor left = at::empty({G, trials}, points.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "kmeans", [&] {
    Tensor distance = at::full({G, N}, std::numeric_limits<scalar_t>::infinity(), points.options());
    const auto *x_data = x.const_data_ptr<scalar_t>(), *sq_data = sq.const_data_ptr<scalar_t>();
    auto *center_data = centers.mutable_data_ptr<scalar_t>(), *distance_data = distance.mutable_data_ptr<scalar_t>();
    const auto* ok_data = ok.const_data_ptr<bool>();
    auto *pick_data = picks.mutable_data_ptr<int64_t>(), *seed_data = seeds.mutable_data_ptr<int64_t>(), *label_data = label.mutable_data_ptr<int64_t>();
    auto* left_data = left.mutable_data_ptr<double>();
    auto *count_data = count.mutable_data_ptr<int>(), *changed_data = changed.mutable_data_ptr<int>();
    count_valid<<<G, kThreads, 0, stream>>>(ok_data, count_data, N);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    for (int k = 0; k < K; ++k) {
      draw<<<G, kThreads, 0, stream>>>(x_data, ok_data, distance_data, u.const_data_ptr<double>(), seed_data, pick_data, rows.mutable_data_ptr<scalar_t>(), k, N, D, K, trials);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      const Tensor dots = at::bmm(x, rows.transpose(1, 2));  // (G, N, T)
      measure<<<G * trials, kThreads, 0, stream>>>(dots.const_data_ptr<scalar_t>(), sq_data, ok_data, distance_data, pick_data, left_data, N, trials);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      choose<<<G, kThreads, 0, stream>>>(dots.const_data_ptr<scalar_t>(), sq_data, pick_data, left_data, rows.const_data_ptr<scalar_t>(), distance_data, seed_data, center_data, k, N, D, K, trials);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    for (int64_t i = 0; i <= max_iters; ++i) {
      const Tensor scores = at::baddbmm(centers.square().sum(-1).div(-2).unsqueeze(1), x, centers.transpose(1, 2));  // (G, N, K)
      assign<<<(G * N * 32 + kThreads - 1) / kThreads, kThreads, 0, stream>>>(scores.const_data_ptr<scalar_t>(), ok_data, count_data, label_data, changed_data + i * G, G * N, N, K);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      if (i == max_iters) break;
      update<<<G * K, kThreads, 0, stream>>>(x_data, label_data, changed_data + i * G, center_data, N, D, K);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    fill_spare<<<G * K, kThreads, 0, stream>>>(count_data, center_data, D, K);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {centers, label};
}

TORCH_LIBRARY_IMPL(r2o, CUDA, m) { m.impl("kmeans", &kmeans_cuda); }

}  // namespace r2o
