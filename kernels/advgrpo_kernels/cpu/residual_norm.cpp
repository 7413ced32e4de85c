// h = x + gate·out (+ gate2·out2) and y_i = LayerNorm(h)·(1 + scale_i) + shift_i, with their gradients: see
// ops/_residual_norm.py. Rows are (image, token) pairs in memory order; null pointers are what a call does without.
#include "lanes.h"

using namespace advgrpo;

struct Rows {
  int64_t B, T, C, stride_b, stride_t, gate_stride, modulation_stride;  // strides of rows in rows, of vectors in floats
};

// `body(row, image)` in the order in which the rows lie.
template <class Body>
static inline void each_token(const Rows &rows, int64_t work, int threads, Body body) {
  const bool by_token = rows.stride_t != 1;
  const int64_t B = rows.B, T = rows.T;
  each_row(B * T, work, threads, [=](int64_t row) { body(row, by_token ? row % B : row / T); });
}

struct Moments {
  float mean, inverse_std;
};

INLINE Moments moments(const float *h, int64_t C, float eps) {
  Lanes total = {}, squares = {};
  pieces(C, [&](int64_t c, auto count) { total += load(h + c, count); });
  const float mean = sum(total) / C;
  pieces(C, [&](int64_t c, auto count) {
    const Lanes centred = first(load(h + c, count) - mean, count);
    squares += centred * centred;
  });
  return {mean, 1.0f / std::sqrt(sum(squares) / C + eps)};
}

INLINE void modulate(const float *h, Moments of, const float *shift, const float *scale, float *y, int64_t C) {
  pieces(C, [=](int64_t c, auto count) {
    const Lanes normed = (load(h + c, count) - of.mean) * of.inverse_std;
    store(y + c, normed * (1.0f + load(scale + c, count)) + load(shift + c, count), count);
  });
}

extern "C" void advgrpo_residual_norm(const float *x, const float *out, const float *gate, const float *out2,
                                      const float *gate2, const float *shift, const float *scale, const float *shift2,
                                      const float *scale2, float *hidden, float *y, float *y2, const Rows *rows,
                                      float eps, int threads) {
  const Rows sizes = *rows;
  const int64_t C = sizes.C;
  each_token(sizes, 4 * C, threads, [=](int64_t row, int64_t image) {
    const int64_t at = row * C, gates = image * sizes.gate_stride, vectors = image * sizes.modulation_stride;
    if (out)
      pieces(C, [=](int64_t c, auto count) {
        Lanes h = load(x + at + c, count) + load(gate + gates + c, count) * load(out + at + c, count);
        if (out2) h += load(gate2 + gates + c, count) * load(out2 + at + c, count);
        store(hidden + at + c, h, count);
      });
    if (!y) return;
    const float *h = (out ? hidden : x) + at;
    const Moments of = moments(h, C, eps);
    modulate(h, of, shift + vectors, scale + vectors, y + at, C);
    if (y2) modulate(h, of, shift2 + vectors, scale2 + vectors, y2 + at, C);
  });
}

extern "C" void advgrpo_residual_norm_backward(const float *hidden, const float *hidden_grad, const float *y_grad,
                                               const float *y2_grad, const float *scale, const float *scale2,
                                               const float *gate, const float *gate2, float *x_grad, float *out_grad,
                                               float *out2_grad, const Rows *rows, float eps, int threads) {
  const Rows sizes = *rows;
  const int64_t C = sizes.C;
  each_token(sizes, 8 * C, threads, [=](int64_t row, int64_t image) {
    const int64_t at = row * C, gates = image * sizes.gate_stride, vectors = image * sizes.modulation_stride;
    const auto normed_grad = [=](int64_t c, auto count) {
      Lanes grad = load(y_grad + at + c, count) * (1.0f + load(scale + vectors + c, count));
      if (y2_grad) grad += load(y2_grad + at + c, count) * (1.0f + load(scale2 + vectors + c, count));
      return grad;
    };
    Moments of = {};
    float mean_grad = 0, along = 0;
    if (y_grad) {
      of = moments(hidden + at, C, eps);
      Lanes grads = {}, products = {};
      pieces(C, [&](int64_t c, auto count) {
        const Lanes grad = normed_grad(c, count);  // 0 in the lanes that are not there
        grads += grad;
        products += grad * ((load(hidden + at + c, count) - of.mean) * of.inverse_std);
      });
      mean_grad = sum(grads) / C, along = sum(products) / C;
    }
    pieces(C, [=](int64_t c, auto count) {
      Lanes grad = {};
      if (y_grad) {
        const Lanes normed = (load(hidden + at + c, count) - of.mean) * of.inverse_std;
        grad = of.inverse_std * (normed_grad(c, count) - mean_grad - normed * along);
      }
      if (hidden_grad) grad += load(hidden_grad + at + c, count);
      if (x_grad) store(x_grad + at + c, grad, count);
      if (out_grad) store(out_grad + at + c, load(gate + gates + c, count) * grad, count);
      if (out2_grad) store(out2_grad + at + c, load(gate2 + gates + c, count) * grad, count);
    });
  });
}
