// Helpers shared by the kernels.
#pragma once
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace r2o {

constexpr int kWarp = 32, kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffff;

// Allows a kernel `bytes` of dynamic shared memory. CUDA requires this above 48 KB, static arrays included.
inline void allow_shared(const void* kernel, size_t bytes) {
  const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaErrorInvalidValue) cudaGetLastError();  // clears it for the next launch check
  TORCH_CHECK(status != cudaErrorInvalidValue, "this input needs ", bytes >> 10, " KB of shared memory, more than this GPU has: use smaller maps or groups");
  C10_CUDA_CHECK(status);
}

}  // namespace r2o
