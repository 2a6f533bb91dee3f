#!/usr/bin/env bash
# Builds the TensorRT engine of this export on the device, tries it, and measures it.
#
#   ./build_engine.sh                 check the device, build, smoke test, benchmark
#   ./build_engine.sh --check-only    only check the device
#   ./build_engine.sh --rebuild       build again although an engine for this device is there
#   ./build_engine.sh --help
#
# TensorRT Edge-LLM @EDGELLM_VERSION@ must be built on the device (its installation page says how): llm_build, llm_inference and
# llm_bench are looked for in $EDGELLM_BIN, in ~/TensorRT-Edge-LLM/build/examples/llm, and on PATH. Its plugin library is
# $EDGELLM_PLUGIN_PATH, or libNvInfer_edgellm_plugin.so in the same build. Engines run only on the kind of GPU and with
# the TensorRT version that they were built with.
#
# ENGINE_DIR (./engine), MAX_BATCH_SIZE, MAX_INPUT_LEN and MAX_KV_CACHE_CAPACITY may be set; IGNORE_CHECKS=1 turns a
# failed check into a warning. SYSTEM_ROOT is put before /etc and /proc; it is for testing these checks.
set -euo pipefail

readonly TARGET="@TARGET@"
readonly SM="@SM@"
readonly SOC="@SOC@"
readonly MIN_L4T="@MIN_L4T@"
readonly TESTED_L4T="@TESTED_L4T@"
readonly JETPACK="@JETPACK@"
readonly TENSORRT_MAJORS="@TENSORRT_MAJORS@"
readonly BUILD_BYTES_LOW=@BUILD_BYTES_LOW@
readonly BUILD_BYTES_HIGH=@BUILD_BYTES_HIGH@
readonly WEIGHT_BYTES=@WEIGHT_BYTES@
MAX_BATCH_SIZE="${MAX_BATCH_SIZE:-@MAX_BATCH_SIZE@}"
MAX_INPUT_LEN="${MAX_INPUT_LEN:-@MAX_INPUT_LEN@}"
MAX_KV_CACHE_CAPACITY="${MAX_KV_CACHE_CAPACITY:-@MAX_KV_CACHE_CAPACITY@}"

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
readonly here
readonly root="${SYSTEM_ROOT:-}"
engine="${ENGINE_DIR:-$here/engine}"
failures=0

say() { printf '%s\n' "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}
fail() {
    say "check failed: $*"
    failures=$((failures + 1))
}
gigabytes() { awk -v bytes="$1" 'BEGIN { printf "%.1f GB", bytes / 1e9 }'; }
meminfo() { awk -v key="$1:" '$1 == key { printf "%.0f", $2 * 1024; found = 1 } END { if (!found) print 0 }' "$root/proc/meminfo"; }
# whether version $1 is at least version $2
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

tool() {
    local directory
    for directory in "${EDGELLM_BIN:-}" "$HOME/TensorRT-Edge-LLM/build/examples/llm"; do
        if [ -n "$directory" ] && [ -x "$directory/$1" ]; then
            printf '%s\n' "$directory/$1"
            return
        fi
    done
    command -v "$1" || true
}

check_jetpack() {
    [ -n "$MIN_L4T" ] || return 0
    local file="$root/etc/nv_tegra_release" release
    if [ ! -r "$file" ]; then
        fail "$file is not there, so this is no Jetson; $TARGET needs JetPack $JETPACK"
        return 0
    fi
    release="$(sed -n 's/^# R\([0-9]*\) (release), REVISION: \([0-9.]*\).*/\1.\2/p' "$file" | head -n 1)"
    if [ -z "$release" ]; then
        fail "$file does not name a release; $TARGET needs JetPack $JETPACK"
    elif ! at_least "$release" "$MIN_L4T"; then
        fail "Jetson Linux $release is older than $MIN_L4T; install JetPack $JETPACK"
    else
        say "Jetson Linux $release"
        at_least "$release" "$TESTED_L4T" ||
            say "warning: TensorRT Edge-LLM @EDGELLM_VERSION@ was tested by NVIDIA from Jetson Linux $TESTED_L4T only"
    fi
}

# The compute capability: nvidia-smi says it, or the module's chip implies it.
found_sm() {
    local capability chip
    capability="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 || true)"
    if [[ "$capability" =~ ^[0-9]+\.[0-9]+$ ]]; then
        printf '%s\n' "$capability"
        return
    fi
    chip="$(tr '\0' '\n' <"$root/proc/device-tree/compatible" 2>/dev/null || true)"
    case "$chip" in
    *nvidia,tegra234*) printf '8.7\n' ;;
    *nvidia,tegra264*) printf '11.0\n' ;;
    *) printf 'unknown\n' ;;
    esac
}

check_gpu() {
    local capability
    capability="$(found_sm)"
    if [ "$capability" != "$SM" ]; then
        fail "the GPU has compute capability $capability, and $TARGET (${SOC:-a data-centre GPU}) has $SM"
    else
        say "GPU compute capability $capability"
    fi
}

found_tensorrt() {
    local major version
    for major in $TENSORRT_MAJORS; do
        version="$(dpkg-query -W -f='${Version}' "libnvinfer$major" 2>/dev/null || true)"
        if [ -n "$version" ]; then
            printf '%s\n' "${version%%-*}"
            return
        fi
    done
    for major in $TENSORRT_MAJORS; do
        if { ldconfig -p 2>/dev/null || true; } | grep -F "libnvinfer.so.$major" >/dev/null; then
            printf '%s\n' "$major"
            return
        fi
    done
}

check_tensorrt() {
    local version
    version="$(found_tensorrt)"
    if [ -z "$version" ]; then
        fail "no libnvinfer of TensorRT $TENSORRT_MAJORS was found; on a Jetson: sudo apt install nvidia-jetpack"
    else
        say "TensorRT $version"
    fi
}

check_memory() {
    local available swap total
    available="$(meminfo MemAvailable)"
    swap="$(meminfo SwapFree)"
    total=$((available + swap))
    say "memory: $(gigabytes "$available") available, $(gigabytes "$swap") of swap free"
    if [ "$total" -lt "$BUILD_BYTES_LOW" ]; then
        fail "building may take $(gigabytes "$BUILD_BYTES_LOW") to $(gigabytes "$BUILD_BYTES_HIGH"), more than there is; \
stop the desktop (sudo systemctl isolate multi-user.target) or add swap on NVMe: \
sudo fallocate -l 32G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
    elif [ "$total" -lt "$BUILD_BYTES_HIGH" ]; then
        say "warning: building may take up to $(gigabytes "$BUILD_BYTES_HIGH"); add swap if it is killed"
    fi
    if grep -q '^/dev/zram' "$root/proc/swaps" 2>/dev/null; then
        say "warning: swap is zram, which shares the memory it shall relieve; for the build: sudo swapoff -a, then swap on NVMe"
    fi
}

check_disk() {
    local free
    free="$(df -P -B1 "$(dirname "$engine")" | awk 'NR == 2 { print $4 }')"
    if [ "$free" -lt $((2 * WEIGHT_BYTES)) ]; then
        fail "$(dirname "$engine") has $(gigabytes "$free") free, and the engine needs about $(gigabytes $((2 * WEIGHT_BYTES)))"
    fi
}

find_tools() {
    llm_build="$(tool llm_build)"
    llm_inference="$(tool llm_inference)"
    llm_bench="$(tool llm_bench)"
    if [ -z "$llm_build" ] || [ -z "$llm_inference" ] || [ -z "$llm_bench" ]; then
        fail "llm_build, llm_inference or llm_bench is missing; build TensorRT Edge-LLM @EDGELLM_VERSION@ and set EDGELLM_BIN"
        return 0
    fi
    local plugin
    plugin="$(dirname "$llm_build")/../../libNvInfer_edgellm_plugin.so"
    if [ -z "${EDGELLM_PLUGIN_PATH:-}" ] && [ -e "$plugin" ]; then
        EDGELLM_PLUGIN_PATH="$plugin"
    fi
    if [ -z "${EDGELLM_PLUGIN_PATH:-}" ]; then
        say "warning: EDGELLM_PLUGIN_PATH is not set and no plugin library lies beside the tools"
    else
        export EDGELLM_PLUGIN_PATH
    fi
}

# What an engine is good for: kept beside it, and compared before it is used again.
stamp() {
    printf 'sm=%s tensorrt=%s batch=%s input=%s cache=%s onnx=%s\n' "$(found_sm)" "$(found_tensorrt)" \
        "$MAX_BATCH_SIZE" "$MAX_INPUT_LEN" "$MAX_KV_CACHE_CAPACITY" \
        "$(cat "$here"/llm/model.onnx "$here"/llm/model.onnx.data | sha256sum | cut -c 1-64)"
}

build() {
    local wanted
    wanted="$(stamp)"
    if [ "$rebuild" = 0 ] && [ -r "$engine/built.txt" ] && [ "$(cat "$engine/built.txt")" = "$wanted" ]; then
        say "$engine is the engine of this export on this device; --rebuild makes it again"
        return 0
    fi
    rm -rf "$engine.partial"
    mkdir -p "$engine.partial"
    say "building (minutes): batch $MAX_BATCH_SIZE, prompt $MAX_INPUT_LEN, KV cache $MAX_KV_CACHE_CAPACITY tokens"
    "$llm_build" --onnxDir "$here/llm" --engineDir "$engine.partial" --maxBatchSize "$MAX_BATCH_SIZE" \
        --maxInputLen "$MAX_INPUT_LEN" --maxKVCacheCapacity "$MAX_KV_CACHE_CAPACITY" >&2 ||
        die "llm_build failed; if it was killed, memory ran out: add swap, or lower MAX_INPUT_LEN and MAX_BATCH_SIZE"
    printf '%s\n' "$wanted" >"$engine.partial/built.txt"
    rm -rf "$engine"
    mv "$engine.partial" "$engine"
}

# Decoding graphs are captured by default; a failed capture is only a warning there, and an error here.
graphs_captured() {
    if grep -Eiq 'capture(d)? .*(fail|unable)|fail(ed)? to capture' "$1"; then
        die "CUDA Graphs were not captured (see $1); decoding would be slower than measured elsewhere"
    fi
}

smoke_test() {
    rm -f "$engine/smoke_output.json"
    "$llm_inference" --engineDir "$engine" --inputFile "$here/smoke_input.json" \
        --outputFile "$engine/smoke_output.json" >"$engine/smoke.log" 2>&1 ||
        die "llm_inference failed; see $engine/smoke.log"
    [ -s "$engine/smoke_output.json" ] || die "llm_inference wrote no answer; see $engine/smoke.log"
    graphs_captured "$engine/smoke.log"
    say "smoke test: the engine answered; read the answer, it must make sense:"
    cat "$engine/smoke_output.json"
}

benchmark() {
    local prompt=$((MAX_INPUT_LEN < 512 ? MAX_INPUT_LEN : 512)) log="$engine/bench.log"
    "$llm_bench" --engineDir "$engine" --mode prefill --inputLen "$prompt" --batchSize "$MAX_BATCH_SIZE" \
        --outputDir "$engine/bench" >"$log" 2>&1 || die "llm_bench failed; see $log"
    "$llm_bench" --engineDir "$engine" --mode decode --pastKVLen "$prompt" --batchSize "$MAX_BATCH_SIZE" \
        --outputDir "$engine/bench" >>"$log" 2>&1 || die "llm_bench failed; see $log"
    graphs_captured "$log"
    cat "$log"
}

check_only=0
rebuild=0
for argument in "$@"; do
    case "$argument" in
    --check-only) check_only=1 ;;
    --rebuild) rebuild=1 ;;
    -h | --help)
        sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) die "unknown argument $argument; --help lists them" ;;
    esac
done

check_jetpack
check_gpu
check_tensorrt
check_memory
check_disk
find_tools
if [ "$failures" -gt 0 ]; then
    [ "${IGNORE_CHECKS:-0}" = 1 ] && [ -n "$llm_build" ] || die "$failures checks failed"
    say "warning: $failures checks failed and are ignored"
fi
say "checks passed for $TARGET"
[ "$check_only" = 0 ] || exit 0
build
smoke_test
benchmark
say "engine in $engine"
