// softmax(q·kᵀ·scale)·v over few tokens, and its gradient: see ops/small_attention.py. One (image, head) at a time, whose
// keys and values stay in the first caches; nothing is kept for the backward but q, k and v.
#include <vector>

#include "lanes.h"

using namespace advgrpo;

struct Sizes {
  int64_t B, H, Sq, S, D;  // D is a multiple of 16
};

// [B, H, tokens, D] with dense heads; strides in floats.
struct View {
  int64_t b, h, t;
};

constexpr int QUERIES = 4;  // rows of a tile: each value that is read serves four
// Lanes of a tile: as many sums as fit into registers, of which AVX-512 has 32, ARM 32 and AVX2 16.
#ifdef __AVX512F__
constexpr int WIDE = 4, WIDE_ROWS = 2;
#else
constexpr int WIDE = 1, WIDE_ROWS = 1;
#endif

// The upper lanes of a and the lower ones of b change places, in groups of `half`.
template <int half>
INLINE void exchange(Register &a, Register &b) {
  const Register first = a, second = b;
#ifdef __clang__  // has no shuffle by a vector, and makes one of this
  for (int lane = 0; lane < REGISTER; ++lane) {
    a[lane] = lane & half ? second[lane - half] : first[lane];
    b[lane] = lane & half ? second[lane] : first[lane + half];
  }
#else
  Ints lower, upper;
  for (int lane = 0; lane < REGISTER; ++lane) {
    lower[lane] = lane & half ? lane - half + REGISTER : lane;
    upper[lane] = lane & half ? lane + REGISTER : lane + half;
  }
  a = __builtin_shuffle(first, second, lower);
  b = __builtin_shuffle(first, second, upper);
#endif
}

template <int half, class T>
INLINE void exchange(Pair<T> &a, Pair<T> &b) {
  if constexpr (half * sizeof(float) == sizeof(T)) {
    const T upper = a.high;
    a.high = b.low, b.low = upper;
  } else {
    exchange<half>(a.low, b.low), exchange<half>(a.high, b.high);
  }
}

// Of all rows i and i + half of a square.
template <int half>
INLINE void exchange_rows(Lanes (&row)[LANES]) {
  for (int i = 0; i < LANES; ++i)
    if (!(i & half)) exchange<half>(row[i], row[i + half]);
}

// Four rows that a tile works on: the last one again where there are fewer.
struct Four {
  const float *row[QUERIES];
};

INLINE Four four(const float *rows, int64_t stride, int64_t first, int64_t count) {
  Four found;
  for (int r = 0; r < QUERIES; ++r) found.row[r] = rows + stride * (first + r < count ? first + r : count - 1);
  return found;
}

// to[r][j] = row r · column j of `columns` [D][width], for N vectors of j.
template <int N>
INLINE void products(const Four &rows, const float *columns, float *to, int64_t width, int64_t D) {
  Lanes total[QUERIES][N] = {};
  for (int64_t d = 0; d < D; ++d)
    for (int n = 0; n < N; ++n) {
      const Lanes column = load(columns + d * width + n * LANES);
      for (int r = 0; r < QUERIES; ++r) total[r][n] += rows.row[r][d] * column;
    }
  for (int r = 0; r < QUERIES; ++r)
    for (int n = 0; n < N; ++n) store(to + r * width + n * LANES, total[r][n]);
}

// The same for all `width` columns, a multiple of 16.
INLINE void all_products(const Four &rows, const float *columns, float *to, int64_t width, int64_t D) {
  int64_t j = 0;
  for (; j + WIDE * LANES <= width; j += WIDE * LANES) products<WIDE>(rows, columns + j, to + j, width, D);
  for (; j < width; j += LANES) products<1>(rows, columns + j, to + j, width, D);
}

// to[r] = Σ_j weights[r·across + j·along]·rows[j], D wide, times factor[r]; the first `count` of four.
template <int N>
INLINE void weighted_rows(const float *weights, int64_t across, int64_t along, const float *rows, int64_t stride,
                          int64_t length, const float *factor, float *to, int64_t to_stride, int64_t count) {
  Lanes total[QUERIES][N] = {};
  for (int64_t j = 0; j < length; ++j)
    for (int n = 0; n < N; ++n) {
      const Lanes row = load(rows + j * stride + n * LANES);
      for (int r = 0; r < QUERIES; ++r) total[r][n] += weights[r * across + j * along] * row;
    }
  for (int r = 0; r < count; ++r)
    for (int n = 0; n < N; ++n) store(to + r * to_stride + n * LANES, total[r][n] * factor[r]);
}

INLINE void all_weighted_rows(const float *weights, int64_t across, int64_t along, const float *rows, int64_t stride,
                              int64_t length, const float *factor, float *to, int64_t to_stride, int64_t count,
                              int64_t D) {
  int64_t d = 0;
  for (; d + WIDE_ROWS * LANES <= D; d += WIDE_ROWS * LANES)
    weighted_rows<WIDE_ROWS>(weights, across, along, rows + d, stride, length, factor, to + d, to_stride, count);
  for (; d < D; d += LANES)
    weighted_rows<1>(weights, across, along, rows + d, stride, length, factor, to + d, to_stride, count);
}

// Of four rows of products: e^((s - largest)·scale) in their place, 0 beyond S; factor[r] = 1 over a row's sum.
INLINE void weigh(float *rows, int64_t width, int64_t S, float scale, float *factor) {
  Lanes most[QUERIES], total[QUERIES] = {};
  float greatest[QUERIES];
  for (int r = 0; r < QUERIES; ++r) most[r] = all(rows[r * width]);
  pieces(S, [&](int64_t j, auto count) {
    for (int r = 0; r < QUERIES; ++r)
      most[r] = greater(most[r], first(load(rows + r * width + j), count, -INFINITY));
  });
  for (int r = 0; r < QUERIES; ++r) greatest[r] = largest(most[r]);
  pieces(S, [&](int64_t j, auto count) {
    for (int r = 0; r < QUERIES; ++r) {
      const Lanes weight = first(exp((load(rows + r * width + j) - greatest[r]) * scale), count);
      store(rows + r * width + j, weight);
      total[r] += weight;
    }
  });
  for (int r = 0; r < QUERIES; ++r) factor[r] = 1.0f / sum(total[r]);
}

// [tokens, D] as [D][width], 0 beyond its tokens: sixteen by sixteen, rows of a square exchanged by halves, four times.
static void transposed(const float *from, int64_t stride, int64_t tokens, int64_t D, float *to, int64_t width) {
  for (int64_t t = 0; t < width; t += LANES)
    for (int64_t d = 0; d < D; d += LANES) {
      Lanes row[LANES];
      for (int i = 0; i < LANES; ++i) row[i] = t + i < tokens ? load(from + (t + i) * stride + d) : Lanes{};
      exchange_rows<8>(row), exchange_rows<4>(row), exchange_rows<2>(row), exchange_rows<1>(row);
      for (int i = 0; i < LANES; ++i) store(to + (d + i) * width + t, row[i]);
    }
}

// Memory of this thread, at least so many floats.
static float *scratch(int64_t floats) {
  static thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

static int64_t padded(int64_t tokens) { return (tokens + LANES - 1) / LANES * LANES; }

extern "C" void advgrpo_small_attention(const float *q, const float *k, const float *v, float *out, const Sizes *sizes,
                                        const View *views, float scale, int threads) {
  const Sizes s = *sizes;
  const View of_q = views[0], of_k = views[1], of_v = views[2], of_out = views[3];
  const int64_t width = padded(s.S);
  each_row(s.B * s.H, s.Sq * s.S * s.D, threads, [=](int64_t row) {
    const int64_t b = row / s.H, h = row % s.H;
    const float *queries = q + b * of_q.b + h * of_q.h, *values = v + b * of_v.b + h * of_v.h;
    float *results = out + b * of_out.b + h * of_out.h;
    float *keys = scratch(s.D * width + QUERIES * width), *weights = keys + s.D * width;
    transposed(k + b * of_k.b + h * of_k.h, of_k.t, s.S, s.D, keys, width);
    for (int64_t i = 0; i < s.Sq; i += QUERIES) {
      all_products(four(queries, of_q.t, i, s.Sq), keys, weights, width, s.D);
      float factor[QUERIES];
      weigh(weights, width, s.S, scale, factor);
      const int64_t count = s.Sq - i < QUERIES ? s.Sq - i : QUERIES;
      all_weighted_rows(weights, width, 1, values, of_v.t, s.S, factor, results + i * of_out.t, of_out.t, count, s.D);
    }
  });
}

// views: of q, k, v, the gradient of out, and those of q, k and v, which are written.
extern "C" void advgrpo_small_attention_backward(const float *q, const float *k, const float *v, const float *out_grad,
                                                 float *q_grad, float *k_grad, float *v_grad, const Sizes *sizes,
                                                 const View *views, float scale, int threads) {
  const Sizes s = *sizes;
  const View of_q = views[0], of_k = views[1], of_v = views[2], of_out = views[3];
  const View of_q_grad = views[4], of_k_grad = views[5], of_v_grad = views[6];
  const int64_t width = padded(s.S), rows = (s.Sq + QUERIES - 1) / QUERIES * QUERIES;
  each_row(s.B * s.H, 3 * s.Sq * s.S * s.D, threads, [=](int64_t row) {
    const int64_t b = row / s.H, h = row % s.H;
    const float *queries = q + b * of_q.b + h * of_q.h, *own_keys = k + b * of_k.b + h * of_k.h;
    const float *out_grads = out_grad + b * of_out.b + h * of_out.h;
    float *keys = scratch(2 * (s.D + rows) * width), *values = keys + s.D * width;
    float *weights = values + s.D * width, *score_grads = weights + rows * width;
    const float one[QUERIES] = {1.0f, 1.0f, 1.0f, 1.0f};
    transposed(own_keys, of_k.t, s.S, s.D, keys, width);
    transposed(v + b * of_v.b + h * of_v.h, of_v.t, s.S, s.D, values, width);
    for (int64_t i = 0; i < s.Sq; i += QUERIES) {
      float *weight = weights + i * width, *grad = score_grads + i * width;
      all_products(four(queries, of_q.t, i, s.Sq), keys, weight, width, s.D);
      all_products(four(out_grads, of_out.t, i, s.Sq), values, grad, width, s.D);
      float inverse[QUERIES];
      weigh(weight, width, s.S, scale, inverse);
      for (int r = 0; r < QUERIES; ++r) {
        float *p = weight + r * width, *g = grad + r * width;
        Lanes total = {};
        pieces(s.S, [&](int64_t j, auto) {  // g and p are 0 in the lanes that are not there
          store(p + j, load(p + j) * inverse[r]);
          total += load(p + j) * load(g + j);
        });
        const float mean = sum(total);
        pieces(s.S, [&](int64_t j, auto) { store(g + j, load(p + j) * (load(g + j) - mean) * scale); });
      }
      const int64_t count = s.Sq - i < QUERIES ? s.Sq - i : QUERIES;
      float *to = q_grad + b * of_q_grad.b + h * of_q_grad.h + i * of_q_grad.t;
      all_weighted_rows(grad, width, 1, own_keys, of_k.t, s.S, one, to, of_q_grad.t, count, s.D);
    }
    for (int64_t j = 0; j < s.S; j += QUERIES) {
      const int64_t count = s.S - j < QUERIES ? s.S - j : QUERIES;
      float *to_k = k_grad + b * of_k_grad.b + h * of_k_grad.h + j * of_k_grad.t;
      float *to_v = v_grad + b * of_v_grad.b + h * of_v_grad.h + j * of_v_grad.t;
      all_weighted_rows(score_grads + j, 1, width, queries, of_q.t, s.Sq, one, to_k, of_k_grad.t, count, s.D);
      all_weighted_rows(weights + j, 1, width, out_grads, of_out.t, s.Sq, one, to_v, of_v_grad.t, count, s.D);
    }
  });
}
