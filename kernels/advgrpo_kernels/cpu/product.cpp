// c = a·b + bias: matrices of float32 with any strides. A block of b of up to DEPTH rows is packed into panels of WIDTH
// columns; a tile of c, ROWS of a panel, stays in registers while its products are added. An element is one chain of fused
// multiply-adds per block, in the order of its depth, the bias added to the first and the others one after the other: no
// bit of it depends on where its row lies among others, or on threads.
#include <memory>

#include "lanes.h"

namespace {

using namespace advgrpo;

constexpr int VECTORS = REGISTER == 16 ? 4 : 2;  // with ROWS of them 24 of 32 registers, or 12 of 16
constexpr int WIDTH = VECTORS * REGISTER;
constexpr int ROWS = 6;
constexpr int64_t DEPTH = 256;  // a panel fits the first or second cache; longer chains round more than MKL's
constexpr int64_t CHUNK = 240;  // rows of a that are used with every panel while the second cache has them
constexpr int CACHE_LINE = 64;

struct Product {
  int64_t rows, columns, depth, a_row, a_step, b_step, b_column, c_row;  // sizes, then strides in floats
};

// What a tile's sums are added to, and where they go.
struct Target {
  float *c;
  int64_t row, columns;
  const float *bias;  // null without, or behind the first block
  bool continues;     // c holds the blocks before
};

// Lanes without the bit of `a` and `b`'s at the place with it, and the reverse: one of log2(REGISTER) steps.
template <int bit>
INLINE void exchange(Register &a, Register &b) {
  Register low, high;
#ifdef __clang__  // has no shuffle by a vector, and makes one of this
  for (int l = 0; l < REGISTER; ++l) {
    low[l] = l & bit ? b[l ^ bit] : a[l];
    high[l] = l & bit ? b[l] : a[l ^ bit];
  }
#else
  Ints to_low, to_high;
  for (int l = 0; l < REGISTER; ++l) {
    to_low[l] = l & bit ? REGISTER + (l ^ bit) : l;
    to_high[l] = l & bit ? REGISTER + l : l ^ bit;
  }
  low = __builtin_shuffle(a, b, to_low), high = __builtin_shuffle(a, b, to_high);
#endif
  a = low, b = high;
}

template <int bit = 1>
INLINE void transpose(Register *rows) {
  if constexpr (bit < REGISTER) {
    for (int i = 0; i < REGISTER; ++i)
      if (!(i & bit)) exchange<bit>(rows[i], rows[i | bit]);
    transpose<2 * bit>(rows);
  }
}

// panel[k·WIDTH + j] = b[j·stride + k], as a linear's weight lies.
static void pack_transposed(const float *b, int64_t stride, int64_t columns, int64_t depth, float *panel) {
  int64_t j = 0;
  for (; j + REGISTER <= columns; j += REGISTER) {
    int64_t k = 0;
    for (; k + REGISTER <= depth; k += REGISTER) {
      Register block[REGISTER];
      for (int i = 0; i < REGISTER; ++i) read(b + (j + i) * stride + k, block[i]);
      transpose(block);
      for (int i = 0; i < REGISTER; ++i) write(panel + (k + i) * WIDTH + j, block[i]);
    }
    for (; k < depth; ++k)
      for (int i = 0; i < REGISTER; ++i) panel[k * WIDTH + j + i] = b[(j + i) * stride + k];
  }
  for (; j < columns; ++j)
    for (int64_t k = 0; k < depth; ++k) panel[k * WIDTH + j] = b[j * stride + k];
}

static void pack(const float *b, const Product &p, int64_t columns, int64_t depth, float *panel) {
  if (columns < WIDTH) std::memset(panel, 0, depth * WIDTH * sizeof(float));  // computed with the others, and not written
  if (p.b_step == 1) return pack_transposed(b, p.b_column, columns, depth, panel);
  for (int64_t k = 0; k < depth; ++k, b += p.b_step, panel += WIDTH) {
    if (p.b_column == 1)
      std::memcpy(panel, b, columns * sizeof(float));
    else
      for (int64_t j = 0; j < columns; ++j) panel[j] = b[j * p.b_column];
  }
}

template <int rows, bool dense>
static void tile(const float *a, const Product &p, const float *panel, int64_t depth, const Target &to) {
  Register sums[rows][VECTORS] = {};
  const int64_t step = dense ? 1 : p.a_step;
  for (int64_t k = 0; k < depth; ++k, a += step, panel += WIDTH) {
    Register b[VECTORS];
    for (int v = 0; v < VECTORS; ++v) read(panel + v * REGISTER, b[v]);
    for (int i = 0; i < rows; ++i) {
      const Register left = a[i * p.a_row] - Register{};
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += left * b[v];
    }
  }
  float padded[WIDTH];
  for (int i = 0; i < rows; ++i) {
    float *c = to.c + i * to.row;
    const float *before = to.continues ? c : to.bias;
    if (to.columns < WIDTH && before) {
      std::memset(padded, 0, sizeof(padded));
      std::memcpy(padded, before, to.columns * sizeof(float));
      before = padded;
    }
    for (int v = 0; before && v < VECTORS; ++v) {
      Register value;
      read(before + v * REGISTER, value);
      sums[i][v] += value;
    }
    float *written = to.columns < WIDTH ? padded : c;
    for (int v = 0; v < VECTORS; ++v) write(written + v * REGISTER, sums[i][v]);
    if (to.columns < WIDTH) std::memcpy(c, padded, to.columns * sizeof(float));
  }
}

template <int rows = ROWS>
static void tile_of(int64_t count, const float *a, const Product &p, const float *panel, int64_t depth, const Target &to) {
  if (count >= rows)
    p.a_step == 1 ? tile<rows, true>(a, p, panel, depth, to) : tile<rows, false>(a, p, panel, depth, to);
  else if constexpr (rows > 1)
    tile_of<rows - 1>(count, a, p, panel, depth, to);
}

// Shorter chunks where threads would be idle.
static int64_t chunk_rows(const Product &p, int64_t panels, int threads) {
  int64_t rows = CHUNK;
  while (threads > 1 && rows > 5 * ROWS && (p.rows + rows - 1) / rows * panels < 4 * threads) rows /= 2;
  return rows;
}

static float *room_for(int64_t floats) {  // kept by the thread that calls: a new one is faulted in page after page
  static thread_local std::unique_ptr<float[]> room;
  static thread_local int64_t size = 0;
  floats += CACHE_LINE / sizeof(float);
  if (size < floats) {
    room.reset();
    room.reset(new float[floats]);
    size = floats;
  }
  return (float *)(((uintptr_t)room.get() + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
}

}  // namespace

extern "C" void advgrpo_product(const float *a, const float *b, const float *bias, float *c, const Product *product,
                                int threads) {
  const Product p = *product;
  const int64_t panels = (p.columns + WIDTH - 1) / WIDTH, chunk = chunk_rows(p, panels, threads);
  const int64_t chunks = (p.rows + chunk - 1) / chunk;
  float *packed = room_for(panels * WIDTH * (p.depth < DEPTH ? p.depth : DEPTH));
  for (int64_t start = 0; start < p.depth; start += DEPTH) {
    const int64_t depth = p.depth - start < DEPTH ? p.depth - start : DEPTH;
    const auto columns_of = [&](int64_t panel) {
      const int64_t left = p.columns - panel * WIDTH;
      return left < WIDTH ? left : WIDTH;
    };
    each_row(panels, WIDTH * depth, threads, [&](int64_t panel) {
      const float *from = b + start * p.b_step + panel * WIDTH * p.b_column;
      pack(from, p, columns_of(panel), depth, packed + panel * WIDTH * depth);
    });
    each_row(chunks * panels, chunk * WIDTH * depth, threads, [&](int64_t item) {
      const int64_t panel = item % panels, column = panel * WIDTH, first = item / panels * chunk;
      const int64_t last = first + chunk < p.rows ? first + chunk : p.rows;
      const float *shift = bias && start == 0 ? bias + column : nullptr;
      for (int64_t row = first; row < last; row += ROWS) {
        const Target to = {c + row * p.c_row + column, p.c_row, columns_of(panel), shift, start > 0};
        tile_of(last - row, a + row * p.a_row + start * p.a_step, p, packed + panel * WIDTH * depth, depth, to);
      }
    });
  }
}
