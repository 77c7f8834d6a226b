#!/bin/sh
# The instrument's own tests, then the op tests on the emulated CUDA device, under AddressSanitizer
# with UndefinedBehaviorSanitizer and under ThreadSanitizer. Python itself is not instrumented, so
# the sanitizer's library must be loaded before it.
set -eu
cd "$(dirname "$0")/.."
compiler="${CXX:-c++}"
python=.venv/bin/python
op_tests="tests/test_linear_relu.py tests/test_cross_entropy.py tests/test_conv_relu_pool.py
    tests/test_trainer.py tests/test_gather_pictures.py"
chosen="float64 or nan or wanted or bits or elsewhere and not hundred or global"
chosen="$chosen or on_cuda and (hostile or factor)"
"$python" -m pytest -q -p no:cacheprovider tests/test_emulation.py

run() { # kind, library
    echo "== op tests under $2"
    library=$("$compiler" -print-file-name="$2")
    # With the C++ library, or the sanitizer finds no __cxa_throw to pass exceptions on to.
    library="$library $("$compiler" -print-file-name=libstdc++.so.6)"
    # One thread: torch's own pool is not instrumented, and would be taken for racing.
    FASTNET_EMULATION="$1" LD_PRELOAD="$library" OMP_NUM_THREADS=1 \
        setarch --addr-no-randomize "$python" -m pytest -q -x -s -p no:cacheprovider $op_tests \
        -k "emulated and ($chosen)" || exit 1
}
# Python and torch keep memory until the end on purpose.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0
run address libasan.so
export TSAN_OPTIONS="halt_on_error=1:report_mutex_bugs=0:ignore_noninstrumented_modules=1"
run thread libtsan.so
