# The one list of kernels. Everything that names a kernel is generated from it: the translation
# units, the dispatch tables and what the plans choose from.
#
# A family is a folder of src/kernels with a family.h. Its rows are its Config's arguments, each for
# every dtype of the family, which comes first where there are several.
#
# Forward rows:  head_dim head_dim_v block_m block_n variant
# Backward rows: head_dim head_dim_v block_m block_n separate_dq variant
# Float8 rows:   head_dim head_dim_v block_m block_n
# Cached rows:   head_dim head_dim_v columns
# separate_dq: dQ has a kernel of its own (kernels/backward/config.h); variant: the calls that it is
# for (call/types.h).
# Kernels for functions (kFunction, kBlocks) are no part of the module: they are shipped beside it,
# to be linked with what a user writes (cmake/linkable.cmake).
# The planner weighs a head dim's rows against each other: forward by their makespan, backward the
# first that is deterministic if need be.

set(JAX_FA3_FAMILIES forward forward_float8 forward_cached backward)

set(JAX_FA3_FORWARD_TILES
  " 64  64 192 128 Variant::kPlain"
  " 64  64 128 128 Variant::kPlain"
  " 96  96 192  96 Variant::kPlain"
  "128 128 192  80 Variant::kPlain"
  "128 128 128 128 Variant::kPlain"
  "192 128 192  80 Variant::kPlain"
  "192 128 128 128 Variant::kPlain"
  "192 192 128  80 Variant::kPlain"
  "256 256 128  64 Variant::kPlain"
  " 64  64 192 128 Variant::kMask"
  " 96  96 192  96 Variant::kMask"
  "128 128 128 128 Variant::kMask"
  "192 128 128 128 Variant::kMask"
  "192 192 128  80 Variant::kMask"
  "256 256 128  64 Variant::kMask"
  " 32  32 192 128 Variant::kBias"
  " 64  64 192 128 Variant::kBias"
  " 96  96 192  96 Variant::kBias"
  "128 128 128 128 Variant::kBias"
  "192 128 128  64 Variant::kBias"
  "192 192 128  64 Variant::kBias"
  "256 256 128  64 Variant::kBias"
  "128 128 192  80 Variant::kSoftcap"
  "128 128 128 128 Variant::kSoftcap"
  "256 256 128  64 Variant::kSoftcap"
  "128 128 192  80 Variant::kAlibi"
  "128 128 128 128 Variant::kAlibi"
  " 64  64 128 128 Variant::kFunction"
  "128 128 128 128 Variant::kFunction"
  " 64  64 128 128 Variant::kBlocks"
  "128 128 128 128 Variant::kBlocks"
)

set(JAX_FA3_BACKWARD_TILES
  " 64  64 128 128 false Variant::kPlain"
  " 64  64 128 128 true  Variant::kPlain"
  " 96  96  64 128 false Variant::kPlain"
  " 96  96  64 128 true  Variant::kPlain"
  "128 128  64 128 false Variant::kPlain"
  "128 128  64 128 true  Variant::kPlain"
  "192 128  64  64 true  Variant::kPlain"
  "192 192  64  64 true  Variant::kPlain"
  "256 256  64  64 true  Variant::kPlain"
  " 64  64 128 128 false Variant::kMask"
  " 96  96  64 128 false Variant::kMask"
  "128 128  64 128 false Variant::kMask"
  " 32  32 128 128 true  Variant::kBias"
  " 64  64 128 128 true  Variant::kBias"
  " 96  96  64 128 true  Variant::kBias"
  "128 128  64 128 true  Variant::kBias"
  "192 128  64  64 true  Variant::kBias"
  "192 192  64  64 true  Variant::kBias"
  "256 256  64  64 true  Variant::kBias"
  "128 128  64 128 false Variant::kSoftcap"
  "128 128  64 128 true  Variant::kSoftcap"
  "256 256  64  64 true  Variant::kSoftcap"
  "128 128  64 128 false Variant::kAlibi"
  "128 128  64 128 true  Variant::kAlibi"
  " 64  64  64 128 false Variant::kFunction"
  " 64  64  64 128 true  Variant::kFunction"
  "128 128  64 128 false Variant::kFunction"
  "128 128  64 128 true  Variant::kFunction"
  " 64  64  64 128 false Variant::kBlocks"
  " 64  64  64 128 true  Variant::kBlocks"
  "128 128  64 128 false Variant::kBlocks"
  "128 128  64 128 true  Variant::kBlocks"
)

set(JAX_FA3_FORWARD_FLOAT8_TILES
  " 64  64 192 128"
  " 96  96 128 128"
  "128 128 128 128"
  "192 128 128 128"
  "192 192 128 128"
  "256 256 128 128"
)

set(JAX_FA3_FORWARD_CACHED_TILES
  " 64  64 16"
  " 64  64 64"
  " 64  64 192"
  "128 128 16"
  "128 128 64"
  "128 128 128"
  "192 128 16"
  "192 128 64"
  "256 256 16"
  "256 256 32"
  "256 256 128"
)

set(JAX_FA3_FORWARD_DTYPES bf16 fp16)
set(JAX_FA3_FORWARD_CACHED_DTYPES bf16 fp16)
set(JAX_FA3_BACKWARD_DTYPES bf16 fp16)
set(JAX_FA3_FORWARD_FLOAT8_DTYPES e4m3)

set(JAX_FA3_FUNCTION_DTYPES bf16)  # of kernels for functions
set(JAX_FA3_ALL_HEAD_DIMS 32 64 96 128 192 256)
set(JAX_FA3_ALL_DTYPES bf16 fp16 e4m3)
