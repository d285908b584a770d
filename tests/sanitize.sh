#!/usr/bin/env bash
# The kernels' tests on kernels that watch themselves: for memory and undefined behaviour, then for races between threads.
# Give it a Python that has offramp. What the compiler has no library for is skipped, with a line that says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1
compiler=${CXX:-c++}

# watched SANITIZERS LIBRARY...: those libraries come first in the process, as they have to
watched() {
    local kinds=$1 library path preload=""
    shift
    for library in "$@"; do
        path=$($compiler -print-file-name="$library.so" 2>/dev/null || true)
        if [[ $path != /* ]]; then
            echo "skipped: the kernels under -fsanitize=$kinds, for which $compiler has no $library.so"
            return
        fi
        preload+="$path "
    done
    if ! LD_PRELOAD=${preload% } ASAN_OPTIONS=detect_leaks=0 "$python" -c "" 2>/dev/null; then
        echo "skipped: the kernels under -fsanitize=$kinds, with which no process starts on this machine"
        return
    fi
    echo "the kernels under -fsanitize=$kinds"
    OFFRAMP_CXXFLAGS="-fsanitize=$kinds -fno-sanitize-recover=undefined -O1 -g" LD_PRELOAD=${preload% } OMP_NUM_THREADS=1 \
        ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=exitcode=66 "$python" -m pytest -q -p no:xdist tests/test_native_kernels.py \
        tests/test_stretch.py -k "not t5 and not qwen2 and not mistral"
}

watched address,undefined libasan libubsan
watched thread libtsan
