#!/usr/bin/env bash
# Fill the CUDA tables on a bare machine that has Python, a GPU, and no network.
#
#   benchmarks/cuda.sh collect WHEELS   here: this package and everything it needs, as wheels
#                                       (TORCH names an index of CUDA builds of torch)
#   benchmarks/cuda.sh run WHEELS OUT   there: install them, run the tests of devices, measure
#
# A torch that is installed there already is used; it need not be among the wheels.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
case "${1:-}" in
collect)
    wheels="${2:?folder for wheels}"
    mkdir -p "$wheels"
    pip wheel --wheel-dir "$wheels" ${TORCH:+--extra-index-url "$TORCH"} "$root[test]"
    ;;
run)
    wheels="${2:?folder of wheels}" out="${3:?folder for results}"
    place="$(mktemp -d)"
    trap 'rm -rf "$place"' EXIT
    python3 -m venv --system-site-packages "$place/env"
    "$place/env/bin/pip" install --quiet --no-index --find-links "$wheels" "acdc-circuits[test]"
    mkdir -p "$out"
    (cd "$root" && "$place/env/bin/python" -m pytest tests/test_devices.py -q -rs) | tee "$out/tests.txt"
    "$place/env/bin/acdc" bench cuda --out "$out"
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
