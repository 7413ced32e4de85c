// AdamW on a list of float32 tensors, with clipping of the global gradient norm and an exponential moving average.
//
// Three launches, no host sync: sums of squares per chunk; their total, the clip factor and the bias corrections by one
// block, in double, with the step counted on the device; then one pass over parameter, gradient, both moments and
// average. A gradient norm that is not finite leaves everything as it was, the step count included.
//
// The order of operations per element is torch.optim.AdamW's. Sums run in a fixed order: same input, same bits.

#include "launch.cuh"

namespace advgrpo {

constexpr int kChunk = 8192;  // elements per block: 8 packs of four in each of 256 threads
constexpr int kThreads = 256;
constexpr int kTotalThreads = 1024;

struct AdamTensor {  // ops/multi_tensor_adamw.py packs the same 8 words
  float* parameter;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* ema;  // or null
  int64_t count, first_block;
  int64_t vectorised;  // every pointer 16-byte aligned
};

struct AdamState {  // float32 [4] in device memory
  float norm, clip, step_size, sqrt_correction2;
};

struct AdamSettings {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, ema_weight;
};

template <int kCount>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double of_warp[kCount / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kCount / 32; ++warp) total += of_warp[warp];
  return total;
}

__global__ void __launch_bounds__(kThreads)
    square_sums_kernel(const AdamTensor* tensors, const int* tensor_of_block, double* square_sums) {
  const AdamTensor t = tensors[tensor_of_block[blockIdx.x]];
  const float* grad = in_global(t.grad);
  const int64_t first = (blockIdx.x - t.first_block) * kChunk;
  float sum = 0;  // 32 squares per thread, then double
#pragma unroll
  for (int part = 0; part < kChunk; part += 4 * kThreads) {
    const int64_t at = first + part + 4 * threadIdx.x;
    if (t.vectorised && at + 4 <= t.count) {
      const Pack<float> pack = *reinterpret_cast<const Pack<float>*>(grad + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum = fmaf(pack.values[i], pack.values[i], sum);
    } else {
      for (int i = 0; i < 4; ++i)
        if (at + i < t.count) sum = fmaf(grad[at + i], grad[at + i], sum);
    }
  }
  const double total = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) square_sums[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kTotalThreads) adam_state_kernel(
    const double* square_sums, int64_t blocks, AdamState* state, int64_t* step, double lr, double beta1, double beta2,
    double max_norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kTotalThreads) sum += square_sums[i];
  sum = block_sum<kTotalThreads>(sum);
  if (threadIdx.x != 0) return;
  const float norm = static_cast<float>(sqrt(sum));
  state->norm = norm;
  if (!isfinite(norm)) return;
  const int64_t now = *step + 1;
  *step = now;
  state->clip = fminf(__fdiv_rn(static_cast<float>(max_norm), norm + 1e-6f), 1.0f);
  state->step_size = static_cast<float>(lr / (1.0 - pow(beta1, static_cast<double>(now))));
  state->sqrt_correction2 = static_cast<float>(sqrt(1.0 - pow(beta2, static_cast<double>(now))));
}

// torch.lerp: the form that is exact at both ends.
__device__ __forceinline__ float lerp(float from, float to, float weight) {
  return weight < 0.5f ? fmaf(weight, to - from, from) : to - (to - from) * (1.0f - weight);
}

struct Element {
  float parameter, exp_avg, exp_avg_sq, ema;
};

__device__ __forceinline__ void step_element(Element& e, float grad, const AdamState& state, const AdamSettings& s) {
  grad *= state.clip;
  e.parameter *= s.decay;
  e.exp_avg = lerp(e.exp_avg, grad, s.one_minus_beta1);
  e.exp_avg_sq = fmaf(s.one_minus_beta2 * grad, grad, e.exp_avg_sq * s.beta2);
  const float denominator = __fdiv_rn(__fsqrt_rn(e.exp_avg_sq), state.sqrt_correction2) + s.eps;
  e.parameter -= __fdiv_rn(state.step_size * e.exp_avg, denominator);
  e.ema = lerp(e.ema, e.parameter, s.ema_weight);
}

__global__ void __launch_bounds__(kThreads) adam_update_kernel(
    const AdamTensor* tensors, const int* tensor_of_block, const AdamState* state_pointer, AdamSettings settings) {
  const AdamState state = *state_pointer;
  if (!isfinite(state.norm)) return;
  const AdamTensor t = tensors[tensor_of_block[blockIdx.x]];
  float *parameter = in_global(t.parameter), *exp_avg = in_global(t.exp_avg), *exp_avg_sq = in_global(t.exp_avg_sq);
  const float* grad = in_global(t.grad);
  float* ema = t.ema ? in_global(t.ema) : nullptr;
  const int64_t first = (blockIdx.x - t.first_block) * kChunk;
#pragma unroll 2
  for (int part = 0; part < kChunk; part += 4 * kThreads) {
    const int64_t at = first + part + 4 * threadIdx.x;
    if (t.vectorised && at + 4 <= t.count) {
      using Four = Pack<float>;
      Four p = *reinterpret_cast<Four*>(parameter + at), m = *reinterpret_cast<Four*>(exp_avg + at);
      Four v = *reinterpret_cast<Four*>(exp_avg_sq + at), average = p;
      const Four g = *reinterpret_cast<const Four*>(grad + at);
      if (ema) average = *reinterpret_cast<Four*>(ema + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Element e{p.values[i], m.values[i], v.values[i], average.values[i]};
        step_element(e, g.values[i], state, settings);
        p.values[i] = e.parameter, m.values[i] = e.exp_avg, v.values[i] = e.exp_avg_sq, average.values[i] = e.ema;
      }
      *reinterpret_cast<Four*>(parameter + at) = p;
      *reinterpret_cast<Four*>(exp_avg + at) = m;
      *reinterpret_cast<Four*>(exp_avg_sq + at) = v;
      if (ema) *reinterpret_cast<Four*>(ema + at) = average;
    } else {
      for (int64_t i = at; i < at + 4 && i < t.count; ++i) {
        Element e{parameter[i], exp_avg[i], exp_avg_sq[i], ema ? ema[i] : 0.0f};
        step_element(e, grad[i], state, settings);
        parameter[i] = e.parameter, exp_avg[i] = e.exp_avg, exp_avg_sq[i] = e.exp_avg_sq;
        if (ema) ema[i] = e.ema;
      }
    }
  }
}

}  // namespace advgrpo

// Elements per block: the table must give a tensor of n elements ceil(n / this) blocks.
ADVGRPO_EXPORT int advgrpo_multi_tensor_adamw_elements_per_block() { return advgrpo::kChunk; }

// square_sums: double [blocks], state: float32 [4] (norm first), step: int64. Returns cudaError_t.
ADVGRPO_EXPORT int advgrpo_multi_tensor_adamw(
    const void* tensors, const void* tensor_of_block, int64_t blocks, void* square_sums, void* state, void* step,
    double lr, double beta1, double beta2, double eps, double weight_decay, double max_norm, double ema_decay,
    void* stream) {
  using namespace advgrpo;
  const auto* table = static_cast<const AdamTensor*>(tensors);
  const auto* of_block = static_cast<const int*>(tensor_of_block);
  auto* sums = static_cast<double*>(square_sums);
  auto* device_state = static_cast<AdamState*>(state);
  const auto queue = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(blocks));
  const AdamSettings settings{
      static_cast<float>(beta1), static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
      static_cast<float>(1.0 - beta2), static_cast<float>(eps), static_cast<float>(1.0 - lr * weight_decay),
      static_cast<float>(1.0 - ema_decay)};
  square_sums_kernel<<<grid, kThreads, 0, queue>>>(table, of_block, sums);
  adam_state_kernel<<<1, kTotalThreads, 0, queue>>>(
      sums, blocks, device_state, static_cast<int64_t*>(step), lr, beta1, beta2, max_norm);
  adam_update_kernel<<<grid, kThreads, 0, queue>>>(table, of_block, device_state, settings);
  return cudaGetLastError();
}
