// The prepared layout of value against the tensor cores' register layouts, written down here once
// more from the PTX ISA (9.7.15.5, "register fragments": wgmma .m64nNk32, 8-bit operand A; .m64nN,
// 32-bit D): scores packed in the order of device/mma.cuh contract, with value in the order of
// attention/prepared_value.h, to the product with value as it was.
#include "attention/prepared_value.h"

#include <algorithm>
#include <array>
#include <vector>

#include "call/text.h"
#include "check.h"

namespace jax_fa3 {
namespace {

constexpr int kRows = 64;
constexpr int kThreads = 128;
constexpr int kKeys = 128;  // of a tile
constexpr int kStep = 32;   // of one instruction's contraction

struct Place {
  int row, col;
};

// Element i of a thread's accumulator D.
Place accumulator_place(int thread, int i) {
  const int warp = thread / 32, lane = thread % 32;
  const int row = 16 * warp + lane / 4 + (i % 4 < 2 ? 0 : 8);
  const int col = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
  return {row, col};
}

// Element i of a thread's operand A: four registers of four bytes.
Place operand_place(int thread, int i) {
  const int warp = thread / 32, lane = thread % 32;
  const bool upper = i < 4 || (i >= 8 && i < 12);
  const int row = 16 * warp + lane / 4 + (upper ? 0 : 8);
  const int col = 4 * (lane % 4) + i % 4 + (i < 8 ? 0 : 16);
  return {row, col};
}

// As float8_source in device/mma.cuh, which a host compiler cannot include: register r of k-step s
// holds scores 16 s + {0, 1, 4, 5} + {0, 2, 8, 10}[r]. CuTe's layouts assert the same there.
int source(int step, int i) {
  constexpr int kOfRegister[4] = {0, 2, 8, 10};
  constexpr int kOfByte[4] = {0, 1, 4, 5};
  return 16 * step + kOfRegister[i / 4] + kOfByte[i % 4];
}

int key_at(int position) {
  return position / kPreparedGroup * kPreparedGroup + prepared_key(position % kPreparedGroup);
}

void is_a_permutation_of_each_group() {
  for (int first = 0; first < kKeys; first += kPreparedGroup) {
    std::array<int, kPreparedGroup> keys;
    for (int i = 0; i < kPreparedGroup; ++i) keys[i] = key_at(first + i);
    std::sort(keys.begin(), keys.end());
    for (int i = 0; i < kPreparedGroup; ++i) CHECK(keys[i] == first + i);
  }
  constexpr int kTable[] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};
  for (int i = 0; i < kPreparedGroup; ++i) CHECK(prepared_key(i) == kTable[i]);
}

// Every thread has what it must hand over, and it is the score of the key that stands there.
void registers_agree() {
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int step = 0; step < kKeys / kStep; ++step) {
      for (int i = 0; i < 16; ++i) {
        const Place operand = operand_place(thread, i);
        const Place score = accumulator_place(thread, source(step, i));
        const std::string where = concat("thread ", thread, " step ", step, " element ", i);
        CHECK_DETAIL(operand.row == score.row, where);
        CHECK_DETAIL(key_at(kStep * step + operand.col) == score.col, where);
      }
    }
  }
}

// The whole data flow on integers: O = P V for one tile.
void contracts_to_the_product() {
  std::vector<int> scores(kRows * kKeys), value(kKeys), out(kRows, 0);
  for (int i = 0; i < kRows * kKeys; ++i) scores[i] = (i * 7919) % 1009 - 500;
  for (int key = 0; key < kKeys; ++key) value[key] = (key * 104729) % 997 - 300;

  std::vector<int> operand(kRows * kKeys);  // as WGMMA reads A: (row, position)
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int step = 0; step < kKeys / kStep; ++step) {
      for (int i = 0; i < 16; ++i) {
        const Place from = accumulator_place(thread, source(step, i));
        const Place to = operand_place(thread, i);
        operand[to.row * kKeys + kStep * step + to.col] = scores[from.row * kKeys + from.col];
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    int expected = 0;
    for (int i = 0; i < kKeys; ++i) {
      out[row] += operand[row * kKeys + i] * value[key_at(i)];
      expected += scores[row * kKeys + i] * value[i];
    }
    CHECK(out[row] == expected);
  }
}

void masks_keep_what_is_valid() {
  for (int valid = -20; valid <= 20; ++valid) {
    for (int position = 0; position < kPreparedGroup; ++position) {
      const std::uint32_t mask = prepared_word_mask(position / 4, valid);
      const std::uint32_t byte = mask >> (8 * (position % 4)) & 0xff;
      CHECK(byte == (prepared_key(position) < valid ? 0xffu : 0u));
    }
  }
}

void padding() {
  CHECK(padded_keys(0) == 0 && padded_keys(1) == 128 && padded_keys(128) == 128);
  CHECK(padded_keys(129) == 256 && padded_keys(std::int64_t{1} << 28) == std::int64_t{1} << 28);
}

}  // namespace
}  // namespace jax_fa3

int main() {
  jax_fa3::is_a_permutation_of_each_group();
  jax_fa3::registers_agree();
  jax_fa3::contracts_to_the_product();
  jax_fa3::masks_keep_what_is_valid();
  jax_fa3::padding();
  return jax_fa3::test::finish();
}
