// merged = W + s·B·A for every adapted linear of a model in one launch, from the pristine W each time.
//
// W [rows, columns] of type T, A [rank, columns] and B [rows, rank] float32. The result goes to `out` (type T), to
// `fp8` (e4m3 with one scale per row, amax/448), or both. A block owns 32 whole rows, so the row maxima never leave it:
// with fp8 it sweeps its rows twice, and the second read of W comes from L2.
//
// float32 throughout: acc = fma over the rank in order, merged = fma(s, acc, W), one rounding.

#include <cuda_fp8.h>

#include "launch.cuh"

namespace advgrpo {

constexpr int kRows = 32;      // per block: 8 warps of 4 rows
constexpr int kColumns = 256;  // per step: 32 lanes of 8 columns
constexpr int kRank = 32;      // per step
constexpr int kThreads = 256;
constexpr int kPlane = kColumns / 2 + 16;  // columns 8l..8l+3 and 8l+4..8l+7 apart: 128-bit reads without bank conflicts
constexpr float kFp8Max = 448.0f;
constexpr float kFp8Floor = 1e-30f;  // FP8_FLOOR in ops/_residual_norm.py

struct MergeModule {  // ops/merge_lora.py packs the same 12 words
  const void* base;
  const float* a;
  const float* b;
  void* out;
  unsigned char* fp8;
  float* fp8_scale;
  int64_t rows, columns, rank, first_block;
  int64_t vectorised;  // columns a multiple of 8 and every pointer 16-byte aligned
  double scale;
};

template <typename T>
__device__ __forceinline__ void load8(const T* pointer, int64_t count, bool vectorised, float (&values)[8]) {
  if (vectorised && count >= 8) {
#pragma unroll
    for (int part = 0; part < 8; part += Pack<T>::kCount) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(pointer + part);
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) values[part + i] = to_float(pack.values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < count ? to_float(pointer[i]) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void store8(T* pointer, int64_t count, bool vectorised, const float (&values)[8]) {
  if (vectorised && count >= 8) {
#pragma unroll
    for (int part = 0; part < 8; part += Pack<T>::kCount) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) pack.values[i] = from_float<T>(values[part + i]);
      *reinterpret_cast<Pack<T>*>(pointer + part) = pack;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) pointer[i] = from_float<T>(values[i]);
  }
}

__device__ __forceinline__ void store8_fp8(
    unsigned char* pointer, int64_t count, bool vectorised, const float (&values)[8], float inverse) {
  uint2 bytes = make_uint2(0, 0);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float2 pair = make_float2(values[i] * inverse, values[i + 1] * inverse);
    const unsigned two = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
    (i < 4 ? bytes.x : bytes.y) |= two << (8 * (i % 4));
  }
  if (vectorised && count >= 8) {
    *reinterpret_cast<uint2*>(pointer) = bytes;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) pointer[i] = static_cast<unsigned char>((i < 4 ? bytes.x : bytes.y) >> (8 * (i % 4)));
  }
}

struct Factors {
  float a[kRank][2 * kPlane];
  float b[kRank][kRows];
};

// A and B of this step of columns and rank into shared memory, zeros outside.
__device__ __forceinline__ void load_factors(
    Factors& factors, const MergeModule& m, int64_t row0, int64_t column0, int64_t rank0) {
  const float* a = in_global(m.a);
  const float* b = in_global(m.b);
#pragma unroll
  for (int part = 0; part < kRank * kColumns / 4; part += kThreads) {
    const int r = (part + threadIdx.x) / (kColumns / 4), c = (part + threadIdx.x) % (kColumns / 4) * 4;
    float4 value = make_float4(0, 0, 0, 0);
    if (rank0 + r < m.rank) {
      const float* source = a + (rank0 + r) * m.columns + column0 + c;
      const int64_t count = m.columns - column0 - c;
      if (m.vectorised && count >= 4) {
        value = *reinterpret_cast<const float4*>(source);
      } else {
        if (count > 0) value.x = source[0];
        if (count > 1) value.y = source[1];
        if (count > 2) value.z = source[2];
        if (count > 3) value.w = source[3];
      }
    }
    *reinterpret_cast<float4*>(&factors.a[r][(c / 4 % 2) * kPlane + c / 8 * 4]) = value;
  }
#pragma unroll
  for (int part = 0; part < kRank * kRows; part += kThreads) {
    const int r = (part + threadIdx.x) % kRank, n = (part + threadIdx.x) / kRank;
    const bool inside = rank0 + r < m.rank && row0 + n < m.rows;
    factors.b[r][n] = inside ? b[(row0 + n) * m.rank + rank0 + r] : 0.0f;
  }
}

// acc[i][j] = sum over the rank of B[row + i]·A[8·lane + j], for this thread's 4 rows and 8 columns.
__device__ __forceinline__ void accumulate(
    Factors& factors, const MergeModule& m, int64_t row0, int64_t column0, float (&acc)[4][8]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t rank0 = 0; rank0 < m.rank; rank0 += kRank) {
    __syncthreads();
    load_factors(factors, m, row0, column0, rank0);
    __syncthreads();
#pragma unroll 4
    for (int r = 0; r < kRank; ++r) {
      const float4 left = *reinterpret_cast<const float4*>(&factors.a[r][lane * 4]);
      const float4 right = *reinterpret_cast<const float4*>(&factors.a[r][kPlane + lane * 4]);
      const float4 b4 = *reinterpret_cast<const float4*>(&factors.b[r][warp * 4]);
      const float a[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
      const float b[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[i][j] = fmaf(b[i], a[j], acc[i][j]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_lora_kernel(const MergeModule* modules, const int* module_of_block) {
  __shared__ Factors factors;
  const MergeModule m = modules[module_of_block[blockIdx.x]];
  const float scale = static_cast<float>(m.scale);
  const int64_t row0 = (blockIdx.x - m.first_block) * kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* base = in_global(static_cast<const T*>(m.base));
  float amax[4] = {0, 0, 0, 0}, inverse[4] = {0, 0, 0, 0};
  for (int sweep = 0; sweep < (m.fp8 ? 2 : 1); ++sweep) {
    for (int64_t column0 = 0; column0 < m.columns; column0 += kColumns) {
      float acc[4][8] = {};
      accumulate(factors, m, row0, column0, acc);
      const int64_t column = column0 + lane * 8, count = m.columns - column;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + warp * 4 + i, at = row * m.columns + column;
        if (row >= m.rows || count <= 0) continue;
        float merged[8];
        load8(base + at, count, m.vectorised, merged);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          merged[j] = fmaf(scale, acc[i][j], merged[j]);
          amax[i] = fmaxf(amax[i], fabsf(merged[j]));
        }
        if (sweep == 1) {
          store8_fp8(in_global(m.fp8) + at, count, m.vectorised, merged, inverse[i]);
        } else if (m.out) {
          store8(in_global(static_cast<T*>(m.out)) + at, count, m.vectorised, merged);
        }
      }
    }
    if (!m.fp8 || sweep == 1) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      for (int offset = 16; offset > 0; offset /= 2)
        amax[i] = fmaxf(amax[i], __shfl_xor_sync(0xffffffff, amax[i], offset));
      amax[i] = fmaxf(amax[i], kFp8Floor);
      inverse[i] = __fdiv_rn(kFp8Max, amax[i]);
      const int64_t row = row0 + warp * 4 + i;
      if (lane == 0 && row < m.rows) in_global(m.fp8_scale)[row] = amax[i] * (1.0f / kFp8Max);
    }
  }
}

}  // namespace advgrpo

// Rows of W per block: the table must give a module of `rows` rows ceil(rows / this) blocks.
ADVGRPO_EXPORT int advgrpo_merge_lora_rows_per_block() { return advgrpo::kRows; }

// dtype: 0 float32, 1 float16, 2 bfloat16, of every W and out. Returns cudaError_t.
ADVGRPO_EXPORT int advgrpo_merge_lora(
    const void* modules, const void* module_of_block, int64_t blocks, int dtype, void* stream) {
  using namespace advgrpo;
  const auto* table = static_cast<const MergeModule*>(modules);
  const auto* of_block = static_cast<const int*>(module_of_block);
  const auto queue = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(blocks));
  switch (dtype) {
    case 0: merge_lora_kernel<float><<<grid, kThreads, 0, queue>>>(table, of_block); break;
    case 1: merge_lora_kernel<__half><<<grid, kThreads, 0, queue>>>(table, of_block); break;
    case 2: merge_lora_kernel<__nv_bfloat16><<<grid, kThreads, 0, queue>>>(table, of_block); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
