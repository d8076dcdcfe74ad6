// What a translated .cu source sees instead of CUDA: the names it uses, as functions of the emulator (emulate.cpp).
// build.py has replaced the three things that C++ cannot express: launches and the two kinds of __shared__ arrays.
#ifndef R2O_EMULATE_CUDA_H  // g++ warns of #pragma once in a header that it precompiles
#define R2O_EMULATE_CUDA_H
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n)
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
#define C10_CUDA_CHECK(status)

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1);  // throws beyond what a launch allows
};

namespace emulate {

struct Config {
  dim3 grid, block;
  size_t shared = 0;
  int stream = 0;
};

enum class Access { read, write, atomic };
enum class Lane { down, up, same, bfly };

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void access(const void* p, size_t bytes, Access kind);
void barrier(int line);
uint64_t exchange(int line, unsigned mask, uint64_t value, Lane kind, int by);  // a shuffle
unsigned ballot(int line, unsigned mask, bool value);
void* static_shared(const void* key, size_t bytes, size_t align);
void* dynamic_shared();
void run(const Config& config, const char* name, const void* kernel, const std::function<void()>& body);
void allow_shared(const void* kernel, size_t bytes);

template <typename T>
T& shared(const void* key) {
  return *static_cast<T*>(static_shared(key, sizeof(T), alignof(T)));
}

// kernel<<<config>>>(arguments), which are converted to the kernel's parameters first.
template <typename... P, typename... A>
void launch(const Config& config, const char* name, void (*kernel)(P...), A&&... arguments) {
  const auto call = std::bind([kernel](const std::decay_t<P>&... p) { kernel(p...); }, static_cast<std::decay_t<P>>(arguments)...);
  run(config, name, reinterpret_cast<const void*>(kernel), std::ref(call));  // the parameters stay on this stack
}

template <typename T>
T shuffle(int line, unsigned mask, T value, Lane kind, int by) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(line, mask, bits, kind, by);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T atomic_add(T* p, T value) {
  access(p, sizeof(T), Access::atomic);
  const T old = *p;
  *p = old + value;
  return old;
}

template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T atomic_max(T* p, T value) {
  access(p, sizeof(T), Access::atomic);
  const T old = *p;
  *p = old < value ? value : old;
  return old;
}

template <typename To, typename From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace emulate

#define threadIdx (emulate::thread_index())
#define blockIdx (emulate::block_index())
#define blockDim (emulate::block_size())
#define gridDim (emulate::grid_size())
#define __syncthreads() emulate::barrier(__LINE__)
#define __syncwarp() emulate::ballot(__LINE__, 0xffffffff, true)
#define __shfl_down_sync(mask, value, by) emulate::shuffle(__LINE__, mask, value, emulate::Lane::down, by)
#define __shfl_up_sync(mask, value, by) emulate::shuffle(__LINE__, mask, value, emulate::Lane::up, by)
#define __shfl_xor_sync(mask, value, by) emulate::shuffle(__LINE__, mask, value, emulate::Lane::bfly, by)
#define __shfl_sync(mask, value, lane) emulate::shuffle(__LINE__, mask, value, emulate::Lane::same, lane)
#define __ballot_sync(mask, value) emulate::ballot(__LINE__, mask, value)
#define __popc(x) __builtin_popcount(x)
#define __ffs(x) __builtin_ffs(x)
#define __clz(x) ((x) ? __builtin_clz(x) : 32)
#define atomicAdd(p, value) emulate::atomic_add(p, value)
#define atomicMax(p, value) emulate::atomic_max(p, value)
#define __float_as_int(x) emulate::bits_as<int>(x)
#define __int_as_float(x) emulate::bits_as<float>(x)

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// The few names of the CUDA runtime and of c10/cuda.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
inline cudaError_t cudaFuncSetAttribute(const void* kernel, int, int bytes) {
  emulate::allow_shared(kernel, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
inline int getCurrentCUDAStream() { return 0; }
}  // namespace c10::cuda
#endif
