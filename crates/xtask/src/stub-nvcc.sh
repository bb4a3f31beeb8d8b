#!/bin/sh
# A stand-in for nvcc, for `cargo check --features cuda` on a machine without the CUDA toolkit: it names a version and an
# architecture, and writes empty outputs where the real one would write kernels.
case "$1" in
--version)
    printf 'nvcc: stand-in\n\n\nCuda compilation tools, release 12.6, V12.6.20\n'
    exit 0
    ;;
--list-gpu-code)
    echo sm_80
    exit 0
    ;;
esac
output=
directory=
source=
to_ptx=no
while [ $# -gt 0 ]; do
    case "$1" in
    -o) output=$2; shift ;;
    --output-directory) directory=$2; shift ;;
    --ptx) to_ptx=yes ;;
    *) source=$1 ;;
    esac
    shift
done
if [ "$to_ptx" = yes ]; then
    : >"${directory:-.}/$(basename "$source" .cu).ptx"
fi
if [ -n "$output" ]; then
    : >"$output"
fi
