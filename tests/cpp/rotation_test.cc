// The butterflies of kernels/quantize/rotation.h, four lanes at a time as a kernel runs them,
// against the matrix that docs/fp8.md defines.
#include "kernels/quantize/rotation.h"

#include <cmath>

#include "call/text.h"
#include "check.h"

namespace jax_fa3 {
namespace {

int popcount(unsigned x) { return x == 0 ? 0 : int(x & 1) + popcount(x >> 1); }

// Sign times Hadamard's matrix; 0 off the blocks.
int defined(int row, int column, int head_dim, std::uint32_t seed) {
  const int order = head_dim & -head_dim;
  if (row / order != column / order) return 0;
  const int odd = popcount(row & column & (order - 1)) + column_is_negated(row, seed);
  return odd % 2 ? -1 : 1;
}

template <int kHeadDim>
struct Lanes {
  using Row = RotatedRow<kHeadDim>;
  float x[kRowLanes][Row::kRegisters] = {};

  float& at(int column) {
    const int packet = column / kPacketStride, lane = column / kPacket % kRowLanes;
    CHECK(Row::has_packet(packet, lane));
    return x[lane][packet * kPacket + column % kPacket];
  }

  void hadamard() {
    for (auto& lane : x) Row::mix_registers(lane);
    for (int bit = 1; bit < kRowLanes; bit *= 2) {
      if (!Row::has_lane_bit(bit)) continue;
      Lanes before = *this;
      for (int lane = 0; lane < kRowLanes; ++lane) {
        for (int i = 0; i < Row::kRegisters; ++i) {
          const float sign = lane & bit ? -1.f : 1.f;
          x[lane][i] = mix_lanes(before.x[lane][i], before.x[lane ^ bit][i], sign);
        }
      }
    }
  }
};

template <int kHeadDim>
void is_the_matrix() {
  constexpr std::uint32_t kSeed = 7;
  for (int row = 0; row < kHeadDim; ++row) {
    Lanes<kHeadDim> unit;
    unit.at(row) = column_is_negated(row, kSeed) ? -1.f : 1.f;
    unit.hadamard();
    for (int column = 0; column < kHeadDim; ++column) {
      CHECK_DETAIL(unit.at(column) == defined(row, column, kHeadDim, kSeed),
                   concat("head_dim ", kHeadDim, " row ", row, " column ", column));
    }
    unit.hadamard();  // its own inverse, up to the order
    for (int column = 0; column < kHeadDim; ++column) {
      const float there = column_is_negated(row, kSeed) ? -1.f : 1.f;
      const float want = column == row ? there * RotatedRow<kHeadDim>::kOrder : 0.f;
      CHECK(unit.at(column) == want);
    }
  }
}

template <int... kHeadDims>
void are_the_matrices() {
  (is_the_matrix<kHeadDims>(), ...);
}

// As tests/test_quantize.py has them: stored keys depend on these.
void signs_never_change() {
  constexpr char kOfSeed0[] = "++-+-----+-+-++-+++--+-+-++-----";
  constexpr char kOfLastSeed[] = "--+-+--+-+++--++-----+--++++----";
  for (int column = 0; column < 32; ++column) {
    CHECK(column_is_negated(column, 0) == (kOfSeed0[column] == '-'));
    CHECK(column_is_negated(column, ~0u) == (kOfLastSeed[column] == '-'));
  }
}

// `signs << i & kSignBits` has the sign bits of the pair (2 i, 2 i + 1).
void signs_of_a_packet() {
  for (int first = 0; first < 256; first += kPacket) {
    const std::uint32_t signs = packet_signs(first, 3);
    for (int i = 0; i < kPacket / 2; ++i) {
      const std::uint32_t pair = signs << i & kSignBits;
      CHECK((pair & 0xffff) == (column_is_negated(first + 2 * i, 3) ? 0x8000u : 0u));
      CHECK(pair >> 16 == (column_is_negated(first + 2 * i + 1, 3) ? 0x8000u : 0u));
    }
  }
}

void norms() {
  for (int order = 16; order <= 256; order *= 2) {
    CHECK(hadamard_norm(order) == float(1 / std::sqrt(double(order))));
  }
}

}  // namespace
}  // namespace jax_fa3

int main() {
  jax_fa3::are_the_matrices<16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240,
                            256>();
  jax_fa3::signs_never_change();
  jax_fa3::signs_of_a_packet();
  jax_fa3::norms();
  return jax_fa3::test::finish();
}
