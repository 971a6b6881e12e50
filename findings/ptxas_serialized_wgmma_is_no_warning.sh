#!/usr/bin/env bash
# ptxas -Werror accepts a kernel whose WGMMA pipeline it has serialized, and a debug build
# serializes every one, for a reason that is not so.
#
# Version: ptxas 13.0.88 (nvidia-cuda-nvcc), sm_90a; compiles only. 13.5.37 does the same.
# Expected: "Potential Performance Loss: wgmma.mma_async instructions are serialized" is a warning.
#   It fails a build with -Werror, and it names the cause.
# Seen: the message is printed without -v, but as "info": -Werror exits with 0 and writes the cubin.
#   A real warning does become an error. So only the text of the log tells a build that lost its
#   asynchronous tensor cores. The kernel is correct, silent at -O1 and above, and serialized at
#   -O0: C7511 blames "insufficient register resources" for one accumulator of 4 registers, with no
#   limit set and 32 of 255 registers in use.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check --no-deps nvidia-cuda-nvcc==13.0.88
ptxas=$(echo venv/lib/python3*/site-packages/nvidia/cu13/bin/ptxas)

cat >kernel.ptx <<'PTX'
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 to, .param .u64 l, .param .u64 r, .param .u32 count)
.maxntid 128
{
  .reg .f32 a<4>;
  .reg .b32 i, n;
  .reg .pred more;
  .reg .b64 address, left, right;
  ld.param.u64 address, [to];
  ld.param.u64 left, [l];
  ld.param.u64 right, [r];
  ld.param.u32 n, [count];
  mov.b32 i, 0;
  mov.f32 a0, 0f00000000;
  mov.f32 a1, 0f00000000;
  mov.f32 a2, 0f00000000;
  mov.f32 a3, 0f00000000;
again:
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {a0, a1, a2, a3}, left, right, 1, 1, 1, 0, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  add.u32 i, i, 1;
  setp.lt.u32 more, i, n;
  @more bra again;
  st.global.v4.f32 [address], {a0, a1, a2, a3};
  ret;
}
PTX

for level in 1 3; do
  echo "== -O$level -Werror"
  "$ptxas" -arch=sm_90a -O$level -Werror kernel.ptx -o fast.cubin 2>&1 | tee fast.log
  [ ! -s fast.log ]
done

echo "== -O0 -Werror"
"$ptxas" -arch=sm_90a -O0 -Werror kernel.ptx -o slow.cubin 2>&1 | tee slow.log
grep -q "^ptxas info .*(C7511).*serialized due to insufficient register resources" slow.log
if grep -qE "^ptxas (warning|error)" slow.log; then exit 1; fi
[ -s slow.cubin ]
used=$("$ptxas" -arch=sm_90a -v -O0 kernel.ptx -o v.cubin 2>&1 | grep -oE "Used [0-9]+ registers")
echo "$used"
[ "$(echo "$used" | grep -oE "[0-9]+")" -lt 40 ]

echo "== a real warning (-g on PTX without debug sections), -Werror"
if "$ptxas" -arch=sm_90a -g -Werror kernel.ptx -o debug.cubin >debug.log 2>&1; then exit 1; fi
grep "^ptxas error" debug.log
