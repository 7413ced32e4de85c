// Philox4x32-10's words: see ops/philox.py, whose integers these are to the bit.
#include <cstdint>

#include "lanes.h"

struct Draw {
  int64_t rows, blocks, seed, step, stream;  // a block is four words
};

extern "C" void advgrpo_philox_words(const int64_t *sample_ids, int64_t *words, const Draw *draw, int threads) {
  const Draw d = *draw;
  each_row(d.rows, 64 * d.blocks, threads, [=](int64_t row) {
    const uint64_t id = sample_ids[row];
    int64_t *to = words + row * 4 * d.blocks;
    for (int64_t block = 0; block < d.blocks; ++block) {
      uint32_t c0 = block, c1 = d.step, c2 = id, c3 = id >> 32;
      uint32_t k0 = d.seed, k1 = uint64_t(d.seed) >> 32 ^ uint64_t(d.stream);
      for (int round = 0; round < 10; ++round) {
        const uint64_t product_0 = uint64_t(c0) * 0xD2511F53u, product_1 = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(product_1 >> 32) ^ c1 ^ k0, c2 = uint32_t(product_0 >> 32) ^ c3 ^ k1;
        c1 = product_1, c3 = product_0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
      }
      to[4 * block] = c0, to[4 * block + 1] = c1, to[4 * block + 2] = c2, to[4 * block + 3] = c3;
    }
  });
}
