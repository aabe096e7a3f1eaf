#!/bin/sh
# Run the kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer; takes a few minutes. Run it from the root of
# the repository, in an environment with the packages for tests and build (pip install scikit-build-core nanobind cmake ninja):
#     sh tests/sanitize.sh
# Tests of memory growth, allocations, fork and exit are left out: the sanitizer keeps freed memory, has its own malloc, and
# does not support child processes well.
set -eu
folder=build/sanitize
rm -rf "$folder"
python -m pip install --quiet --no-deps --no-build-isolation --target "$folder" \
    --config-settings=cmake.define.SLIMLSTM_SANITIZE=ON --config-settings=build-dir=build/sanitize-objects .
export PYTHONPATH="$folder" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1
# Leak detection is off because the interpreter itself leaks thousands of objects.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
python - <<'EOF'
import sys

# Remove the finder of an editable installation, which would take precedence.
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirect" not in type(finder).__name__]
import pytest
from slimlstm.ops import _kernel

print(_kernel.__file__)
tests = [f"tests/unit/test_kernel{part}.py" for part in ("", "_storages", "_packing", "_calls", "_process")]
tests += ["tests/unit/test_low_bit.py", "tests/unit/test_ops.py"]
left_out = "not memory_stays and not keeps_memory and not fork and not allocate and not exits"
# --capture=sys, because the sanitizers write to the process's standard error and not to Python's.
sys.exit(pytest.main(["-q", "--capture=sys", "-p", "no:cacheprovider", *tests, "-k", left_out]))
EOF
