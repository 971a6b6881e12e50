#!/usr/bin/env bash
# nvcc loses the & of static_cast<decltype(...)&> when it writes the text for the host compiler. What
# is assigned to the cast is assigned to a copy, and gone. There is no warning.
#
# Version: nvidia-cuda-nvcc 13.0.88 and the parts of its toolkit; any g++ that it takes.
# Expected: `static_cast<decltype(p->inner)&>(p->inner) = Inner{7}` sets p->inner.a to 7, in a .cu file
#   as with g++ alone.
# Seen: in a host function of a .cu file, a template or not, p->inner.a keeps its 0. The text for the
#   host compiler has static_cast<__decltype(p->inner)>, which makes a copy, and a class may be assigned
#   to a copy. A name for the type first, `using Member = decltype(p->inner)`, keeps the &.
#   A kernel's schedule was copied into its parameters by such a cast: the kernel got zeros.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
  nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
cat > cast.cu <<'CUDA'
#include <cstdio>

struct Inner {
  int a;
};
struct Outer {
  Inner inner;
};

template <class Type>
int in_template(Type* p) {
  static_cast<decltype(p->inner)&>(p->inner) = Inner{7};
  return p->inner.a;
}

template <class Type>
int by_name(Type* p) {
  using Member = decltype(p->inner);
  static_cast<Member&>(p->inner) = Inner{7};
  return p->inner.a;
}

int in_function(Outer* p) {
  static_cast<decltype(p->inner)&>(p->inner) = Inner{7};
  return p->inner.a;
}

int main() {
  Outer x{}, y{}, z{};
  std::printf("template %d, by name %d, function %d\n", in_template(&x), by_name(&y), in_function(&z));
}
CUDA
cuda=$(venv/bin/python -c 'import nvidia.cu13 as x; print(list(x.__path__)[0])')
cp cast.cu cast.cc
g++ -std=c++17 cast.cc -o with_gcc
"$cuda/bin/nvcc" -std=c++17 -arch=sm_90 -cudart none cast.cu --compile -o cast.o
g++ cast.o -o with_nvcc -L"$cuda/lib" -l:libcudart.so.13
with_gcc=$(./with_gcc)
with_nvcc=$(LD_LIBRARY_PATH="$cuda/lib" ./with_nvcc)
echo "g++:  $with_gcc"
echo "nvcc: $with_nvcc"
test "$with_gcc" = "template 7, by name 7, function 7"
test "$with_nvcc" = "template 0, by name 7, function 0"
