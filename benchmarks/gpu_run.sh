#!/bin/bash
# Builds the engine where it is not there, runs the tests that need a device side by side, then the table: under 10
# minutes on one device. OUT names a folder for the files. Needs no network, and of packages torch, triton, typer, rich.
export PYTHONPATH=src
if [ ! -e src/heedful/_engine/libheedful_torch.so ] && command -v cmake g++ >/dev/null; then
    cmake -S . -B build/gpu >/dev/null && cmake --build build/gpu -j >/dev/null && cmake --install build/gpu --prefix src
fi
parts=("triton/test_forward.py patterns" "triton/test_forward.py not patterns" "triton/test_gradients.py patterns"
    "triton/test_gradients.py not patterns" "triton/test_features.py test" "triton/test_caches.py test"
    "gpu/test_launches.py int32 or bridge" "gpu/test_launches.py not int32 and not bridge" "gpu/test_doors.py test"
    "gpu/test_graphs.py test" "triton/test_tuned.py measured")
if ! python3 -c "import pytest, hypothesis"; then
    parts=()
fi
waiting=()
export OMP_NUM_THREADS=1
for part in "${parts[@]}"; do
    read -r file words <<<"$part"
    timeout -s INT 200 python3 -m pytest -q -W ignore --tb=short -p no:cacheprovider "tests/$file" -k "$words" \
        >"$OUT/pytest.${#waiting[@]}" 2>&1 &
    waiting+=($!)
done
wait "${waiting[@]}"
unset OMP_NUM_THREADS
tail -n 3 "$OUT"/pytest.* || true
timeout 360 python3 -m heedful.cli bench --gpu --save "$OUT/gpu.json" --markdown
