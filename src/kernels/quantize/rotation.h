// The rotation of query and key (docs/fp8.md), in the registers of four neighbouring threads.
//
// A row lies in four "lanes", in packets of eight elements, the 16 bytes of a load: element e of
// packet i of lane l is column 32 i + 8 l + e, and register 8 i + e of its thread. Hadamard's
// matrix is a product of butterflies, one for each bit of the column below its order, in any order
// of bits: those of e and i are within a thread, those of l between lanes.
//
// Host and device; tests/cpp/rotation_test.cc holds them against the definition.
#pragma once

#include <cstdint>

#include "call/types.h"

#if defined(__CUDACC__)
#define JFA_UNROLL _Pragma("unroll")
#else
#define JFA_UNROLL
#endif

namespace jax_fa3 {

constexpr int kRowLanes = 4;
constexpr int kPacket = 8;  // elements of 16 bits, 16 bytes
constexpr int kPacketStride = kRowLanes * kPacket;

template <int kHeadDim>
struct RotatedRow {
  static_assert(kHeadDim % 16 == 0,
                "butterflies within a packet, and of two lanes, are always due");
  static constexpr int kOrder = kHeadDim & -kHeadDim;  // of Hadamard's matrix
  static constexpr int kPackets = ceil_div(kHeadDim, kPacketStride);
  static constexpr int kRegisters = kPackets * kPacket;

  // Whether a butterfly of lanes l and l ^ bit is due.
  JFA_HD static constexpr bool has_lane_bit(int bit) { return kPacket * bit < kOrder; }

  // The last packet of half the lanes is missing where 32 does not divide head_dim.
  JFA_HD static constexpr bool has_packet(int packet, int lane) {
    return packet * kPacketStride + lane * kPacket < kHeadDim;
  }

  // The butterflies of the bits that a thread has in its registers.
  JFA_HD static void mix_registers(float (&x)[kRegisters]) {
    JFA_UNROLL
    for (int bit = 1; bit < kRegisters; bit *= 2) {
      const int column_bit = bit < kPacket ? bit : bit * kRowLanes;
      JFA_UNROLL
      for (int i = 0; i < kRegisters; ++i) {
        if (column_bit >= kOrder || i & bit) continue;
        const float low = x[i], high = x[i + bit];
        x[i] = low + high;
        x[i + bit] = low - high;
      }
    }
  }
};

// One side of a butterfly of two lanes: `mine` and the other lane's element. `sign` is -1 in the
// lane that has the bit, else 1.
JFA_HD constexpr float mix_lanes(float mine, float other, float sign) {
  return mine * sign + other;
}

// What makes Hadamard's matrix orthogonal: 1 / sqrt(order), of a power of two.
constexpr float hadamard_norm(int order) {
  float norm = 1;
  for (; order >= 4; order /= 4) norm /= 2;
  return order == 2 ? norm * 0.70710678f : norm;
}

// Whether the rotation of this seed begins by negating the column: a bit of MurmurHash3's last
// step.
constexpr bool column_is_negated(std::uint32_t column, std::uint32_t seed) {
  std::uint32_t x = column * 0x9E3779B9u + seed;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return ((x ^ (x >> 16)) & 1) != 0;
}

// The sign bits of a packet: those of elements 2 i and 2 i + 1 at bits 15 - i and 31 - i, so that
// `signs << i & kSignBits` are those of a pair of 16-bit elements.
constexpr std::uint32_t kSignBits = 0x80008000u;
constexpr std::uint32_t packet_signs(int first_column, std::uint32_t seed) {
  std::uint32_t signs = 0;
  for (int e = 0; e < kPacket; ++e) {
    const std::uint32_t negated = column_is_negated(first_column + e, seed);
    signs |= negated << ((e % 2 ? 31 : 15) - e / 2);
  }
  return signs;
}

}  // namespace jax_fa3
