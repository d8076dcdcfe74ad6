// Dot products and weighted sums of rows of channels for the CPU ops. They use the widest vectors that PyTorch detects,
// or that ATEN_CPU_CAPABILITY selects. BLAS is slow when one operand has few rows, and would start its own threads
// inside ours.
#pragma once
#include <ATen/Version.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace r2o {

constexpr int64_t kBlock = 24;  // rows of a per pass over b; they stay in the L2 cache

// One tile of a matrix of dot products, accumulated in registers. The summation order does not depend on the tile, so
// equal rows give bitwise equal results. Rows past the end alias the first row and are not written.
template <int kBytes, int kRows, int kCols, typename T>
__attribute__((always_inline)) inline void dot_tile(const T* a, const T* b, int64_t rows, int64_t D, T* out, int64_t stride) {
  typedef T Vector __attribute__((vector_size(kBytes)));
  constexpr int kLanes = kBytes / sizeof(T);
  const T* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = a + (r < rows ? r : 0) * D;
  Vector sum[kRows][kCols] = {};
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    Vector x, y[kCols];
    for (int c = 0; c < kCols; ++c) std::memcpy(&y[c], b + c * D + d, kBytes);
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(&x, row[r] + d, kBytes);
      for (int c = 0; c < kCols; ++c) sum[r][c] += x * y[c];
    }
  }
  for (int r = 0; r < kRows && r < rows; ++r)
    for (int c = 0; c < kCols; ++c) {
      T total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += sum[r][c][lane];
      for (int64_t rest = d; rest < D; ++rest) total += row[r][rest] * b[c * D + rest];
      out[r * stride + c] = total;
    }
}

template <int kBytes, int kRows, int kCols, typename T>
__attribute__((always_inline)) inline void dots_in(const T* a, const T* b, int64_t n, int64_t m, int64_t D, T* out) {
  const int64_t tiles = (m + kCols - 1) / kCols;
  for (int64_t t = 0; t < tiles; ++t) {  // split columns evenly: 5 = 3 + 2, not 4 + 1
    const int64_t c = t * m / tiles, cols = (t + 1) * m / tiles - c;
    for (int64_t r = 0; r < n; r += kRows) {
      const auto tile = [&](auto width) __attribute__((always_inline)) {
        dot_tile<kBytes, kRows, width()>(a + r * D, b + c * D, n - r, D, out + r * m + c, m);
      };
      if constexpr (kCols == 4) {
        if (cols == 4) tile(std::integral_constant<int, 4>());
        if (cols == 3) tile(std::integral_constant<int, 3>());
      }
      if (cols == 2) tile(std::integral_constant<int, 2>());
      if (cols == 1) tile(std::integral_constant<int, 1>());
    }
  }
}

template <int kBytes, typename T>
__attribute__((always_inline)) inline void add_in(T* out, const T* in, T weight, int64_t n) {
  typedef T Vector __attribute__((vector_size(kBytes)));
  constexpr int64_t kLanes = kBytes / sizeof(T);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vector x, y;
    std::memcpy(&x, in + i, kBytes);
    std::memcpy(&y, out + i, kBytes);
    y += weight * x;
    std::memcpy(out + i, &y, kBytes);
  }
  for (; i < n; ++i) out[i] += weight * in[i];
}

// Kernels for one instruction set, with tiles that fit in its 32 or 16 vector registers.
template <typename T>
struct Rows {
  // out[i, j] = a_i · b_j. a: (n, D), b: (m, D), out: (n, m), all contiguous.
  void (*dots)(const T* a, const T* b, int64_t n, int64_t m, int64_t D, T* out);
  // out[i] += weight * in[i]
  void (*add)(T* out, const T* in, T weight, int64_t n);
};

#ifdef __x86_64__
template <typename T>
__attribute__((target("avx512f"))) void dots_avx512(const T* a, const T* b, int64_t n, int64_t m, int64_t D, T* out) {
  dots_in<64, 6, 4>(a, b, n, m, D, out);
}
template <typename T>
__attribute__((target("avx512f"))) void add_avx512(T* out, const T* in, T weight, int64_t n) {
  add_in<64>(out, in, weight, n);
}
template <typename T>
__attribute__((target("avx2,fma"))) void dots_avx2(const T* a, const T* b, int64_t n, int64_t m, int64_t D, T* out) {
  dots_in<32, 6, 2>(a, b, n, m, D, out);
}
template <typename T>
__attribute__((target("avx2,fma"))) void add_avx2(T* out, const T* in, T weight, int64_t n) {
  add_in<32>(out, in, weight, n);
}
#endif
template <typename T>
void dots_plain(const T* a, const T* b, int64_t n, int64_t m, int64_t D, T* out) {
  dots_in<16, 6, 2>(a, b, n, m, D, out);
}
template <typename T>
void add_plain(T* out, const T* in, T weight, int64_t n) {
  add_in<16>(out, in, weight, n);
}

template <typename T>
const Rows<T> rows = [] {
#ifdef __x86_64__
  if (at::get_cpu_capability() == "AVX512") return Rows<T>{dots_avx512<T>, add_avx512<T>};
  if (at::get_cpu_capability() == "AVX2") return Rows<T>{dots_avx2<T>, add_avx2<T>};
#endif
  return Rows<T>{dots_plain<T>, add_plain<T>};
}();

}  // namespace r2o
