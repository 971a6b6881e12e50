# The one list of kernels. Everything that names a kernel is generated from it: the translation
# units, the dispatch tables and what the plans choose from.
#
# A family is a folder of src/kernels with a family.h. Its rows are its Config's arguments, each for
# every dtype of the family, which comes first where there are several.
#
# Forward rows:  head_dim head_dim_v block_m block_n dense
# Backward rows: head_dim head_dim_v block_m block_n separate_dq dense
# Float8 rows:   head_dim head_dim_v block_m block_n
# Cached rows:   head_dim head_dim_v columns
# separate_dq: dQ has a kernel of its own (kernels/backward/config.h); dense: the calls that it is for
# (call/types.h).
# The planner weighs a head dim's rows against each other: forward by their makespan, backward the
# first that is deterministic if need be.

set(JAX_FA3_FAMILIES forward forward_float8 forward_cached backward)

set(JAX_FA3_FORWARD_TILES
  " 64  64 192 128 Dense::kNone"
  " 64  64 128 128 Dense::kNone"
  " 96  96 192  96 Dense::kNone"
  "128 128 192  80 Dense::kNone"
  "128 128 128 128 Dense::kNone"
  "192 128 192  80 Dense::kNone"
  "192 128 128 128 Dense::kNone"
  "192 192 128  80 Dense::kNone"
  "256 256 128  64 Dense::kNone"
  " 64  64 192 128 Dense::kMask"
  " 96  96 192  96 Dense::kMask"
  "128 128 192  80 Dense::kMask"
  "192 128 192  80 Dense::kMask"
  "192 192 128  80 Dense::kMask"
  "256 256 128  64 Dense::kMask"
  " 32  32 192 128 Dense::kBias"
  " 64  64 192 128 Dense::kBias"
  " 96  96 192  96 Dense::kBias"
  "128 128 128 128 Dense::kBias"
  "192 128 128  64 Dense::kBias"
  "192 192 128  64 Dense::kBias"
  "256 256 128  64 Dense::kBias"
)

set(JAX_FA3_BACKWARD_TILES
  " 64  64 128 128 false Dense::kNone"
  " 64  64 128 128 true  Dense::kNone"
  " 96  96  64 128 false Dense::kNone"
  " 96  96  64 128 true  Dense::kNone"
  "128 128  64 128 false Dense::kNone"
  "128 128  64 128 true  Dense::kNone"
  "192 128  64  64 true  Dense::kNone"
  "192 192  64  64 true  Dense::kNone"
  "256 256  64  64 true  Dense::kNone"
  " 64  64 128 128 false Dense::kMask"
  " 96  96  64 128 false Dense::kMask"
  "128 128  64 128 false Dense::kMask"
  " 32  32 128 128 true  Dense::kBias"
  " 64  64 128 128 true  Dense::kBias"
  " 96  96  64 128 true  Dense::kBias"
  "128 128  64 128 true  Dense::kBias"
  "192 128  64  64 true  Dense::kBias"
  "192 192  64  64 true  Dense::kBias"
  "256 256  64  64 true  Dense::kBias"
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
  "128 128 16"
  "128 128 64"
  "192 128 16"
  "192 128 64"
  "256 256 16"
  "256 256 32"
)

set(JAX_FA3_FORWARD_DTYPES bf16 fp16)
set(JAX_FA3_FORWARD_CACHED_DTYPES bf16 fp16)
set(JAX_FA3_BACKWARD_DTYPES bf16 fp16)
set(JAX_FA3_FORWARD_FLOAT8_DTYPES e4m3)

set(JAX_FA3_ALL_HEAD_DIMS 32 64 96 128 192 256)
set(JAX_FA3_ALL_DTYPES bf16 fp16 e4m3)
