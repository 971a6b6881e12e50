// Everything that follows from a forward Config: tiles, MMAs, shared memory, thread roles.
#pragma once

#include "attention/kv.cuh"
#include "attention/mask.cuh"
#include "attention/scheduler.cuh"
#include "attention/softmax.cuh"
#include "device/mma.cuh"
#include "device/pipeline.cuh"
#include "device/warpgroup.cuh"
#include "kernels/forward/config.h"
#include "kernels/params.h"

namespace jax_fa3 {

// What the kernel is launched with. Tensor maps travel by value, so that a captured launch stays
// valid for as long as its buffers do.
struct ForwardMaps {
  CUtensorMap query;  // boxes of 64 rows
  CUtensorMap key;    // boxes of kBlockN rows
  CUtensorMap value;  // boxes of kBlockN rows
  CUtensorMap out;    // boxes of 64 rows
};
struct ForwardParams : ForwardMaps, CommonParams {
  TileScheduler scheduler;
  float rescale_threshold;
  float negative_threshold;
  HeadTable sinks;
  float* lse;         // [b, h_q, s_q]
  float* max_logits;  // [b, h_q, s_q] or null
};

// The operands of a Config: element types, tiles in shared memory, matrix products; and the
// policies of attention/, which say where K and V are, what a logit is, which keys a row sees.
template <class Config>
struct ForwardOperands {
  static constexpr Variant kVariant = Config::kVariant;
  using Params = ParamsOf<kVariant, ForwardParams>;
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kHeadDimV = Config::kHeadDimV;
  static constexpr int kBlockM = Config::kBlockM;
  static constexpr int kBlockN = Config::kBlockN;

  using QTile = SmemTile<Element, kBlockM, kHeadDim>;
  using KTile = SmemTile<Element, kBlockN, kHeadDim>;
  using VTile = SmemTile<Element, kBlockN, kHeadDimV>;
  using OTile = SmemTile<Element, kBlockM, kHeadDimV>;

  // S = Q K^T, O += P V with P from registers.
  using MmaS = MmaSS<Element, kBlockN, Major::K, Major::K>;
  using MmaO = MmaRS<Element, kHeadDimV, Major::MN>;

  using Source = Contiguous<KTile, VTile>;
  using Score = ScoreOf<Config::kVariant>;
  using Masking = RowIntervals;
  // Three consumers whose tile has as many scores as registers can take spill where a mask is read.
  static constexpr bool kExact = !(is_listed(Config::kVariant) && kHeadDim == 64);
  using Softmax = OnlineSoftmax<0, false, true, kExact>;

  static constexpr int kKeyBytes = KTile::kBytes;          // of a stage
  static constexpr int kValueElements = VTile::kElements;  // of a stage
  static constexpr bool kPingPong = true;                  // warpgroups issue products in turns
  static constexpr bool kWide = kHeadDimV > 192;           // consumers need all registers
};

// Stages of K and V that fit shared memory beside `used` bytes, up to four.
constexpr int key_value_stages(int used, int stage) {
  constexpr int kSharedBytes = 227 * 1024 - 1024;  // less barriers and alignment
  const int stages = (kSharedBytes - used) / stage;
  return stages < 4 ? stages : 4;
}

// What follows from the operands' tiles: thread roles, stages and shared memory.
template <class Operands>
struct ForwardLayout : Operands {
  using typename Operands::KTile;
  using typename Operands::OTile;
  using typename Operands::QTile;
  using typename Operands::VTile;

  // Roles: warpgroup 0 produces, the others consume 64 query rows each.
  static constexpr int kConsumers = Operands::kBlockM / kWarpgroupRows;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr Registers kRegisters = registers_of(kConsumers, Operands::kWide);

  // Shared memory, in order: two stages of K and V. Then a second Q, which loads a whole tile
  // ahead, if K and V keep three stages, or as many as one Q and an O of its own would leave them;
  // O is then staged in the Q that it was made of, unless it is wider. Else an O of its own, so
  // that the next Q loads while the last P V runs. Else neither.
  static constexpr int kValueBytes =
      Operands::kValueElements * int(sizeof(typename VTile::Element));
  template <int kQueries, bool kOutput>
  static constexpr int kStagesBeside = key_value_stages(kQueries* QTile::kBytes +
                                                            (kOutput ? OTile::kBytes : 0),
                                                        Operands::kKeyBytes + kValueBytes);
  static constexpr bool kWideOutput = OTile::kBytes > QTile::kBytes;
  static constexpr int kLeft = kStagesBeside<2, kWideOutput>;
  static constexpr int kQueryStages =
      kLeft >= 3 || (kLeft == 2 && kStagesBeside<1, true> <= 2) ? 2 : 1;
  static constexpr bool kOwnOutput =
      kWideOutput || (kQueryStages == 1 && kStagesBeside<1, true> >= 2);
  static constexpr int kStages = kStagesBeside<kQueryStages, kOwnOutput>;
  static_assert(kStages >= 2, "K and V need two stages each");

  using Works = WorkQueue<1 + kConsumers>;
  using QueryCursor = RingCursor<kQueryStages>;
  using Ring = RingBarriers<kStages>;
  using Cursor = RingCursor<kStages>;

  // Warpgroups arrive when they are done with a stage of K.
  static constexpr int kKeyReleases = kConsumers;
  static constexpr bool kListed = false;  // whether key tiles are those of a list

  template <class Works>
  struct Storage {
    using Output = typename OTile::Element;

    alignas(1024) typename QTile::Element query[kQueryStages][QTile::kElements];
    alignas(1024) typename KTile::Element key[kStages][KTile::kElements];
    alignas(1024) typename VTile::Element value[kStages][Operands::kValueElements];
    alignas(1024) Output own_output[kOwnOutput ? OTile::kElements : 8];
    Works works;
    RingBarriers<kQueryStages> query_ring[kConsumers];  // each its own 64 rows
    Ring key_ring;
    Ring value_ring;

    // Where the output of a query stage is staged.
    CUTE_DEVICE Output* output(int stage) {
      return kOwnOutput ? own_output : reinterpret_cast<Output*>(query[stage]);
    }
  };
  using SharedStorage = Storage<Works>;
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  // Named barriers: who arrives, who waits.
  enum NamedBarrier : std::uint32_t {
    kOrder = 0,            // + w: consumer w-1 arrives, consumer w waits; 256 threads
    kOutput = kConsumers,  // + w: all of consumer w; 128 threads
  };
};

template <class Config>
using ForwardTraits = ForwardLayout<ForwardOperands<Config>>;

}  // namespace jax_fa3
