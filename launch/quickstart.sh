#!/usr/bin/env bash
# From a bare machine to a comparison: fine-tunes a small pretrained model (MiniLM with LoRA) twice, with AdamW and with
# K-FAC and Newton-step clipping, and shows who won. On all GPUs, or as two processes on the CPU.
#
#   bash launch/quickstart.sh
#   DSSO_DATA=/path/to/data bash launch/quickstart.sh    on MRPC, if there is a directory mrpc in it
#   DSSO_OUT=/path/to/results bash launch/quickstart.sh  instead of runs/quickstart
#
# Further arguments go to both runs, e.g. --set dsso.train.max_steps=20
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

out="${DSSO_OUT:-runs/quickstart}"
recipes=(configs/adamw_minilm_builtin_lora.json configs/kfac_minilm_builtin_lora.json)
names=(adamw kfac)

# How many processes, and whether on GPUs: of the divisors of the batch size, the largest that has a GPU for each.
read -r ranks device < <(
    python - "${recipes[@]}" <<'PY'
import json
import math
import sys

import torch

batch = math.gcd(*(int(json.load(open(path))["train_batch_size"]) for path in sys.argv[1:]))
gpus = torch.cuda.device_count()
print(max((n for n in range(1, gpus + 1) if batch % n == 0), default=2), "cuda" if gpus else "cpu")
PY
) || dsso_die "the recipes could not be read, see the message above"
if [ "$device" = cpu ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    # The processes share the cores: more threads than cores make the CPU slower, not faster.
    cores="$(nproc)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"
fi
# Deprecations inside other packages are no news for somebody who looks at a first run.
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"

options=()
if [ -n "${DSSO_DATA:-}" ] && [ -d "$DSSO_DATA/mrpc" ]; then
    dsso_say "task: MRPC from $DSSO_DATA"
    options+=(--set dsso.task.name=mrpc)
else
    dsso_say "task: builtin (its own sentence pairs; DSSO_DATA=/path/to/data takes MRPC instead)"
fi

runs=()
for i in "${!recipes[@]}"; do
    run="$out/${names[$i]}"
    port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
    dsso_say "run $((i + 1)) of ${#recipes[@]}: ${recipes[$i]} on $ranks processes, into $run"
    deepspeed --log_level warning --num_gpus "$ranks" --master_port "$port" launch/train.py \
        --ds_config "${recipes[$i]}" --output_dir "$run" --overwrite "${options[@]}" "$@" ||
        dsso_die "the run $run failed (exit status $?), see the message above"
    runs+=("$run")
done

printf '\n'
python -m dsso.plots "${runs[@]}" --out "$out/curves.png"
dsso_remind
