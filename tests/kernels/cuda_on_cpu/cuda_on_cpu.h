// Just enough of CUDA to run csrc/*.cu on a CPU: one fiber per thread of a block, blocks one after the other. A fiber
// runs to its next barrier or shuffle, then the next one does, so all reach it before any goes on.
#pragma once

#define __CUDA_RUNTIME_H__  // keeps launch.cuh from the real one
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __builtin_assume(condition)

struct dim3 {
  unsigned x;
  explicit dim3(unsigned n) : x(n) {}
};
struct uint2 { unsigned x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using cudaStream_t = void*;
constexpr int cudaErrorInvalidValue = 1;
inline int cudaGetLastError() { return 0; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
using std::isfinite;

// Round to nearest even on the bits; inputs of the tests are finite.
struct __nv_bfloat16 { uint16_t bits; };
using __half = _Float16;
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

enum { __NV_SATFINITE, __NV_E4M3 };
inline uint8_t e4m3(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float magnitude = std::fmin(std::fabs(value), 448.0f);
  int exponent = magnitude > 0 ? std::ilogb(magnitude) : -6;
  exponent = exponent < -6 ? -6 : exponent;
  const int eighths = int(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));  // 8..16, below 8 when subnormal
  return sign | uint8_t(eighths < 8 ? eighths : ((exponent + 7) << 3) + eighths - 8);
}
inline unsigned __nv_cvt_float2_to_fp8x2(float2 pair, int, int) { return e4m3(pair.x) | e4m3(pair.y) << 8; }

namespace on_cpu {
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};
inline std::vector<Fiber> fibers;
inline std::vector<double> exchanged;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned thread, block;

inline void yield() { swapcontext(&fibers[thread].context, &scheduler); }
inline void enter() {
  body();
  fibers[thread].done = true;
  swapcontext(&fibers[thread].context, &scheduler);
}
inline void run_block(unsigned threads) {
  fibers.assign(threads, Fiber{});
  exchanged.assign(threads, 0);
  for (auto& fiber : fibers) {
    fiber.stack.resize(1 << 16);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (thread = 0; thread < threads; ++thread) {
      if (fibers[thread].done) continue;
      running = true;
      swapcontext(&scheduler, &fibers[thread].context);
    }
  }
}
inline void launch(dim3 grid, unsigned threads, std::function<void()> kernel) {
  body = std::move(kernel);
  for (block = 0; block < grid.x; ++block) run_block(threads);
}
struct ThreadIndex {
  struct { operator unsigned() const { return thread; } } x;
};
struct BlockIndex {
  struct { operator unsigned() const { return block; } } x;
};
}  // namespace on_cpu

inline on_cpu::ThreadIndex threadIdx;
inline on_cpu::BlockIndex blockIdx;
inline void __syncthreads() { on_cpu::yield(); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned self = on_cpu::thread;
  on_cpu::exchanged[self] = value;
  on_cpu::yield();
  const T other = static_cast<T>(on_cpu::exchanged[self ^ mask]);
  on_cpu::yield();
  return other;
}
