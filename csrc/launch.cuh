// Shared by the launchers: one block works on one chunk of one tensor of a list, found through two tables in device
// memory. Nothing here needs torch: tables are built by advgrpo_kernels/ops/_csrc.py, errors are returned as
// cudaError_t.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define ADVGRPO_EXPORT extern "C" __attribute__((visibility("default")))

namespace advgrpo {

// A pointer read from a table compiles to generic loads unless the compiler is told where it points.
template <typename T>
__device__ __forceinline__ T* in_global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

template <typename T>
struct alignas(16) Pack {  // one 128-bit access
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ __half from_float<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

}  // namespace advgrpo
