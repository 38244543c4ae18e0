#!/usr/bin/env bash
# Everything that has to pass: style, types, tests, documentation. From a bare machine: bash launch/test.sh
#   bash launch/test.sh --slow            also the tests that take minutes
#   bash launch/test.sh tests/linalg -x   arguments go to pytest
set -uo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# One thread a process: the tests start several processes each.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

failed=()
# step NAME COMMAND…: run, go on after a failure, so that one call shows everything that is wrong.
step() {
    local name="$1"
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" || failed+=("$name")
}

step "lint" ruff check .
step "format" ruff format --check .
step "types" python -m mypy --strict -p dsso -p launch
step "tests" python -m pytest "$@"
step "documentation" python -m sphinx -W --keep-going -q -b html docs docs/_build/html

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nFAILED: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nall passed\n'
