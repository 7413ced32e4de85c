// Sixteen floats at a time in the compilers' own vector types (GCC's and Clang's), on any CPU: what has narrower registers
// takes several. The order of every sum is the same everywhere, and no result depends on how many rows a call has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define INLINE static inline __attribute__((always_inline))

namespace advgrpo {

constexpr int LANES = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

INLINE Lanes all(float value) { return value - Lanes{}; }

INLINE Lanes load(const float *from) {
  Lanes read;
  std::memcpy(&read, from, sizeof read);
  return read;
}

INLINE void store(float *to, Lanes value) { std::memcpy(to, &value, sizeof value); }

// How many of sixteen lanes there are, of a whole piece known to the compiler: that is most of the speed.
typedef std::integral_constant<int, LANES> Whole;

INLINE Lanes load(const float *from, Whole) { return load(from); }
INLINE void store(float *to, Lanes value, Whole) { store(to, value); }
INLINE Lanes first(Lanes value, Whole, float = 0.0f) { return value; }

// The first `count` of sixteen; the others are 0 and are not read.
INLINE Lanes load(const float *from, int count) {
  Lanes read = {};
  std::memcpy(&read, from, count * sizeof(float));
  return read;
}

INLINE void store(float *to, Lanes value, int count) { std::memcpy(to, &value, count * sizeof(float)); }

// `value` in the first `count` lanes, `other` in the others.
INLINE Lanes first(Lanes value, int count, float other = 0.0f) {
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < count ? value : all(other);
}

// Halves onto each other, four times.
INLINE float sum(Lanes value) {
  Half half[2];
  std::memcpy(half, &value, sizeof value);
  half[0] += half[1];
  Quarter quarter[2];
  std::memcpy(quarter, half, sizeof quarter);
  quarter[0] += quarter[1];
  return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

INLINE float largest(Lanes value) {
  Half half[2];
  std::memcpy(half, &value, sizeof value);
  half[0] = half[0] < half[1] ? half[1] : half[0];
  Quarter quarter[2];
  std::memcpy(quarter, half, sizeof quarter);
  quarter[0] = quarter[0] < quarter[1] ? quarter[1] : quarter[0];
  const float even = quarter[0][0] < quarter[0][2] ? quarter[0][2] : quarter[0][0];
  const float odd = quarter[0][1] < quarter[0][3] ? quarter[0][3] : quarter[0][1];
  return even < odd ? odd : even;
}

// `body(start, count)` for every piece of up to sixteen of `size` elements.
template <class Body>
INLINE void pieces(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) body(i, Whole());
  if (i < size) body(i, int(size - i));
}

INLINE Lanes greater(Lanes a, Lanes b) { return a > b ? a : b; }  // b where one is NaN
INLINE Lanes lesser(Lanes a, Lanes b) { return a < b ? a : b; }

// e^x within 1.1 units in the last place, for x from -87.3 to 88.3; below it e^-87.3, which is no denormal number, above
// it infinite. x = n·ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts as Cody and Waite have it, e^r by a polynomial.
INLINE Lanes exp(Lanes x) {
  const float rounding = 12582912.0f;  // 1.5·2^23: its last bit is worth 1
  const Lanes bounded = lesser(all(88.9f), greater(all(-87.3f), x));
  const Lanes shifted = bounded * 1.44269504f + rounding;  // n in its last bits
  const Lanes n = shifted - rounding;
  const Lanes r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = all(1.9875691500e-4f);  // coefficients of Cephes' expf (S. Moshier)
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  return p * (Lanes)(((Words)shifted << 23) + (127u << 23));  // of n = 128 infinite
}

}  // namespace advgrpo

// `body(row)` for every row, over threads where there are several and work for them. Rows know nothing of each other.
template <class Body>
static inline void each_row(int64_t rows, int64_t work_per_row, int threads, Body body) {
#ifdef _OPENMP
  if (threads > 1 && rows > 1 && rows * work_per_row >= 32768) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) body(row);
    return;
  }
#endif
  for (int64_t row = 0; row < rows; ++row) body(row);
}
