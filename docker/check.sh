#!/usr/bin/env bash
# Build the CPU image and use it as a cluster does: as a user without a name, with a read-only root, stopped and continued.
#   make docker-check
# Prints what it measured, and ends with 0 if all went well, 1 if a target or a step failed. Without root, buildah, podman,
# runc or mmdebstrap it says so and ends with 0: on Debian, apt-get install buildah podman runc mmdebstrap
#
# Variables, all optional:
#   BASE           the base image; empty: one is made from Debian's packages, as if it were python:3.11-slim-bookworm
#   BUILD_OPTIONS  further options of `buildah build`, such as --secret id=pip,src=pip.conf or --build-arg TORCH_INDEX=
#   STORAGE        storage driver; default overlay; vfs works everywhere, and copies the image for each layer and container
#   RUN_OPTIONS    further options of `podman run`; default: the host's network and the limits of a container without systemd
#   WORK           a folder that is kept with its layers, for the next call; default: a temporary one, which is deleted
set -euo pipefail
cd "$(dirname "$0")/.."

MOST_BYTES=1800000000
MOST_START_SECONDS=8
MOST_REBUILD_SECONDS=30
USER_ID=54321
IMAGE=localhost/vaescale:cpu

skip() {
    echo "docker/check.sh: skipped: $1"
    exit 0
}
[ "$(id -u)" = 0 ] || skip "needs root, to build without a user namespace"
for program in buildah podman runc; do
    command -v "$program" > /dev/null || skip "$program is missing"
done
[ -n "${BASE:-}" ] || command -v mmdebstrap > /dev/null || skip "mmdebstrap is missing, and BASE names no base image"

work=${WORK:-$(mktemp -d /var/tmp/vaescale-check.XXXXXX)}
mkdir -p "$work"
read -ra build_options <<< "${BUILD_OPTIONS:-}"
read -ra run_options <<< "${RUN_OPTIONS:---network host --ulimit nofile=20000:20000 --ulimit nproc=2000:2000}"
storage=(--storage-driver "${STORAGE:-overlay}" --root "$work/storage" --runroot "$work/run")
podman=(podman "${storage[@]}" --tmpdir "$work/tmp" --cgroup-manager cgroupfs --runtime runc)
logs=$work/logs
mkdir -p "$logs"

# shellcheck disable=SC2317  # the trap calls it
clean_up() {
    "${podman[@]}" rm --all --force --time 0 > /dev/null 2>&1 || true
    "${podman[@]}" volume rm --all --force > /dev/null 2>&1 || true
    if [ -z "${WORK:-}" ]; then
        "${podman[@]}" rmi --all --force > /dev/null 2>&1 || true
        rm -rf "$work"
    fi
}
trap clean_up EXIT

failed=0
step() { echo "== $1" >&2; }
fail() {
    echo "docker/check.sh: FAILED: $1" >&2
    failed=1
}
now() { date +%s.%N; }
since() { awk -v start="$1" -v end="$(now)" 'BEGIN { printf "%.1f", end - start }'; }
expect() { # expect WHAT WANTED GOT
    [ "$2" = "$3" ] || fail "$1: $3 instead of $2"
}
at_most() { # at_most WHAT MOST GOT
    awk -v most="$2" -v got="$3" 'BEGIN { exit !(got <= most) }' || fail "$1: $3 is above $2"
}
build() {
    # The format of OCI knows no HEALTHCHECK.
    buildah "${storage[@]}" build --format docker --layers --isolation chroot --build-arg "BASE=$base" \
        --build-arg BUILD_PACKAGES="g++ python3-dev python3-venv" "${build_options[@]}" \
        --file docker/Dockerfile --target cpu --tag "$IMAGE" "$1" > "$logs/build.log" 2>&1 \
        || { tail -n 30 "$logs/build.log" >&2; fail "the build"; exit 1; }
}
# As an unknown user: a read-only root, a tmpfs, two volumes.
hardened=(--user "$USER_ID:$USER_ID" --read-only --tmpfs /tmp --shm-size 256m --env OMP_NUM_THREADS=1
    --volume data:/workspace/data --volume runs:/workspace/runs)
container() { # container OPTION ... IMAGE WORD ...; prints what the container prints
    "${podman[@]}" run --pull never "${run_options[@]}" "${hardened[@]}" "$@"
}
in_container() { # in_container LOG WORD ...: `vaescale WORD ...` to its end; returns its exit code
    local log=$logs/$1.log
    shift
    container --rm --no-healthcheck "$IMAGE" "$@" > "$log" 2>&1
}
succeed() { # succeed LOG WORD ...: the same, with exit code 0
    local log=$1
    in_container "$@" || { tail -n 20 "$logs/$log.log" >&2; fail "vaescale ${*:2}"; }
}
volume() { "${podman[@]}" volume inspect --format '{{.Mountpoint}}' "$1"; }
steps_of() { # the number of different steps that a run's metrics.jsonl has a training row of
    { grep '"train/mse"' "$(volume runs)/$1/metrics.jsonl" 2> /dev/null || true; } \
        | sed 's/.*"step": \([0-9]*\).*/\1/' | sort -un | wc -l
}
stop_and_continue() { # stop_and_continue RUN WANTED_CODE OPTION ... IMAGE WORD ...: SIGTERM after 30 steps
    local run=$1 wanted=$2 log=$logs/$1.log waited=0
    shift 2
    container --detach --name "$run" "$@" > /dev/null 2> "$log"
    while [ "$(steps_of "$run")" -lt 30 ] && [ "$waited" -lt 1200 ]; do
        sleep 0.1
        waited=$((waited + 1))
    done
    if [ "$run" = one ]; then
        "${podman[@]}" healthcheck run "$run" > "$logs/health.log" 2>&1 || fail "HEALTHCHECK"
    fi
    "${podman[@]}" kill --signal TERM "$run" > /dev/null
    expect "exit code of $run after SIGTERM" "$wanted" "$("${podman[@]}" wait "$run")"
    "${podman[@]}" logs "$run" > "$log" 2>&1
    "${podman[@]}" rm "$run" > /dev/null
    expect "messages of SIGTERM in $run" 1 "$(grep -c 'SIGTERM: saving after this step' "$log" || true)"
    grep -q '"exit_code": 75' "$(volume runs)/$run/stopped.json" || fail "$run: stopped.json has no exit code 75"
    local reached
    reached=$(steps_of "$run")
    at_most "steps of $run before it stopped" 399 "$reached"
    container --rm --no-healthcheck "$@" > "$log.2" 2>&1 || fail "$run did not continue: $(tail -n 3 "$log.2")"
    expect "steps of $run in the end" 400 "$(steps_of "$run")"
    # Every step once: nothing was lost and nothing repeated.
    expect "rows of $run" 400 "$(grep -c '"train/mse"' "$(volume runs)/$run/metrics.jsonl")"
}

if [ -z "${BASE:-}" ]; then
    base=localhost/base:1
    if ! buildah "${storage[@]}" inspect --type image "$base" > /dev/null 2>&1; then
        step "A base from Debian's packages"
        mmdebstrap --quiet --variant=minbase --mode=root --include=python3,ca-certificates bookworm "$work/base.tar"
        printf 'FROM scratch\nADD base.tar /\n' > "$work/Containerfile"
        buildah "${storage[@]}" build --quiet --isolation chroot --tag "$base" --file "$work/Containerfile" "$work" > /dev/null
        rm "$work/base.tar"
    fi
else
    base=$BASE
fi

step "Build"
context=$work/context
rm -rf "$context"
mkdir "$context"
cp -R .dockerignore constraints.txt setup.py pyproject.toml README.md LICENSE vaescale tools recipes docker "$context"
start=$(now)
build "$context"
build_seconds=$(since "$start")

step "Build again after a change of the source"
echo "# changed" >> "$context/vaescale/cli.py"
start=$(now)
build "$context"
rebuild_seconds=$(since "$start")
at_most "seconds of a cached build" "$MOST_REBUILD_SECONDS" "$rebuild_seconds"
bytes=$("${podman[@]}" image inspect --format '{{.Size}}' "$IMAGE")
at_most "bytes of the image" "$MOST_BYTES" "$bytes"

step "What the image has, and has not"
# shellcheck disable=SC2016  # the container's shell expands it
container --rm --no-healthcheck --entrypoint sh "$IMAGE" -c '
    for program in g++ gcc cc c++ nvcc ninja; do
        if command -v "$program"; then exit 1; fi
    done
    test ! -s /etc/pip.conf && test ! -e /run/secrets/ca && ! touch /opt/here 2> /dev/null && test "$(id -u)" = "$1"' sh "$USER_ID" \
    || fail "a compiler, a secret or a writable root is in the image"
succeed doctor doctor --json

step "From the start of a container to the first step"
succeed shards make-shards digits data/digits --shard-samples 500
first_step() { # seconds from the start of a container to the time that the row of step 1 carries
    start=$(now)
    succeed "$1" train recipes/digits/optimal.yaml "name=$1" training.steps=20 training.log_every=1
    grep -m 1 '"train/mse"' "$(volume runs)/$1/metrics.jsonl" \
        | sed 's/.*"time": \([0-9.]*\).*/\1/' | awk -v start="$start" '{ printf "%.1f", $1 - start }'
}
first_seconds=$(first_step first)
start_seconds=$(first_step second)
at_most "seconds to the first step" "$MOST_START_SECONDS" "$start_seconds"

step "The quickstart, on two processes"
start=$(now)
succeed quickstart quickstart
quickstart_seconds=$(since "$start")

step "SIGTERM, exit code 75, continue from the volume"
words=(recipes/digits/optimal.yaml training.log_every=1)
stop_and_continue one 75 "$IMAGE" train "${words[@]}" name=one
if in_container launch launch --help; then
    stop_and_continue two 75 "$IMAGE" launch --processes 2 "${words[@]}" name=two
fi
# accelerate's launcher itself ends with 1, whatever its processes end with.
stop_and_continue launcher 1 --entrypoint '["tini", "--", "accelerate"]' "$IMAGE" launch \
    --config_file recipes/backends/cpu2.yaml --main_process_port 0 -m vaescale train "${words[@]}" name=launcher

step "DeepSpeed without a compiler"
start=$(now)
container --rm --no-healthcheck --env ACCELERATE_USE_CPU=true --entrypoint '["tini", "--", "accelerate"]' "$IMAGE" launch \
    --config_file recipes/backends/zero2.yaml --num_processes 2 --main_process_port 0 \
    -m vaescale train recipes/digits/optimal.yaml name=zero training.steps=20 > "$logs/zero.log" 2>&1 \
    || { tail -n 20 "$logs/zero.log" >&2; fail "ZeRO-2"; }
zero_seconds=$(since "$start")

step "What the image cannot do is said in a sentence"
code=0
in_container compile train recipes/digits/optimal.yaml name=compiled training.steps=2 training.compile=true || code=$?
expect "exit code of training.compile" 2 "$code"
grep -q 'Traceback' "$logs/compile.log" && fail "training.compile ends with a traceback"

cat <<END
image                                 $(awk -v bytes="$bytes" 'BEGIN { printf "%.2f GB", bytes / 1e9 }')
first build                           $build_seconds s
build after a change of the source    $rebuild_seconds s
start to the first step               $start_seconds s (the first container: $first_seconds s)
quickstart                            $quickstart_seconds s
20 steps of ZeRO-2 on two processes   $zero_seconds s
END
exit "$failed"
