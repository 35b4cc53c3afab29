#!/usr/bin/env bash
# Exports a finished run and serves it, OpenAI-compatible.
#
#   export/export_and_serve.sh RUN DIR [--engine vllm|sglang|grace] [--format FORMAT] [--host HOST] [--port PORT]
#                                      [--dry-run] [-- options of the engine]
#
# DIR is made by `grace export RUN --out DIR`; if it is an export already, it is served as it is (RUN may be -).
# Without --engine the first that is installed: vllm, sglang, grace. Without --format the one that suits the
# engine: awq for vllm and grace, compressed-tensors for sglang (whose plain AWQ computes in fp16 only).
# What stands behind -- goes to the engine. GRACE_EXPORT_OPTIONS is for `grace export` (--max-shard-size 2GB).
# GRACE_API_KEY, if set, is what clients must present. Exit code 2: the call is wrong, one line says how.
set -euo pipefail

die() {
    echo "error: $*" >&2
    exit 2
}

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
}

has() {
    command -v "$1" >/dev/null 2>&1
}

find_engine() {
    if has vllm; then
        echo vllm
    elif "${PYTHON:-python}" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("sglang") is None)' 2>/dev/null; then
        echo sglang
    else
        echo grace
    fi
}

run='' dir='' engine='' format='' host=127.0.0.1 port=8000 dry_run=''
while (($#)); do
    case $1 in
        --engine | --format | --host | --port)
            [[ $# -ge 2 && -n $2 ]] || die "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        --dry-run)
            dry_run=yes
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            break
            ;;
        --*)
            die "unknown option $1 (see $0 --help)"
            ;;
        *)
            if [[ -z $run ]]; then
                run=$1
            elif [[ -z $dir ]]; then
                dir=$1
            else
                die "one RUN and one DIR, not $1 as well (see $0 --help)"
            fi
            shift
            ;;
    esac
done

[[ -n $run && -n $dir ]] || die "give RUN and DIR (see $0 --help)"
if ! [[ $port =~ ^[0-9]{1,5}$ ]] || ((10#$port < 1 || 10#$port > 65535)); then
    die "--port $port is no port: 1 to 65535"
fi
[[ -n $engine ]] || engine=$(find_engine)
case $engine in
    vllm) fits='awq compressed-tensors' ;;
    sglang) fits='compressed-tensors awq' ;;
    grace) fits='awq qat' ;;
    *) die "unknown engine $engine: vllm, sglang or grace" ;;
esac
[[ -n $format ]] || format=${fits%% *}
[[ " $fits " == *" $format "* ]] || die "$engine does not serve $format: choose from ${fits// /, }"
case $engine in
    sglang) has "${PYTHON:-python}" || die "${PYTHON:-python} is not installed, and sglang runs under it: set PYTHON" ;;
    *) has "$engine" || die "$engine is not installed, or not in PATH" ;;
esac

shown() {
    printf '%q ' "$@" >&2
    echo >&2
}

if [[ -f $dir/grace_export.json ]]; then
    found=$(sed -n 's/^  "format": "\([a-z-]*\)",\{0,1\}$/\1/p' "$dir/grace_export.json")
    [[ " $fits " == *" $found "* ]] || die "$dir holds ${found:-an unknown format}, which $engine does not serve: choose another DIR"
    format=$found
    echo "$dir holds a checked $found export already" >&2
else
    [[ $run != - ]] || die "$dir is no export (no grace_export.json): give the RUN to make it from"
    [[ -e $run ]] || die "there is no run $run"
    has grace || die "grace is not installed, or not in PATH"
    read -ra options <<<"${GRACE_EXPORT_OPTIONS-}"
    make=(grace export "$run" --out "$dir" --format "$format" ${options[@]+"${options[@]}"})
    shown "${make[@]}"
    [[ -n $dry_run ]] || "${make[@]}"
fi

if [[ $host != 127.* && $host != localhost && $host != ::1 && -z ${GRACE_API_KEY-} ]]; then
    echo "warning: anyone who reaches $host:$port can use it: set GRACE_API_KEY" >&2
fi
case $engine in
    vllm)
        [[ -z ${GRACE_API_KEY-} ]] || export VLLM_API_KEY=$GRACE_API_KEY # not an argument: others see those
        serve=(vllm serve "$dir" --host "$host" --port "$port")
        ;;
    sglang)
        serve=("${PYTHON:-python}" -m sglang.launch_server --model-path "$dir" --host "$host" --port "$port")
        [[ $format != awq ]] || serve+=(--dtype float16)
        ;;
    grace)
        serve=(grace serve "$dir" --host "$host" --port "$port")
        ;;
esac
serve+=("$@")
shown "${serve[@]}"
if [[ $engine == sglang && -n ${GRACE_API_KEY-} ]]; then
    serve+=(--api-key "$GRACE_API_KEY") # after `shown`; SGLang takes it no other way
fi
echo "when it is up: curl http://$host:$port/v1/models" >&2
[[ -n $dry_run ]] || exec "${serve[@]}"
