#!/usr/bin/env bash
# Trains on a TPU VM or, with the same commands, on all workers of a pod slice.
#
#     launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTION ...] [--] [flags of nfjax.main]
#
# create    the TPU, of --type=v6e-16 --version=v2-alpha-tpuv6e (v5litepod-N: v2-alpha-tpuv5-lite, v5p-N:
#           v2-alpha-tpuv5, older: tpu-ubuntu2204-base); with --spot from spare capacity: cheaper, taken back any time
# copy      nfjax, configs and launch to every worker, into ~/nfjax
# install   them there, with the versions of constraints.txt
# run       --config=FILE --workdir=DIR [--config.x.y=value ...] on all workers, and shows what they print. It goes on
#           there when the connection breaks; the same command shows it again. Ctrl-C and SIGTERM stop it, saved
# resume    the same, again and again while it ends with 75 or the TPU is taken away; that is then created, copied to
#           and installed once more, so resume takes the options of create as well
# delete    the TPU
#
# --share=HOST:/PATH   an NFS share, Filestore for one, mounted as /mnt/nfjax on every worker: with a workdir below it
#                      all workers see the same files, and the files outlive the TPU
# --project=PROJECT    where it is not gcloud's default
# --dry-run            prints the commands and runs nothing
#
# XLA_FLAGS and LIBTPU_INIT_ARGS (which is where flags of the TPU's compiler belong) are handed on to the workers.

set -euo pipefail

SHARED=/mnt/nfjax
RETRY=${RETRY:-60} # seconds until the TPU, or capacity for one, is asked for again

fail() {
    echo "tpu_vm.sh: $1" >&2
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

tpu() {
    if [[ $dry_run ]]; then show gcloud compute tpus tpu-vm "$@"; else ${detached:-} gcloud compute tpus tpu-vm "$@"; fi
}

on_all() {
    tpu ssh "$name" "${place[@]}" --worker=all --command="$1"
}

create() {
    tpu create "$name" "${place[@]}" "--accelerator-type=$type" "--version=$version" ${spot:+--spot}
}

copy() {
    on_all 'mkdir -p nfjax' &&
        tpu scp --recurse nfjax configs launch pyproject.toml constraints.txt README.md LICENSE "$name:nfjax/" \
            "${place[@]}" --worker=all
}

install() {
    on_all 'bash nfjax/launch/tpu_worker.sh install'
}

delete() {
    tpu delete "$name" "${place[@]}" --quiet
}

# Ends with the first code of a worker that is not 0, or with 255 where the connection broke.
run() {
    local variable child code command=''
    for variable in XLA_FLAGS LIBTPU_INIT_ARGS; do
        [[ ! ${!variable:-} ]] || command+="$variable=$(printf %q "${!variable}") "
    done
    command+="bash nfjax/launch/tpu_worker.sh run --id=${ID:-$(date +%s)-$RANDOM}"
    [[ ! $share ]] || command+=" --share=$(printf %q "$share")"
    command+=" --$(printf ' %q' "${arguments[@]}")"
    if [[ $dry_run ]]; then
        on_all "$command"
        return
    fi
    detached=$(command -v setsid) on_all "$command" </dev/null & # Ctrl-C in a terminal reaches this script alone
    child=$!
    trap stop INT TERM
    while true; do
        signalled='' code=0
        wait "$child" || code=$?
        [[ $signalled ]] || break
    done
    trap - INT TERM
    return "$code"
}

# shellcheck disable=SC2329 # by the trap
stop() {
    signalled=yes stopped=yes
    on_all 'bash nfjax/launch/tpu_worker.sh stop' || true
}

# READY, PREEMPTED, …; NONE where there is no such TPU.
state() {
    local answer
    if answer=$(tpu describe "$name" "${place[@]}" '--format=value(state)' 2>&1); then
        echo "${answer##*$'\n'}"
    elif [[ $answer == *NOT_FOUND* ]]; then
        echo NONE
    else
        echo "$answer" >&2
        return 1
    fi
}

resume() {
    local code now
    if [[ $dry_run ]]; then
        state && delete && create && copy && install && run && on_all 'bash nfjax/launch/tpu_worker.sh code'
        return
    fi
    while true; do
        now=$(state) || exit 1
        case $now in
        READY) ;;
        NONE) create && copy && install || exit ;;
        PREEMPTED | TERMINATED)
            delete || exit
            until create; do sleep "$RETRY"; done
            copy && install || exit
            ;;
        CREATING | STARTING | RESTARTING | REPAIRING | STOPPING | DELETING)
            sleep "$RETRY"
            continue
            ;;
        *) fail "resume: $name is $now: expected READY, PREEMPTED or no TPU of this name" ;;
        esac
        code=0
        run || code=$?
        if ((code == 0)) || [[ $stopped ]]; then return "$code"; fi
        now=$(state) || exit 1
        if [[ $now == READY ]]; then
            ((code == 75)) || return "$code"
            # A worker that failed may be hidden by the 75 of those that it stopped.
            on_all 'bash nfjax/launch/tpu_worker.sh code' || code=$?
            ((code == 75 || code == 255)) || return "$code"
        fi
        echo "tpu_vm.sh: $name is $now, the run ended with $code: starting again" >&2
    done
}

case ${1:-} in
create | copy | install | run | resume | delete) command=$1 ;;
-h | --help) sed -n '2,/^$/ s/^# \{0,1\}//p' "$0" && exit ;;
*) fail "${1:-no command}: expected create, copy, install, run, resume or delete; --help tells more" ;;
esac
shift
name='' zone='' project='' type='' version='' spot='' share='' dry_run='' workdir='' stopped='' arguments=()
while (($#)); do
    case $1 in
    -h | --help) sed -n '2,/^$/ s/^# \{0,1\}//p' "$0" && exit ;;
    --name=* | --zone=* | --project=* | --type=* | --version=* | --share=*)
        option=${1%%=*}
        printf -v "${option#--}" %s "${1#*=}"
        ;;
    --spot) spot=yes ;;
    --dry-run) dry_run=yes ;;
    --) break ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
[[ ${1:-} != -- ]] || arguments+=("${@:2}")

need() {
    local option
    for option; do [[ ${!option} ]] || fail "$command: --$option= is missing; --help tells more"; done
}
need name zone
place=("--zone=$zone" ${project:+"--project=$project"})
case $command in
create | resume) need type version ;;
esac
case $command in
run | resume)
    [[ " ${arguments[*]-} " == *' --config='* ]] || fail "$command: --config= is missing; --help tells more"
    for argument in "${arguments[@]}"; do [[ $argument != --workdir=* ]] || workdir=${argument#*=}; done
    need workdir
    ;;
*) [[ ! ${arguments[*]-} ]] || fail "$command takes no ${arguments[0]}; --help tells more" ;;
esac
if [[ $command == resume && ! ($share && $workdir == $SHARED/*) ]]; then
    fail "resume: --workdir=$workdir is lost with the TPU; expected $SHARED/DIR and --share=HOST:/PATH"
fi
if [[ ! $share && $workdir == $SHARED/* ]]; then fail "$command: --share= is missing: it is what $SHARED is"; fi

cd "$(dirname "$0")/.."
"$command"
