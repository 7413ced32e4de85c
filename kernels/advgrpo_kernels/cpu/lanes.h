// Sixteen floats at a time in the compilers' own vector types (GCC's and Clang's), as many of a CPU's registers as they fill:
// a vector type wider than the registers would go through memory. The order of every sum is the same everywhere, and no
// result depends on how many rows a call has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define INLINE static inline __attribute__((always_inline))

namespace advgrpo {

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int REGISTER = 16;  // floats
#elif defined(__AVX__)
constexpr int REGISTER = 8;
#else
constexpr int REGISTER = 4;
#endif
typedef float Register __attribute__((vector_size(4 * REGISTER)));
typedef float Unaligned __attribute__((vector_size(4 * REGISTER), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * REGISTER)));
typedef uint32_t Words __attribute__((vector_size(4 * REGISTER)));

// Twice as many floats as T. Every operation is that of both halves.
template <class T>
struct Pair {
  T low, high;
};

template <int floats>
struct Vector {
  typedef Pair<typename Vector<floats / 2>::Type> Type;
};
template <>
struct Vector<REGISTER> {
  typedef Register Type;
};
typedef Vector<LANES>::Type Lanes;

#define PAIR_OPERATOR(sign)                                                                                            \
  template <class T>                                                                                                   \
  INLINE Pair<T> operator sign(Pair<T> a, Pair<T> b) {                                                                 \
    return {a.low sign b.low, a.high sign b.high};                                                                     \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  INLINE Pair<T> operator sign(Pair<T> a, float b) {                                                                   \
    return {a.low sign b, a.high sign b};                                                                              \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  INLINE Pair<T> operator sign(float a, Pair<T> b) {                                                                   \
    return {a sign b.low, a sign b.high};                                                                              \
  }
PAIR_OPERATOR(+)
PAIR_OPERATOR(-)
PAIR_OPERATOR(*)
PAIR_OPERATOR(/)
#undef PAIR_OPERATOR

template <class T>
INLINE void operator+=(Pair<T> &a, Pair<T> b) {
  a.low += b.low, a.high += b.high;
}

INLINE Lanes all(float value) { return value - Lanes{}; }

// A register's own load and store: a copy of sixteen floats may go by narrower pieces, which a later wide read waits for.
INLINE void read(const float *from, Register &value) { value = *(const Unaligned *)from; }
INLINE void write(float *to, Register value) { *(Unaligned *)to = value; }

template <class T>
INLINE void read(const float *from, Pair<T> &value) {
  read(from, value.low), read(from + sizeof(T) / sizeof(float), value.high);
}

template <class T>
INLINE void write(float *to, Pair<T> value) {
  write(to, value.low), write(to + sizeof(T) / sizeof(float), value.high);
}

INLINE Lanes load(const float *from) {
  Lanes value;
  read(from, value);
  return value;
}

INLINE void store(float *to, Lanes value) { write(to, value); }

// How many of sixteen lanes there are, of a whole piece known to the compiler: that is most of the speed.
typedef std::integral_constant<int, LANES> Whole;

INLINE Lanes load(const float *from, Whole) { return load(from); }
INLINE void store(float *to, Lanes value, Whole) { store(to, value); }
// The first `count` of sixteen; the others are 0 and are not read.
INLINE Lanes load(const float *from, int count) {
  float read[LANES] = {};
  std::memcpy(read, from, count * sizeof(float));
  return load(read);
}

INLINE void store(float *to, Lanes value, int count) {
  float written[LANES];
  store(written, value);
  std::memcpy(to, written, count * sizeof(float));
}

// `value` in the first `count` lanes, `other` in the others.
INLINE Register first(Register value, int count, float other = 0.0f) {
  Ints lane;
  for (int i = 0; i < REGISTER; ++i) lane[i] = i;
  return lane < count ? value : other - Register{};
}

template <class T>
INLINE Pair<T> first(Pair<T> value, int count, float other = 0.0f) {
  return {first(value.low, count, other), first(value.high, count - int(sizeof(T) / sizeof(float)), other)};
}

INLINE Lanes first(Lanes value, Whole, float = 0.0f) { return value; }

// b where one is NaN.
INLINE Register greater(Register a, Register b) { return a > b ? a : b; }
INLINE Register lesser(Register a, Register b) { return a < b ? a : b; }

template <class T>
INLINE Pair<T> greater(Pair<T> a, Pair<T> b) {
  return {greater(a.low, b.low), greater(a.high, b.high)};
}

template <class T>
INLINE Pair<T> lesser(Pair<T> a, Pair<T> b) {
  return {lesser(a.low, b.low), lesser(a.high, b.high)};
}

// Every lane has that of its number with one bit the other way.
template <int bit>
INLINE Register crossed(Register value) {
#ifdef __clang__  // has no shuffle by a vector, and makes one of this
  Register result;
  for (int lane = 0; lane < REGISTER; ++lane) result[lane] = value[lane ^ bit];
  return result;
#else
  Ints from;
  for (int lane = 0; lane < REGISTER; ++lane) from[lane] = lane ^ bit;
  return __builtin_shuffle(value, from);
#endif
}

// Halves onto each other, four times.
template <int half = REGISTER / 2>
INLINE float sum(Register value) {
  if constexpr (half == 0)
    return value[0];
  else
    return sum<half / 2>(value + crossed<half>(value));
}

template <int half = REGISTER / 2>
INLINE float largest(Register value) {
  if constexpr (half == 0)
    return value[0];
  else
    return largest<half / 2>(greater(crossed<half>(value), value));
}

template <class T>
INLINE float sum(Pair<T> value) {
  return sum(value.low + value.high);
}

template <class T>
INLINE float largest(Pair<T> value) {
  return largest(greater(value.high, value.low));
}

// `body(start, count)` for every piece of up to sixteen of `size` elements.
template <class Body>
INLINE void pieces(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) body(i, Whole());
  if (i < size) body(i, int(size - i));
}

// 2^n of an n in the last bits; infinite of 128.
INLINE Register power_of_two(Register shifted) { return (Register)(((Words)shifted << 23) + (127u << 23)); }

template <class T>
INLINE Pair<T> power_of_two(Pair<T> shifted) {
  return {power_of_two(shifted.low), power_of_two(shifted.high)};
}

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
  return p * power_of_two(shifted);
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
