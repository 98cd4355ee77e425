#!/usr/bin/env bash
# Trains on the GPUs of this machine, one process for each.
#
#     launch/local_gpus.sh [--dry-run] [--] --config=FILE --workdir=DIR [--config.x.y=value ...]
#
# All processes are started again while they end with 75: they were stopped, saved, and go on from there. When one of
# them fails, the others are ended. SIGTERM and Ctrl-C reach each process once; it saves and ends.
#
# CUDA_VISIBLE_DEVICES=0,2   which GPUs; all of them by default
# PORT=12345                 where the processes find each other; a free port by default
# PYTHON=.venv/bin/python    python by default

set -euo pipefail

PYTHON=${PYTHON:-python}
GRACE=90 # seconds for the others to end after one has failed; they notice its loss within seconds

fail() {
    echo "local_gpus.sh: $1" >&2
    exit 2
}

# Prints these words as one line for the shell; runs nothing.
show() {
    local word line='' quote="'" quoted="'\\''"
    for word; do
        [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//$quote/$quoted}'"
        line+=" $word"
    done
    echo "${line:1}"
}

dry_run='' arguments=()
while (($#)); do
    case $1 in
    -h | --help) sed -n '2,/^$/ s/^# \{0,1\}//p' "$0" && exit ;;
    --dry-run) dry_run=yes ;;
    --) arguments+=("${@:2}") && break ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
for flag in --config --workdir; do
    [[ " ${arguments[*]} " == *" $flag"[=\ ]* ]] || fail "$flag= is missing; --help tells more"
done

if [[ ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
else
    listed=$(nvidia-smi -L 2>&1) || fail "nvidia-smi -L finds no GPU; CUDA_VISIBLE_DEVICES=0,1 names them"
    mapfile -t gpus < <(seq 0 $(($(grep -c '^GPU' <<<"$listed") - 1)))
    ((${#gpus[@]})) || fail "nvidia-smi -L lists no GPU; CUDA_VISIBLE_DEVICES=0,1 names them"
fi

# Below the ports that connections to other machines take.
port=${PORT:-$((20000 + RANDOM % 10000))}
while [[ ! ${PORT:-} ]] && (: <"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((port + 1)); done

# command=(...) of process $1
set_command() {
    command=(env "CUDA_VISIBLE_DEVICES=${gpus[$1]}" "$PYTHON" -m nfjax.main
        "--coordinator=localhost:$port" "--processes=${#gpus[@]}" "--process=$1" "${arguments[@]}")
}

check=("$PYTHON" -c 'import jax; jax.devices()')
if [[ $dry_run ]]; then
    [[ ! ${XLA_FLAGS:-} ]] || show "${check[@]}"
    for i in "${!gpus[@]}"; do set_command "$i" && show "${command[@]}"; done
    exit
fi
if [[ ${XLA_FLAGS:-} ]]; then
    "${check[@]}" ||
        fail "no process survives its start with XLA_FLAGS=$XLA_FLAGS: remove what this jaxlib does not know"
fi

running=() stopping=''
# shellcheck disable=SC2329 # by the traps
pass_on() {
    stopping=yes
    kill -s "$1" "${running[@]}" 2>/dev/null || true
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP

# Sets code: what the first process that failed ended with, 75 where none failed and some were stopped, else 0.
train() {
    local i ended deadline=''
    code=0
    for i in "${!gpus[@]}"; do
        set_command "$i"
        (trap - INT && exec setsid "${command[@]}") & # Ctrl-C in a terminal reaches this script alone
        running[i]=$!
    done
    while ((${#running[@]})); do
        sleep 0.2 || true # which Ctrl-C ends as well
        for i in "${!running[@]}"; do
            if kill -0 "${running[i]}" 2>/dev/null; then continue; fi
            ended=0
            wait "${running[i]}" || ended=$?
            unset "running[i]"
            if ((ended == 0 || ended == 75)); then
                ((code)) || code=$ended
            elif ((code == 0 || code == 75)); then
                code=$ended
                [[ ! $stopping ]] || continue
                echo "local_gpus.sh: process $i of ${#gpus[@]} failed with $code" >&2
                kill "${running[@]}" 2>/dev/null || true
                deadline=$((SECONDS + GRACE))
            fi
        done
        if [[ $deadline ]] && ((SECONDS > deadline)); then kill -s KILL "${running[@]}" 2>/dev/null || true; fi
    done
}

train
while ((code == 75)) && [[ ! $stopping ]]; do
    echo "local_gpus.sh: stopped with 75, starting again" >&2
    train
done
exit "$code"
