#!/bin/sh
# Build the native kernels in place (src/coppice/kernels/_native*.so) for development.
# Usage: tools/build_native.sh [python] [-DCOPPICE_SANITIZE=ON ...]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-python3}
[ $# -gt 0 ] && shift
bin=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")
PATH="$bin:$PATH"
cmake -S "$root" -B "$root/build/native" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" "$@" >/dev/null
cmake --build "$root/build/native" -j 2
cp "$root"/build/native/_native*.so "$root/src/coppice/kernels/"
