#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every worker of a TPU.
#
#     launch/tpu_worker.sh install
#     launch/tpu_worker.sh run --id=ID [--share=HOST:/PATH] -- [flags of nfjax.main]
#     launch/tpu_worker.sh stop | code
#
# run starts the trainer unless it is running, shows what it prints, and ends with its code. The trainer does not depend
# on the connection: gcloud gives a command once more where that broke, so a run that goes on, or that has ended under
# the same ID, is shown and not started. stop sends SIGTERM. code is the code of the last run, 0 for 75.
#
# PYTHON=python   .venv/bin/python by default

set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}
SHARED=/mnt/nfjax

fail() {
    echo "tpu_worker.sh: $1" >&2
    exit 2
}

# The images have a Python older than 3.11; uv brings a newer one.
install() {
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python=3.12 .venv
    python3 -m uv pip install --quiet --python=.venv --constraint=constraints.txt --editable '.[gcs,tfds]' 'jax[tpu]'
}

mount_share() {
    [[ -x /sbin/mount.nfs ]] || sudo apt-get -o DPkg::Lock::Timeout=300 install --quiet --yes nfs-common
    sudo mkdir -p "$SHARED"
    sudo mount -t nfs "$1" "$SHARED"
    sudo chmod a+rwx "$SHARED"
}

run() {
    local id='' share=''
    while [[ ${1:-} != -- ]]; do
        case ${1:-} in
        --id=*) id=${1#*=} ;;
        --share=*) share=${1#*=} ;;
        *) fail "run: expected --id=ID [--share=HOST:/PATH] -- [flags of nfjax.main]" ;;
        esac
        shift
    done
    shift
    [[ ! $share ]] || mountpoint --quiet "$SHARED" || mount_share "$share"

    exec 9>>run.lock # held by the run for as long as it goes on
    if flock --nonblock 9 && [[ $(cat run.id 2>/dev/null) != "$id" ]]; then
        if [[ ${XLA_FLAGS:-} ]]; then # on the CPU: the TPU would wait for the other workers
            JAX_PLATFORMS=cpu "$PYTHON" -c 'import jax; jax.devices()' ||
                fail "no process survives its start with XLA_FLAGS=$XLA_FLAGS: remove what this jaxlib does not know"
        fi
        rm -f run.pid run.code
        echo "$id" >run.id
        # shellcheck disable=SC2016
        setsid bash -c '"$@" & echo $! >run.pid; wait $!; echo $? >run.code' nfjax \
            "$PYTHON" -m nfjax.main "$@" </dev/null >run.log 2>&1 &
    fi
    exec 9>&-
    until [[ -s run.pid ]]; do sleep 0.1; done
    tail --follow --lines=+1 --pid="$(cat run.pid)" run.log
    flock run.lock true
    exit "$(cat run.code)"
}

cd "$(dirname "$0")/.."
case ${1:-} in
install) install ;;
run) run "${@:2}" ;;
stop) flock --nonblock run.lock true || kill "$(cat run.pid)" ;;
code)
    code=$(cat run.code)
    ((code == 75)) || exit "$code"
    ;;
-h | --help) sed -n '2,/^$/ s/^# \{0,1\}//p' launch/tpu_worker.sh ;;
*) fail "${1:-no command}: expected install, run, stop or code; --help tells more" ;;
esac
