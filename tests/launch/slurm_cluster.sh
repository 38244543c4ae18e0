#!/usr/bin/env bash
# Starts a Slurm cluster of two nodes on this machine, private to this script, and runs the job scripts of launch/slurm/ on
# it: runs that are preempted, queued again and gone on with, a sweep as a job array, and input that cannot be used.
#
#   bash tests/launch/slurm_cluster.sh
#   bash tests/launch/slurm_cluster.sh input array     some parts: preemption, place (needs the former), input, array
#   KEEP=1 bash tests/launch/slurm_cluster.sh     leaves the folder with all logs
#
# Needs Slurm and Munge (Debian: slurm-wlm munge; installed when root). Exit status: 0 all checks passed, 1 one has not,
# 77 Slurm cannot be had or started here.
# Functions are called through others, and some words are evaluated later.
# shellcheck disable=SC2329,SC2016
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$root" || exit 1
if ! python -c 'import torch' 2>/dev/null && [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi
export PATH="$PATH:/usr/sbin:/sbin"
SECONDS=0

skip() {
    printf 'skipped: %s\n' "$*"
    exit 77
}
python -c 'import torch' 2>/dev/null || skip "no Python with torch is active"

have_slurm() {
    local program
    for program in munged slurmctld slurmd sbatch srun scontrol scancel squeue; do
        command -v "$program" >/dev/null || return 1
    done
}
if ! have_slurm; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        skip "Slurm is not installed (Debian: slurm-wlm munge)"
    fi
    printf 'installing slurm-wlm and munge\n'
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; } \
        >/dev/null 2>&1
    have_slurm || skip "Slurm could not be installed (Debian: slurm-wlm munge)"
fi

# ---- the cluster ---------------------------------------------------------------------------------------------------

dir="$(mktemp -d)"
mark="DSSO_SLURM_CLUSTER=$dir"
export DSSO_SLURM_CLUSTER="$dir" # by which its processes are told from all others

end_all() { # everything that was started with our mark: jobs, and what they leave behind; this shell has no mark itself
    local files link
    # Slurm's step daemons write their title over their environment, but work in our folder.
    for link in /proc/[0-9]*/cwd; do
        case "$(readlink "$link")" in
        "$dir"/*) kill -KILL "$(cut -d/ -f3 <<<"$link")" ;;
        esac
    done 2>/dev/null
    mapfile -t files < <(grep -lzxF "$mark" /proc/[0-9]*/environ 2>/dev/null)
    files=("${files[@]#/proc/}")
    [ ${#files[@]} -eq 0 ] || kill -KILL "${files[@]%/environ}" 2>/dev/null
}
stop() {
    trap - EXIT INT TERM
    # Twice: the first round may meet a process that is about to start another.
    end_all
    sleep 0.3
    end_all
    if [ -n "${KEEP:-}" ]; then
        printf 'kept: %s\n' "$dir"
    else
        rm -rf "$dir"
    fi
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

host="$(hostname -s)" me="$(id -un)"
mkdir -p "$dir"/{state,log,spool,jobs}
chmod 755 "$dir"
read -r port_ctl port_1 port_2 < <(python - <<'PY'
import socket

probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(one.getsockname()[1] for one in probes))
PY
)
(umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
munged --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munged.pid" --force \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" --num-threads=2 2>"$dir/log/munged.err" ||
    skip "munged does not start: $(tail -n 1 "$dir/log/munged.err")"
cat >"$dir/slurm.conf" <<CONF
ClusterName=dsso
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port_ctl
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
# A job that is queued again waits until its old credential has expired.
AuthInfo=socket=$dir/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdSpoolDir=$dir/spool/%n
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MinJobAge=900
NodeName=dsso1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$port_1 CPUs=2
NodeName=dsso2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$port_2 CPUs=2
PartitionName=main Nodes=ALL Default=YES DefaultTime=20 MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$dir/slurm.conf"

# The second node sees one folder that it may not write to, and one that is its own. Without the right to do so, it does not.
apart=yes
mkdir "$dir/locked" "$dir/local"
unshare --mount sh -c 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"' - "$dir/locked" 2>"$dir/log/unshare.err" || apart=no
second_node() {
    if [ "$apart" = no ]; then
        slurmd -N dsso2
    else
        unshare --mount sh -c 'cd "$1" && mount --bind locked locked && mount -o remount,bind,ro locked &&
            mount -t tmpfs dsso local && exec slurmd -N dsso2' - "$dir"
    fi
}

start_cluster() { # which setting does without control groups depends on Slurm's version and on the machine
    local setting
    for setting in CgroupPlugin=disabled IgnoreSystemd=yes CgroupPlugin=cgroup/v1; do
        printf '%s\n' "$setting" >"$dir/cgroup.conf"
        mkdir -p "$dir/spool/dsso1" "$dir/spool/dsso2"
        slurmd -N dsso1 2>"$dir/log/slurmd.err"
        for _ in 1 2 3 4 5 6 7 8; do
            sleep 0.25
            grep -q 'slurmd started' "$dir/log/slurmd.dsso1.log" 2>/dev/null || continue
            second_node
            slurmctld
            return 0
        done
    done
    return 1
}
start_cluster || skip "slurmd does not start: $(grep -h error "$dir"/log/slurmd* | tail -n 1)"

await() { # await SECONDS COMMAND…: until it succeeds
    local last=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$last" ] || return 1
        sleep 0.2
    done
}
ready() { [ "$(sinfo --noheader --format %T 2>/dev/null)" = idle ]; }
await 30 ready || skip "the nodes do not come up: $(sinfo 2>&1 | tail -n 1)"
printf 'a cluster of two nodes (%s) after %s s\n' "$(slurmd --version)" "$SECONDS"

# ---- helpers of the checks -----------------------------------------------------------------------------------------

parts=" ${*:-preemption place input array} "
want() { [[ "$parts" == *" $1 "* ]]; }
failed=0
check() { # check WORDS COMMAND…
    local words="$1"
    shift
    if "$@" >"$dir/told" 2>&1; then
        printf 'ok      %4s s  %s\n' "$SECONDS" "$words"
    else
        printf 'FAILED  %4s s  %s\n' "$SECONDS" "$words"
        sed 's/^/        /' "$dir/told"
        failed=1
    fi
}
export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 DSSO_ROOT="$root" DSSO_LOGS="$dir/logs"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # an installed dsso may be of another folder
runs="$dir/runs"
submit() { sbatch --parsable --output="$dir/jobs/%j.out" "$@" | cut -d';' -f1; }
field() { scontrol --oneliner show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p" | head -n 1; } # of the first element
ended() { case "$(field "$1" JobState)" in PENDING | RUNNING | COMPLETING | CONFIGURING | SUSPENDED) return 1 ;; esac }
finish() { # finish JOB [STATUS]: wait for its end, and see that it has ended with this status
    await 180 ended "$1" || { echo "job $1 has not ended: $(field "$1" JobState)"; }
    [ "$(field "$1" ExitCode)" = "${2:-0}:0" ] && return 0
    echo "job $1: $(field "$1" JobState), exit code $(field "$1" ExitCode)"
    tail -n 30 "$dir/jobs/$1.out" "$DSSO_LOGS/$1/rank_0.log" 2>/dev/null
    return 1
}
said() { # said JOB WORDS: in the file of the job
    grep -qF -- "$2" "$dir/jobs/$1.out" && return 0
    echo "job $1 does not say: $2"
    cat "$dir/jobs/$1.out"
    return 1
}
logged() { # logged RUN STEPS: it has come so far, and not to its end
    [ "$(grep -c '"loss"' "$1/metrics.jsonl" 2>/dev/null)" -ge "$2" ] && [ ! -e "$1/summary.json" ]
}
restarted() { [ "$(field "$1" Restarts)" -ge 1 ]; }
same() { # same RUN RUN BOUND: the weights at the end; bound 0: bit by bit
    python - "$@" <<'PY'
import sys
from pathlib import Path

from safetensors.numpy import load_file

mine, theirs, bound = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
ours, others = ({k: v for f in sorted((run / "best").glob("*.safetensors")) for k, v in load_file(f).items()} for run in (mine, theirs))
assert ours and ours.keys() == others.keys(), (len(ours), len(others))
norm = sum(float((v.astype("f8") ** 2).sum()) for v in others.values()) ** 0.5
apart = sum(float(((ours[k].astype("f8") - v) ** 2).sum()) for k, v in others.items()) ** 0.5 / norm
print(f"{len(ours)} tensors, {apart:.2e} apart")
sys.exit(apart > bound)
PY
}
losses() { # losses RUN RUN BOUND: of all logged steps of the first
    python - "$@" <<'PY'
import json
import sys
from pathlib import Path

mine, theirs = ({line["step"]: line["loss"] for line in map(json.loads, (Path(run) / "metrics.jsonl").open()) if "loss" in line} for run in sys.argv[1:3])
assert mine
worst = max(abs(loss - theirs[step]) / abs(theirs[step]) for step, loss in mine.items())
print(f"{len(mine)} steps, {worst:.2e} apart")
sys.exit(worst > float(sys.argv[3]))
PY
}

# Long enough to be met in the middle; evaluated at the end only, so that the best weights are the last ones.
cat >"$dir/kfac.json" <<'JSON'
{
  "train_batch_size": 8, "gradient_accumulation_steps": "auto", "zero_optimization": {"stage": 1},
  "optimizer": {"type": "KFAC",
    "params": {"lr": 0.02, "damping": 0.1, "factor_interval": 2, "inverse_interval": 3}},
  "dsso": {
    "model": {"name": "tiny-roberta", "dropout": 0.0}, "peft": {"type": "adapter", "bottleneck": 8},
    "task": {"name": "builtin", "max_length": 48, "train_examples": 64, "eval_examples": 8},
    "train": {"max_steps": 60, "eval_interval": 60, "log_interval": 2, "save_interval": 60}}
}
JSON
cat >"$dir/mezo.json" <<'JSON'
{
  "train_batch_size": 8, "gradient_accumulation_steps": "auto",
  "optimizer": {"type": "MeZO", "params": {"lr": 0.001, "eps": 0.001, "noise": "gaussian"}},
  "dsso": {
    "engine": "ddp", "model": {"name": "tiny-roberta"}, "peft": {"type": "lora"},
    "task": {"name": "builtin", "max_length": 48, "train_examples": 64, "eval_examples": 8},
    "train": {"max_steps": 120, "eval_interval": 120, "log_interval": 2, "save_interval": 120}}
}
JSON
cat >"$dir/sweep.json" <<'JSON'
{
  "recipe": "kfac.json",
  "set": {"dsso.train.max_steps": 3, "dsso.train.eval_interval": 3, "dsso.engine": "ddp"},
  "grid": {"optimizer.params.lr": [0.01, 0.02, 0.05], "optimizer.params.tau": [0.5, 2.0]}
}
JSON

# ---- the checks ----------------------------------------------------------------------------------------------------

outside() { # a job script without Slurm
    local told status
    told="$(env -u SLURM_JOB_ID bash "launch/slurm/$1.sbatch" "$dir/kfac.json" 2>&1)" && status=0 || status=$?
    echo "$status: $told"
    [ "$status" = 2 ] && grep -q 'job script for Slurm. Usage: sbatch' <<<"$told"
}
unknown() { ! submit --partition=nosuch launch/slurm/single.sbatch "$dir/kfac.json"; }
preempted() { # preempted JOB RUN: SIGUSR1 in its midst makes it write a checkpoint and be queued again
    await 120 logged "$2" 3 || { echo "never in its midst: $(field "$1" JobState)" && return 1; }
    scancel --signal=USR1 "$1"
    await 60 restarted "$1" || { echo "not queued again: $(field "$1" JobState) $(field "$1" ExitCode)" &&
        cat "$dir/jobs/$1.out" && return 1; }
    ls "$2"/checkpoints
    [ -d "$2/checkpoints" ] && [ ! -e "$2/summary.json" ] &&
        grep -q 'SIGUSR1: writing a checkpoint after this step' "$DSSO_LOGS/$1/rank_0.log"
}
launcher() { grep "\"launcher\": \"$2\"" "$1/config.json" || { grep launcher "$1/config.json" && return 1; }; }
left_early() { ls "$runs/late/checkpoints"/step_* && grep 's are left of the job' "$DSSO_LOGS/$late/rank_0.log"; }
table() {
    python launch/sweep.py table "$runs/sweep" >"$dir/table" 2>&1
    cat "$dir/table"
    [ "$(grep -c 'finished' "$dir/table")" -ge 6 ]
}
all_ended() { ! squeue --noheader --jobs "$array" 2>/dev/null | grep -q .; }

# Jobs are submitted before they are waited for: two of them share the nodes all the time, and meet on one host.
if want preemption; then
    kfac=$(submit launch/slurm/multinode.sbatch "$dir/kfac.json" --output_dir "$runs/kfac")
    cut=$(submit launch/slurm/multinode.sbatch "$dir/kfac.json" --output_dir "$runs/kfac_cut")
    # One of them meets at an IPv6 address where there are any, another is bound to an interface.
    export MASTER_ADDR=::1
    grep -q ' lo$' /proc/net/if_inet6 2>/dev/null || unset MASTER_ADDR
    mezo=$(submit launch/slurm/multinode.sbatch "$dir/mezo.json" --output_dir "$runs/mezo")
    unset MASTER_ADDR
    mezo_cut=$(submit launch/slurm/multinode.sbatch "$dir/mezo.json" --output_dir "$runs/mezo_cut" \
        --set dsso.train.interface=lo)
    check "K-FAC on 2 nodes: preempted by SIGUSR1, queued again" preempted "$cut" "$runs/kfac_cut"
    check "MeZO on 2 nodes: preempted by SIGUSR1, queued again" preempted "$mezo_cut" "$runs/mezo_cut"
fi
if want input; then
    for name in single multinode array debug; do
        check "$name.sbatch outside Slurm: a clear error, exit 2" outside "$name"
    done
    check "an unknown partition is refused by sbatch" unknown
    missing=$(submit launch/slurm/single.sbatch configs/no_such_recipe.json)
    wrong=$(submit launch/slurm/multinode.sbatch "$dir/kfac.json" --output_dir "$runs/wrong" \
        --set optimizer.params.dampin=1)
    if [ "$apart" = yes ]; then
        locked=$(submit launch/slurm/multinode.sbatch "$dir/mezo.json" --output_dir "$dir/locked/run")
        own=$(submit launch/slurm/multinode.sbatch "$dir/mezo.json" --output_dir "$dir/local/run")
    fi
    mixed=$(submit --nodes=2 --ntasks=2 --wrap "export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=1
        srun python launch/train.py --ds_config $dir/kfac.json --output_dir $runs/mixed")
fi
if want place; then
    finish "$cut" >/dev/null
    # A job script that starts plain Python is one process, also where it has several tasks.
    plain=$(submit --nodes=2 --ntasks=2 --wrap "python launch/train.py --ds_config $dir/kfac.json \
        --output_dir $runs/plain --set dsso.train.max_steps=10")
    stopped="$(find "$runs/kfac_cut/checkpoints" -name 'step_*' 2>/dev/null | sort | head -n 1)"
    fewer=$(submit launch/slurm/single.sbatch "$dir/kfac.json" --output_dir "$runs/fewer" --resume "$stopped" \
        --set dsso.engine=ddp)
    # Less time than a checkpoint may take before one is measured: the run leaves after its first step, by itself.
    late=$(submit launch/slurm/debug.sbatch "$dir/kfac.json" --output_dir "$runs/late" \
        --set dsso.train.time_limit_minutes=0.5 --set dsso.engine=ddp)
fi
if want array; then
    array=$(submit --array=0-5 launch/slurm/array.sbatch "$dir/sweep.json" --out "$runs/sweep")
fi

if want preemption; then
    check "K-FAC on 2 nodes: uninterrupted" finish "$kfac"
    check "K-FAC: the preempted job came to its end" finish "$cut"
    check "  bit by bit what the uninterrupted run has" same "$runs/kfac_cut" "$runs/kfac" 0
    check "MeZO on 2 nodes: uninterrupted" finish "$mezo"
    check "MeZO: the preempted job came to its end" finish "$mezo_cut"
    check "  bit by bit what the uninterrupted run has" same "$runs/mezo_cut" "$runs/mezo" 0
fi
if want input; then
    check "a recipe that is not there: exit 2" finish "$missing" 2
    check "  and the reason" said "$missing" "there is no recipe configs/no_such_recipe.json"
    check "an unknown key of the recipe: exit 2 through srun" finish "$wrong" 2
    check "  and the reason, in the file of the job" said "$wrong" "nearest: 'damping'"
    if [ "$apart" = yes ]; then
        check "an output directory that one node may not write to: exit 2 through srun" finish "$locked" 2
        check "  and which rank, in the file of the job" said "$locked" "rank 1 on $host cannot write there"
        check "  and nothing was trained" test ! -e "$dir/locked/run/metrics.jsonl"
        check "an output directory that nodes do not share: exit 2 through srun" finish "$own" 2
        check "  and which rank" said "$own" "rank 1 on $host does not see what rank 0"
    else
        printf 'left out: an output directory of one node alone (%s)\n' "$(tail -n 1 "$dir/log/unshare.err")"
    fi
    check "variables of two launchers: exit 2 through srun" finish "$mixed" 2
    check "  and the reason" said "$mixed" "two launchers contradict each other"
fi
if want place; then
    check "plain python in a job of two tasks: one process" finish "$plain"
    check "  and says so" launcher "$runs/plain" none
    check "  while srun says srun" launcher "$runs/kfac" srun
    check "  and its losses are those of srun on 2 nodes to 1e-6" losses "$runs/plain" "$runs/kfac" 1e-6
    check "K-FAC stopped on 2 nodes (ZeRO-1) goes on with 1 (DDP)" finish "$fewer"
    check "  to rounding (1e-4)" same "$runs/fewer" "$runs/kfac" 1e-4
    check "a run leaves by itself before its time is up: exit 138 without requeue" finish "$late" 138
    check "  with a checkpoint" left_early
fi
if want array; then
    check "a sweep of 6 points as a job array" await 180 all_ended
    check "  and its table" table
fi

printf '%s after %s s\n' "$([ "$failed" = 0 ] && echo 'all checks passed' || echo FAILED)" "$SECONDS"
exit "$failed"
