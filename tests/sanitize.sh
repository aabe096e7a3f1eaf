#!/bin/sh
# The kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer, from the root of the repository, in an
# environment that has what the tests and the build need (pip install scikit-build-core nanobind cmake ninja). A few minutes.
#     sh tests/sanitize.sh
# Memory growth, allocations and fork are left out: the sanitizer keeps freed memory, has a malloc of its own, and does not
# follow children well.
set -eu
folder=build/sanitize
rm -rf "$folder"
python -m pip install --quiet --no-deps --no-build-isolation --target "$folder" \
    --config-settings=cmake.define.SLIMLSTM_SANITIZE=ON --config-settings=build-dir=build/sanitize-objects .
export PYTHONPATH="$folder" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1
# Leaks are not looked for because the interpreter has thousands of its own.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
python - <<'EOF'
import sys

# An editable installation would be found first.
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirect" not in type(finder).__name__]
import pytest
from slimlstm.ops import _kernel

print(_kernel.__file__)
left_out = "not memory_stays and not keeps_memory and not fork and not allocate"
# What the sanitizers say goes past Python's own standard error.
sys.exit(pytest.main(["-q", "--capture=sys", "-p", "no:cacheprovider", "tests/test_kernel.py", "-k", left_out]))
EOF
