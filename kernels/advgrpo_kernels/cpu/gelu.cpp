// y = gelu_tanh(x + bias) and its gradient: ops/gelu.py has the formulas. Rows M, width F, all dense.
#include "lanes.h"

using namespace advgrpo;

constexpr float TWICE_SQRT_2_OVER_PI = 1.5957691216057308f, CUBIC = 0.044715f;

INLINE Lanes sigmoid_of_2z(Lanes u) {
  return 1.0f / (1.0f + exp(-TWICE_SQRT_2_OVER_PI * u * (1.0f + CUBIC * u * u)));
}

extern "C" void advgrpo_gelu(const float *x, const float *bias, float *y, int64_t M, int64_t F, int threads) {
  each_row(M, F, threads, [=](int64_t row) {
    const int64_t at = row * F;
    pieces(F, [=](int64_t f, auto count) {
      Lanes u = load(x + at + f, count);
      if (bias) u += load(bias + f, count);
      store(y + at + f, u * sigmoid_of_2z(u), count);
    });
  });
}

extern "C" void advgrpo_gelu_backward(const float *x, const float *bias, const float *y_grad, float *x_grad, int64_t M,
                                      int64_t F, int threads) {
  each_row(M, F, threads, [=](int64_t row) {
    const int64_t at = row * F;
    pieces(F, [=](int64_t f, auto count) {
      Lanes u = load(x + at + f, count);
      if (bias) u += load(bias + f, count);
      const Lanes s = sigmoid_of_2z(u);
      const Lanes slope = s + u * s * (1.0f - s) * TWICE_SQRT_2_OVER_PI * (1.0f + 3.0f * CUBIC * u * u);
      store(x_grad + at + f, load(y_grad + at + f, count) * slope, count);
    });
  });
}
