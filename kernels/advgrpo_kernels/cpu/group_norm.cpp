// GroupNorm of images in channels_last, with SiLU behind it where asked for: see ops/group_norm.py. An image at a time.
#include <vector>

#include "lanes.h"

using namespace advgrpo;

struct Images {
  int64_t B, pixels, C, groups, silu;
};

constexpr int64_t STRETCH = 64;  // pixels of one chain of sums: one over all of them would lose three digits

// to[c] = sum over an image's pixels of `term(x, c, count)` [C].
template <class Term>
INLINE void sums(const float *image, int64_t pixels, int64_t C, float *to, Term term) {
  pieces(C, [=](int64_t c, auto count) {
    Lanes total = {};
    for (int64_t start = 0; start < pixels; start += STRETCH) {
      const int64_t end = start + STRETCH < pixels ? start + STRETCH : pixels;
      Lanes part = {};
      for (int64_t p = start; p < end; ++p) part += term(load(image + p * C + c, count), c, count);
      total += part;
    }
    store(to + c, total, count);
  });
}

// Every channel gets the mean of its group's `sums` [C] over `size` elements.
INLINE void group_means(float *sums, int64_t C, int64_t groups, int64_t size) {
  const int64_t width = C / groups;
  for (int64_t first = 0; first < C; first += width) {
    float total = 0;
    for (int64_t c = first; c < first + width; ++c) total += sums[c];
    for (int64_t c = first; c < first + width; ++c) sums[c] = total / size;
  }
}

extern "C" void advgrpo_group_norm(const float *x, const float *weight, const float *bias, float *y,
                                   const Images *images, float eps, int threads) {
  const Images s = *images;
  const int64_t C = s.C, size = C / s.groups * s.pixels;
  each_row(s.B, 8 * s.pixels * C, threads, [=](int64_t row) {
    const float *image = x + row * s.pixels * C;
    float *to = y + row * s.pixels * C;
    std::vector<float> vectors(2 * C);
    float *mean = vectors.data(), *scale = mean + C;
    sums(image, s.pixels, C, mean, [](Lanes value, int64_t, auto) { return value; });
    group_means(mean, C, s.groups, size);
    sums(image, s.pixels, C, scale, [=](Lanes value, int64_t c, auto count) {
      const Lanes centred = value - load(mean + c, count);
      return centred * centred;
    });
    group_means(scale, C, s.groups, size);
    for (int64_t c = 0; c < C; ++c) scale[c] = weight[c] / std::sqrt(scale[c] + eps);
    for (int64_t p = 0; p < s.pixels; ++p)
      pieces(C, [=](int64_t c, auto count) {
        const Lanes centred = load(image + p * C + c, count) - load(mean + c, count);
        const Lanes normed = centred * load(scale + c, count) + load(bias + c, count);
        store(to + p * C + c, s.silu ? normed / (1.0f + exp(0.0f - normed)) : normed, count);
      });
  });
}
