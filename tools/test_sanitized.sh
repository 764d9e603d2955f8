#!/bin/sh
# Run the kernel tests against a build with address and undefined-behaviour sanitizers, then
# load mutated files of every kind with it (2000 each, or MUTATIONS).
# The AVX-512 shapes are built on AVX2 too, so that every machine checks them.
# Usage: [MUTATIONS=2000] tools/test_sanitized.sh [python]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$("${1:-python3}" -c 'import sys; print(sys.executable)')
PATH="$(dirname "$python"):$PATH"
build="$root/build/sanitized"
tree="$build/tree"
cmake -S "$root" -B "$build" -G Ninja -DPython_EXECUTABLE="$python" \
  -DCOPPICE_SANITIZE=ON -DCOPPICE_WIDE=ON >/dev/null
cmake --build "$build" -j 2
rm -rf "$tree" && mkdir -p "$tree"
cp -r "$root/src/coppice" "$tree/"
rm -f "$tree"/coppice/kernels/_native*.so
cp "$build"/_native*.so "$tree/coppice/kernels/"
cd "$root"
# Leaks are not looked for: the interpreter's own would drown ours.
sanitized() {
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$tree" \
    "$python" -m "$@"
}
sanitized pytest -q -o addopts="--import-mode=importlib" -p no:cacheprovider \
  tests/unit/kernels/test_linear.py tests/unit/kernels/test_elementwise.py \
  tests/unit/kernels/test_attention.py tests/unit/kernels/test_isas.py \
  tests/unit/kernels/test_quantized.py tests/unit/kernels/test_pages.py \
  tests/unit/kernels/test_ranking.py tests/unit/kernels/test_suffix_index.py \
  tests/unit/engine/test_sampler.py tests/unit/engine/test_sampler_native.py \
  tests/unit/weights tests/unit/models/test_decoder.py
for kind in safetensors gguf tokenizer adapter "adapter settings" kv-segment; do
  sanitized tests.kits.fuzz "$kind" "${MUTATIONS:-2000}" 7 --sanitized
done
