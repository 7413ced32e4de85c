// RMSNorm of q and k over the head dim, turned where cos and sin are given, and its gradient: see ops/qk_rms_norm.py.
// q, k and v are parts of one tensor; strides in floats, heads lie side by side.
#include "lanes.h"

using namespace advgrpo;

struct Tokens {
  int64_t B, T, H, D, images;                        // of T tokens the first `images` are the image's, the others text
  int64_t turn_stride_h;                             // of cos and sin, 0 where one table is all heads'
  int64_t halves;                                    // whether pairs are (i, i + D/2), not neighbours
  int64_t x_stride_b, x_stride_t, x_stride_part;     // of q, k and v
  int64_t out_stride_b, out_stride_h, out_stride_t;  // of query and key, or of their and value's gradients
  int64_t grad_stride_b, grad_stride_t, grad_stride_part;  // of the gradients of q, k and v
};

struct Weights {
  const float *q, *k, *text_q, *text_k;  // [D] each
};

// `body(image, token)` in the order in which the images and tokens of x lie.
template <class Body>
static inline void each_token(const Tokens &tokens, int64_t work, int threads, Body body) {
  const bool by_token = tokens.x_stride_b < tokens.x_stride_t;
  const int64_t B = tokens.B, T = tokens.T;
  each_row(B * T, work, threads, [=](int64_t row) {
    by_token ? body(row % B, row / B) : body(row / T, row % T);
  });
}

INLINE float inverse_rms(const float *x, int64_t D, float eps) {
  Lanes squares = {};
  pieces(D, [&](int64_t d, auto count) {
    const Lanes part = load(x + d, count);
    squares += part * part;
  });
  return 1.0f / std::sqrt(sum(squares) / D + eps);
}

template <int STEP>
INLINE void turn_pairs(float *first, float *second, const float *cos, const float *sin, float direction, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float x = first[STEP * i], y = second[STEP * i], s = direction * sin[i];
    first[STEP * i] = x * cos[i] - y * s;
    second[STEP * i] = y * cos[i] + x * s;
  }
}

// A head of token t, on by direction = 1 and back by -1.
INLINE void turn(float *x, const float *cos, const float *sin, float direction, int64_t h, int64_t t, const Tokens &s) {
  const int64_t pairs = s.D / 2, at = h * s.turn_stride_h + t * pairs;
  if (s.halves) {
    turn_pairs<1>(x, x + pairs, cos + at, sin + at, direction, pairs);
  } else {
    turn_pairs<2>(x, x + 1, cos + at, sin + at, direction, pairs);
  }
}

INLINE void copy(const float *from, float *to, int64_t D) {
  pieces(D, [=](int64_t d, auto count) { store(to + d, load(from + d, count), count); });
}

extern "C" void advgrpo_qk_rms_norm(const float *x, const Weights *weights, const float *cos, const float *sin,
                                    float *query, float *key, const Tokens *tokens, float eps, int threads) {
  const Tokens s = *tokens;
  const Weights w = *weights;
  each_token(s, 4 * s.H * s.D, threads, [=](int64_t b, int64_t t) {
    const bool image = t < s.images;
    const auto norm = [=](const float *x, const float *weight, float *y, int64_t h) {
      const float inverse = inverse_rms(x, s.D, eps);
      pieces(s.D, [=](int64_t d, auto count) {
        store(y + d, load(x + d, count) * inverse * load(weight + d, count), count);
      });
      if (cos) turn(y, cos, sin, 1.0f, h, t, s);
    };
    for (int64_t h = 0; h < s.H; ++h) {
      const float *q = x + b * s.x_stride_b + t * s.x_stride_t + h * s.D;
      const int64_t to = b * s.out_stride_b + h * s.out_stride_h + t * s.out_stride_t;
      norm(q, image ? w.q : w.text_q, query + to, h);
      norm(q + s.x_stride_part, image ? w.k : w.text_k, key + to, h);
    }
  });
}

extern "C" void advgrpo_qk_rms_norm_backward(const float *x, const Weights *weights, const float *cos, const float *sin,
                                             const float *query_grad, const float *key_grad, const float *value_grad,
                                             float *x_grad, const Tokens *tokens, float eps, int threads) {
  const Tokens s = *tokens;
  const Weights w = *weights;
  each_token(s, 8 * s.H * s.D, threads, [=](int64_t b, int64_t t) {
    const bool image = t < s.images;
    const auto norm_backward = [=](const float *x, const float *weight, const float *y_grad, float *grad, int64_t h) {
      copy(y_grad, grad, s.D);
      if (cos) turn(grad, cos, sin, -1.0f, h, t, s);
      const float inverse = inverse_rms(x, s.D, eps);
      Lanes products = {};
      pieces(s.D, [&](int64_t d, auto count) {
        products += load(grad + d, count) * load(weight + d, count) * (load(x + d, count) * inverse);
      });
      const float along = sum(products) / s.D;
      pieces(s.D, [=](int64_t d, auto count) {
        const Lanes normed_grad = load(grad + d, count) * load(weight + d, count);
        store(grad + d, inverse * (normed_grad - load(x + d, count) * inverse * along), count);
      });
    };
    for (int64_t h = 0; h < s.H; ++h) {
      const float *q = x + b * s.x_stride_b + t * s.x_stride_t + h * s.D;
      float *q_grad = x_grad + b * s.grad_stride_b + t * s.grad_stride_t + h * s.D;
      const int64_t from = b * s.out_stride_b + h * s.out_stride_h + t * s.out_stride_t;
      norm_backward(q, image ? w.q : w.text_q, query_grad + from, q_grad, h);
      norm_backward(q + s.x_stride_part, image ? w.k : w.text_k, key_grad + from, q_grad + s.grad_stride_part, h);
      copy(value_grad + from, q_grad + 2 * s.grad_stride_part, s.D);
    }
  });
}
