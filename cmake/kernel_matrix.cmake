# The one list of kernels. Everything that names a kernel is generated from it: the translation
# units, the dispatch tables and what the plans choose from.
#
# A family is a folder of src/kernels with a family.h. Its rows are its Config's arguments, each for
# every dtype of the family, which comes first where there are several.
#
# Forward rows:  head_dim head_dim_v block_m block_n dense
# Backward rows: head_dim head_dim_v block_m block_n separate_dq dense
# Float8 rows:   head_dim head_dim_v block_m block_n
# separate_dq: dQ has a kernel of its own; dense: for calls with a bias or a dense mask, and no others
# (config.h of both families).
# The planner weighs a head dim's rows against each other: forward by their makespan, backward the
# first that is deterministic if need be.

set(JAX_FA3_FAMILIES forward forward_float8 backward)

set(JAX_FA3_FORWARD_TILES
  " 64  64 192 128 false"
  " 64  64 128 128 false"
  " 96  96 192  96 false"
  "128 128 192  80 false"
  "128 128 128 128 false"
  "192 128 192  80 false"
  "192 128 128 128 false"
  "192 192 128  80 false"
  "256 256 128  64 false"
  " 32  32 192 128 true"
  " 64  64 192 128 true"
  " 96  96 192  96 true"
  "128 128 192  80 true"
  "192 128 128  80 true"
  "192 192 128  80 true"
  "256 256 128  64 true"
)

set(JAX_FA3_BACKWARD_TILES
  " 64  64 128 128 false false"
  " 64  64 128 128 true  false"
  " 96  96  64 128 false false"
  " 96  96  64 128 true  false"
  "128 128  64 128 false false"
  "128 128  64 128 true  false"
  "192 128  64  64 true  false"
  "192 192  64  64 true  false"
  "256 256  64  64 true  false"
  " 32  32 128 128 true  true"
  " 64  64 128 128 true  true"
  " 96  96  64 128 true  true"
  "128 128  64 128 true  true"
  "192 128  64  64 true  true"
  "192 192  64  64 true  true"
  "256 256  64  64 true  true"
)

set(JAX_FA3_FORWARD_FLOAT8_TILES
  " 64  64 192 128"
  " 96  96 128 128"
  "128 128 128 128"
  "192 128 128 128"
  "192 192 128 128"
  "256 256 128 128"
)

set(JAX_FA3_FORWARD_DTYPES bf16 fp16)
set(JAX_FA3_BACKWARD_DTYPES bf16 fp16)
set(JAX_FA3_FORWARD_FLOAT8_DTYPES e4m3)

set(JAX_FA3_ALL_HEAD_DIMS 32 64 96 128 192 256)
set(JAX_FA3_ALL_DTYPES bf16 fp16 e4m3)
