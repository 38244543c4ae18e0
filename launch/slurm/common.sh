# shellcheck shell=bash
# Sourced by the job scripts of this folder, in the project's root: what they check, how they start ranks, and when they
# ask to be queued again. The scripts may set before:
#   container=(…)   words that run a command inside a container; empty: none
#   requeue=no      never ask to be queued again
# and the shell that submits may export
#   DSSO_ROOT, DSSO_LOGS, DSSO_MAX_RESTARTS
#                   the project's folder (the current one), that of log files (runs/slurm), and how often a job is queued
#                   again at most (100)
#
# Exit status: that of the run. 2: a recipe or command line that cannot be used; nothing was started.

declare -p container >/dev/null 2>&1 || container=()

dsso_say() { printf 'dsso: %s\n' "$*" >&2; }
dsso_die() {
    dsso_say "$@"
    exit 2
}

# Some ranks may still write when the first has ended, and each is to leave with a status of its own: the step is not
# ended with the first (--kill-on-bad-exit), but a rank that has not ended a minute later is (--wait).
dsso_srun=(srun --kill-on-bad-exit=0 --wait=60)
# Where the tasks have several CPUs each, srun wants to be told again (Slurm 22.05 and later).
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || dsso_srun+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")

# Submitted from within a step, a job inherits the variables of that step, which are not its own.
unset "${!SLURM_STEP@}" SLURM_PTY_PORT SLURM_PTY_WIN_COL SLURM_PTY_WIN_ROW

# dsso_environment: Python, threads, and the end of the job's time.
dsso_environment() {
    if [ ${#container[@]} -eq 0 ]; then
        if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f .venv/bin/activate ]; then
            # shellcheck disable=SC1091
            . .venv/bin/activate
        fi
        command -v python >/dev/null ||
            dsso_die "there is no python: make .venv with 'bash launch/test.sh', or load a module in the job script"
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}" TOKENIZERS_PARALLELISM=false
    local end
    if [ -z "${SLURM_JOB_END_TIME:-}" ]; then # older than Slurm 23.02; inside a container there is no squeue
        end="$(date -d "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e)" +%s 2>/dev/null)" &&
            export SLURM_JOB_END_TIME="$end"
    fi
    if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ] && [ "${SLURM_NTASKS_PER_NODE:-1}" != "$SLURM_GPUS_ON_NODE" ]; then
        dsso_die "${SLURM_NTASKS_PER_NODE:-1} task(s) and $SLURM_GPUS_ON_NODE GPU(s) a node: a rank has one GPU," \
            "so give --ntasks-per-node=$SLURM_GPUS_ON_NODE"
    fi
}

# dsso_recipe USAGE RECIPE.json ARGUMENTS…: check them; leaves `recipe` and `arguments`.
dsso_recipe() {
    local usage="$1"
    recipe="${2:-}"
    [ -n "$recipe" ] || dsso_die "a recipe is missing. Usage: $usage"
    [ -f "$recipe" ] || dsso_die "there is no recipe $recipe (seen from $PWD). Usage: $usage"
    shift 2
    arguments=()
    local resume=no output=no
    while [ $# -gt 0 ]; do
        case "$1" in
        --output_dir | --output_dir=*) output=yes arguments+=("$1") ;;
        --overwrite | --resume | --resume=*)
            # They are about the first start. Queued again, the job goes on with what it has written.
            if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
                [ "$1" != --resume ] || shift
            else
                resume=yes arguments+=("$1")
            fi
            ;;
        *) arguments+=("$1") ;;
        esac
        shift || break
    done
    [ "$output" = yes ] || arguments+=(--output_dir "runs/$(basename "$recipe" .json)-$SLURM_JOB_ID")
    [ "$resume" = yes ] || arguments+=(--resume auto)
}

# dsso_run COMMAND…: run it, hand SIGUSR1 on to it, and leave with its status, or ask to be queued again.
dsso_run() {
    local child="" status=0
    # Both reach this shell only where they are meant for it (scancel --batch, the end of the job): Slurm signals the
    # steps by itself.
    trap 'kill -USR1 "$child" 2>/dev/null' USR1
    trap : TERM
    "$@" &
    child=$!
    while :; do
        wait "$child" && status=0 || status=$?
        kill -0 "$child" 2>/dev/null || break # else the wait was ended by a signal
    done
    # What failed is said by rank 0, in most cases; it has a file of its own.
    [ "$status" = 0 ] || [ ! -f "${log:-}" ] || tail -n 20 "$log" >&2
    # 138 = 128 + SIGUSR1: stopped with a checkpoint, for want of time.
    if [ "$status" = 138 ] && [ "${requeue:-yes}" = yes ]; then
        if [ "${SLURM_RESTART_COUNT:-0}" -ge "${DSSO_MAX_RESTARTS:-100}" ]; then
            dsso_say "stopped for want of time; queued again ${SLURM_RESTART_COUNT:-0} times already, that is enough"
        elif scontrol requeue "$SLURM_JOB_ID"; then
            dsso_say "stopped for want of time; queued again"
            sleep 60 # until Slurm has ended this script
        else
            dsso_say "stopped for want of time, and cannot be queued again: submit it once more with the same" \
                "--output_dir and --resume auto"
        fi
    fi
    exit "$status"
}

# dsso_ranks: start launch/train.py as the tasks of this job, with a log file for each rank.
dsso_ranks() {
    local logs="${DSSO_LOGS:-runs/slurm}/$SLURM_JOB_ID"
    mkdir -p "$logs" || dsso_die "the logs cannot be written into $logs"
    log="$logs/rank_0.log"
    dsso_say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))," \
        "${SLURM_NTASKS:-1} rank(s); $log"
    dsso_run "${dsso_srun[@]}" --open-mode=append --output="$logs/rank_%t.log" \
        "${container[@]}" python -u launch/train.py --ds_config "$recipe" "${arguments[@]}"
}
