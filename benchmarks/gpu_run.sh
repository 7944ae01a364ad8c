#!/bin/bash
# Tests side by side, then the benchmark: under 9 minutes on one device. OUT names a folder for the files.
export PYTHONPATH=src
waiting=()
parts=("test_forward.py -k patterns" "test_forward.py -k not patterns" "test_gradients.py -k patterns"
    "test_gradients.py -k not patterns" "test_features.py -k test_features" "test_features.py -k not test_features")
if ! python3 -c "import pytest, hypothesis"; then
    parts=()
fi
for part in "${parts[@]}"; do
    read -r file flag words <<<"$part"
    timeout 170 python3 -m pytest -q -W ignore --tb=short -p no:cacheprovider "tests/triton/$file" "$flag" "$words" \
        >"$OUT/pytest.${#waiting[@]}" 2>&1 &
    waiting+=($!)
done
wait "${waiting[@]}"
tail -n 3 "$OUT"/pytest.* || true
python3 benchmarks/gpu.py --sweep --out "$OUT/gpu.json" --seconds "${1:-330}"
