// Helpers shared by the kernels.
#pragma once
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace r2o {

constexpr int kWarp = 32, kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffff;

// Allows a kernel `bytes` of dynamic shared memory. CUDA requires this above 48 KB, of which static arrays are a part.
inline void allow_shared(const void* kernel, size_t bytes) {
  const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess) cudaGetLastError();  // clears it for the next launch check
  TORCH_CHECK(status == cudaSuccess, "this input needs ", bytes >> 10, " KB of shared memory, more than this GPU has: use smaller maps");
}

// Appends i to list[0 … size) for each thread with `mine` set, in thread order. Returns the new size. All kThreads
// threads of the block must call it.
__device__ inline int append(int* list, int size, bool mine, int i) {
  __shared__ int found[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned lanes = __ballot_sync(kAllLanes, mine);
  if (lane == 0) found[warp] = __popc(lanes);
  __syncthreads();
  int place = size + __popc(lanes & ((1u << lane) - 1));
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) place += found[w];
    size += found[w];
  }
  if (mine) list[place] = i;
  __syncthreads();
  return size;
}

}  // namespace r2o
