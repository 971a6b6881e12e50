#!/usr/bin/env bash
# A tensor map whose rows have a stride of 0 repeats one row in every row of a box. Such boxes come 9
# times slower than boxes of different rows, and 16 times slower than the same different rows for all
# thread blocks.
#
# Version: driver 580.159.04, one NVIDIA H200; cuda-bindings 13.0.3. Needs such a GPU.
# Expected: the cheapest load there is: 128 bytes of L2, asked for once a box.
# Seen: 128 thread blocks that fetch the same tile of 64 rows of 256 bytes again and again, 192 KiB
#   under way each, bring 0.81 TB/s into shared memory where the stride is 0; 7.4 where each block
#   has rows of its own, all of them in L2; 12.9 where all blocks have the same 64 rows. Each row of
#   a box is fetched by itself, and one slice of L2 answers for the line that all of them ask for.
#   A bias that all query rows share, loaded like this, made attention 2.5 times slower.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check cuda-bindings==13.0.3 cuda-pathfinder==1.9.1
venv/bin/python - <<'PYTHON'
import ctypes
import statistics

from cuda.bindings import driver

TILE_ROWS, STAGES, BLOCKS, TILES = 64, 12, 128, 2048  # tiles of each block: 16 KiB
ROWS = BLOCKS * TILE_ROWS  # of 128 bfloat16 numbers: 2 MiB, which L2 holds
TILE_BYTES = TILE_ROWS * 256

# Thread 0 asks for the same tile again and again, as two boxes, and waits only for a free stage. A
# block's tile begins at row `rows * block`.
KERNEL = f"""
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 stages[];
.visible .entry stream(.param .align 64 .b8 map[128], .param .b32 rows)
{{
  .reg .pred p;
  .reg .b32 i, n, stage, parity, row, bar, to;
  .reg .b64 from;
  .shared .align 8 .b64 full[{STAGES}];
  mov.u32 n, %tid.x;
  setp.ne.u32 p, n, 0;
  @p bra end;
  mov.b64 from, map;
  cvta.param.u64 from, from;
  mov.u32 row, %ctaid.x;
  ld.param.u32 n, [rows];
  mul.lo.u32 row, row, n;
  mov.u32 i, 0;
init:
  shl.b32 n, i, 3;
  mov.u32 bar, full;
  add.u32 bar, bar, n;
  mbarrier.init.shared.b64 [bar], 1;
  add.u32 i, i, 1;
  setp.lt.u32 p, i, {STAGES};
  @p bra init;
  fence.mbarrier_init.release.cluster;
  mov.u32 i, 0;
next:
  rem.u32 stage, i, {STAGES};
  div.u32 parity, i, {STAGES};
  add.u32 parity, parity, 1;
  and.b32 parity, parity, 1;
  shl.b32 n, stage, 3;
  mov.u32 bar, full;
  add.u32 bar, bar, n;
  setp.lt.u32 p, i, {STAGES};
  @p bra ask;
wait:
  mbarrier.try_wait.parity.shared.b64 p, [bar], parity;
  @!p bra wait;
ask:
  setp.ge.u32 p, i, {TILES};
  @p bra asked;
  mbarrier.arrive.expect_tx.shared.b64 _, [bar], {TILE_BYTES};
  mul.lo.u32 n, stage, {TILE_BYTES};
  mov.u32 to, stages;
  add.u32 to, to, n;
  cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
    [to], [from, {{0, row}}], [bar];
  add.u32 to, to, {TILE_BYTES // 2};
  mov.u32 n, 64;
  cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
    [to], [from, {{n, row}}], [bar];
asked:
  add.u32 i, i, 1;
  setp.lt.u32 p, i, {TILES + STAGES};
  @p bra next;
end:
  ret;
}}
"""


def run(call, *arguments):
    error, *results = call(*arguments)
    assert int(error) == 0, (call.__name__, error)
    return results[0] if len(results) == 1 else results


def words(kind, *numbers):
    return [kind(n) for n in numbers]


run(driver.cuInit, 0)
device = run(driver.cuDeviceGet, 0)
run(driver.cuCtxSetCurrent, run(driver.cuDevicePrimaryCtxRetain, device))
module = run(driver.cuModuleLoadData, KERNEL.encode() + b"\0")
kernel = run(driver.cuModuleGetFunction, module, b"stream")
shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
run(driver.cuFuncSetAttribute, kernel, shared, STAGES * TILE_BYTES)
array = run(driver.cuMemAlloc, ROWS * 256)
run(driver.cuMemsetD8, array, 63, ROWS * 256)
begin, end = (run(driver.cuEventCreate, 0) for _ in range(2))


def map_of(stride):
    return run(
        driver.cuTensorMapEncodeTiled,
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, int(array),
        words(driver.cuuint64_t, 128, ROWS), words(driver.cuuint64_t, stride),
        words(driver.cuuint32_t, 64, TILE_ROWS), words(driver.cuuint32_t, 1, 1),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip


CASES = {  # the map, and how many rows lie between the tiles of neighbouring blocks
    "each block its own rows": (map_of(256), TILE_ROWS),
    "all blocks the same rows": (map_of(256), 0),
    "one row, stride 0": (map_of(0), 0),
}


def milliseconds(tensor_map, rows):
    rows = ctypes.c_uint32(rows)
    arguments = (ctypes.c_void_p * 2)(int(tensor_map.getPtr()), ctypes.addressof(rows))
    run(driver.cuEventRecord, begin, 0)
    run(driver.cuLaunchKernel, kernel, BLOCKS, 1, 1, 32, 1, 1, STAGES * TILE_BYTES, 0,
        ctypes.addressof(arguments), 0)  # fmt: skip
    run(driver.cuEventRecord, end, 0)
    run(driver.cuEventSynchronize, end)
    return run(driver.cuEventElapsedTime, begin, end)


times = {name: [] for name in CASES}
for _ in range(20):
    for name, case in CASES.items():
        times[name].append(milliseconds(*case))
moved = BLOCKS * TILES * TILE_BYTES
speed = {name: moved / statistics.median(x) / 1e9 for name, x in times.items()}
for name, x in speed.items():
    print(f"{name}: {x:.2f} TB/s into shared memory")
own, same, broadcast = speed.values()
assert same / own > 0.5, speed
assert same / broadcast > 2, speed
PYTHON
