#!/usr/bin/env bash
# The checks that need a GPU, without a network and in less than nine minutes: laws on CUDA, time and memory of T5-3B with
# LoRA in bf16, then random directions and the step of MeZO on T5-3B.
#   bash tests/gpu/run.sh [WHEELS [OUT]]
# WHEELS: a folder of wheels for what the machine's Python lacks (deepspeed, hjson, pydantic, datasets …); OUT: a folder
# for the figures (default: runs/gpu).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
wheels="${1:-}"
out="${2:-runs/gpu}"
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_BUILD_OPS=0 PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
    # Beside the machine's packages, not over them: torch stays the one that fits its driver.
    python -m pip install -q --disable-pip-version-check --no-index --no-deps --target "$out/site" "$wheels"/*.whl
    export PYTHONPATH="$PWD:$PWD/$out/site${PYTHONPATH:+:$PYTHONPATH}"
else
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
python - <<'PY'
import sys, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, {gpu}")
PY
timeout 180 python tests/gpu/laws.py
timeout 240 python tests/gpu/t5.py --out "$out" --seconds 210
timeout 110 python tests/gpu/mezo.py --out "$out"
