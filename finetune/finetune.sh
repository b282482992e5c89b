#!/usr/bin/env bash
# Fine-tune on one machine or several: checks first, then starts one process for each device.
#
#   bash finetune/finetune.sh -m MODEL -d DATA [-o OUTPUT_DIR] [--use_lora [True|False]] [--q_lora [True|False]]
#                             [--deepspeed FILE|none] [--config FILE] [--dry_run] [any flag of finetune.py]
#
# Every variable below can be set in the environment; a flag wins over it, and the last flag given wins. With --config
# the file stands in place of DATA, USE_LORA, Q_LORA and a DeepSpeed file that is chosen by the number of processes.
# Relative paths are looked for in the current folder first, then in BASE_PATH. It runs under bash 3.2 (macOS) too.

if [ -z "${BASH_VERSION:-}" ]; then
    echo "error: finetune.sh needs bash; start it with: bash $0" >&2
    exit 2
fi
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
BASE_PATH="${BASE_PATH:-$HERE}"                                   # where relative paths are looked for too
MODEL="${MODEL:-}"                                                # folder or hub name; empty: the demo model
DATA="${DATA:-io_file/input_data/example_data.jsonl}"             # conversations
DS_CONFIG_PATH="${DS_CONFIG_PATH:-}"                              # DeepSpeed file; empty: chosen below
USE_LORA="${USE_LORA:-False}"
Q_LORA="${Q_LORA:-False}"
OUTPUT_DIR="${OUTPUT_DIR:-}"                                      # empty: a new folder under io_file/output_data
GPUS_PER_NODE="${GPUS_PER_NODE:-}"                                # processes here; empty: one for each GPU, else 1
NNODES="${NNODES:-1}"                                             # machines
NODE_RANK="${NODE_RANK:-0}"                                       # which of them this is
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"                           # the first machine
MASTER_PORT="${MASTER_PORT:-}"                                    # empty: a free one; several machines: 6001
LAUNCHER="${LAUNCHER:-torchrun}"                                  # torchrun or deepspeed
SHUTDOWN_SECONDS="${SHUTDOWN_SECONDS:-600}"                       # time to write a checkpoint after a signal

fail() {
    echo "error: $*" >&2
    exit 2
}

# A path as it is given, or under BASE_PATH where only that exists; always absolute.
locate() {
    local path="$1"
    if [[ "$path" != /* && ! -e "$path" && -e "$BASE_PATH/$path" ]]; then
        path="$BASE_PATH/$path"
    fi
    [[ "$path" == /* ]] || path="$PWD/$path"
    printf '%s' "$path"
}

# ------------------------------------------------------------------------------------------------- the command line
# Nothing newer than bash 3.2 here: macOS has no other.
one_value() {
    ((${#values[@]} == 1)) || fail "$flag: ${#values[@]} values; expected one (quote a path with spaces)"
}
one_switch() {
    ((${#values[@]})) || values=(True)
    one_value
}
is_true() { [[ "$1" =~ ^([Tt][Rr][Uu][Ee]|1|[Yy][Ee][Ss])$ ]]; }
is_false() { [[ "$1" =~ ^([Ff][Aa][Ll][Ss][Ee]|0|[Nn][Oo])$ ]]; }

DRY_RUN=""
CONFIG=""
data_given=()
chosen=() # what stands above and was given as a flag: beside --config that alone is passed on
passed=()
while (($#)); do
    flag="$1"
    shift
    values=()
    [[ "$flag" == -* ]] || fail "$flag: no flag stands before it; data are given with -d"
    if [[ "$flag" == -*=* ]]; then # --data_path=FILE and -d=FILE: finetune.py reads both
        values=("${flag#*=}")
        flag="${flag%%=*}"
    else
        while (($#)) && { [[ "$1" != -* ]] || [[ "$1" =~ ^-[0-9.] ]]; }; do
            values+=("$1")
            shift
        done
    fi
    for value in ${values[@]+"${values[@]}"}; do
        [[ -n "$value" ]] || fail "$flag: an empty value; give one, or leave the flag out"
    done
    case "${flag//-/_}" in
        _m | __model | __model_name_or_path) one_value && MODEL="${values[0]}" ;;
        _o | __output_dir) one_value && OUTPUT_DIR="${values[0]}" ;;
        __deepspeed) one_value && DS_CONFIG_PATH="${values[0]}" ;;
        _config | __config) one_value && CONFIG="${values[0]}" ;;
        _d | __data_path | __data_paths)
            ((${#values[@]})) || fail "$flag: no value; expected a file"
            data_given+=("${values[@]}")
            ;;
        __use_lora) one_switch && USE_LORA="${values[0]}" && chosen+=(--use_lora "$USE_LORA") ;;
        __q_lora) one_switch && Q_LORA="${values[0]}" && chosen+=(--q_lora "$Q_LORA") ;;
        __dry_run)
            one_switch
            DRY_RUN=1
            is_true "${values[0]}" || DRY_RUN=""
            is_true "${values[0]}" || is_false "${values[0]}" || fail "$flag ${values[0]}: expected True or False"
            ;;
        __eval_data_path | __general_data | __lora_weight_path)
            passed+=("$flag")
            for value in ${values[@]+"${values[@]}"}; do passed+=("$(locate "$value")"); done
            ;;
        *) passed+=("$flag" ${values[@]+"${values[@]}"}) ;;
    esac
done
((${#data_given[@]})) || [[ -n "$CONFIG" ]] || data_given=("$DATA")

# ------------------------------------------------------------------------------------------------------- what to run
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$(dirname -- "$HERE")/.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON="python3"
fi
for value in ${passed[@]+"${passed[@]}"}; do
    if [[ "$value" == -h || "$value" == --help || "$value" == --help_all ]]; then
        sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exec "$PYTHON" "$HERE/finetune.py" "$value"
    fi
done

count_gpus() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        [[ -z "$CUDA_VISIBLE_DEVICES" || "$CUDA_VISIBLE_DEVICES" == -1 ]] && echo 0 && return
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
    elif command -v nvidia-smi >/dev/null 2>&1; then
        { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
    else
        echo 0
    fi
}

gpus="$(count_gpus)"
: "${GPUS_PER_NODE:=$gpus}"
[[ "$GPUS_PER_NODE" =~ ^[0-9]+$ ]] || fail "GPUS_PER_NODE=$GPUS_PER_NODE: expected a number"
[[ "$NNODES" =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$NNODES: expected a number above 0"
if ! [[ "$NODE_RANK" =~ ^[0-9]+$ ]] || ((NODE_RANK >= NNODES)); then
    fail "NODE_RANK=$NODE_RANK: expected 0 to $((NNODES - 1))"
fi
if ((GPUS_PER_NODE == 0)); then
    echo "no GPU here: one process on the CPU" >&2
    GPUS_PER_NODE=1
fi
ranks=$((GPUS_PER_NODE * NNODES))

if [[ -z "$DS_CONFIG_PATH$CONFIG" ]] && ((ranks > 1)); then
    # ZeRO-3 cuts the weights up over the processes, which 4-bit weights do not allow.
    stage=3
    if is_true "$Q_LORA"; then stage=2; fi
    DS_CONFIG_PATH="$HERE/ds_config_zero$stage.json"
fi

arguments=()
if [[ -n "$MODEL" ]]; then
    # A hub name is not a path: only what exists as a folder is located.
    if [[ -e "$MODEL" || -e "$BASE_PATH/$MODEL" ]]; then MODEL="$(locate "$MODEL")"; fi
    arguments+=(-m "$MODEL")
fi
for value in ${data_given[@]+"${data_given[@]}"}; do arguments+=(-d "$(locate "$value")"); done
[[ -z "$OUTPUT_DIR" ]] || arguments+=(-o "$OUTPUT_DIR")
if [[ -n "$CONFIG" ]]; then
    arguments+=(--config "$(locate "$CONFIG")" ${chosen[@]+"${chosen[@]}"})
else
    arguments+=(--use_lora "$USE_LORA" --q_lora "$Q_LORA")
fi
case "$DS_CONFIG_PATH" in
    "" | none) ;;
    zero2 | zero3) arguments+=(--deepspeed "$DS_CONFIG_PATH") ;; # the toolkit's own, by name
    *) arguments+=(--deepspeed "$(locate "$DS_CONFIG_PATH")") ;;
esac
arguments+=(${passed[@]+"${passed[@]}"})

if [[ -z "$MASTER_PORT" ]]; then
    MASTER_PORT=6001
    if ((NNODES == 1)); then
        MASTER_PORT="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    fi
fi
# Launchers are started as modules: the first line of an installed script breaks where its path has spaces.
case "$LAUNCHER" in
    torchrun)
        command=("$PYTHON" -m torch.distributed.run --nproc_per_node "$GPUS_PER_NODE" --nnodes "$NNODES"
            --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
            --shutdown_timeout "$SHUTDOWN_SECONDS" --signals_to_handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
            "$HERE/finetune.py" "${arguments[@]}")
        ;;
    deepspeed)
        ((NNODES == 1)) || fail "LAUNCHER=deepspeed is for one machine; for NNODES=$NNODES use LAUNCHER=torchrun"
        command=("$PYTHON" -m deepspeed.launcher.runner --num_gpus "$GPUS_PER_NODE" --master_port "$MASTER_PORT"
            --no_local_rank "$HERE/finetune.py" "${arguments[@]}")
        ;;
    *) fail "LAUNCHER=$LAUNCHER: expected torchrun or deepspeed" ;;
esac

if [[ -n "$DRY_RUN" ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit 0
fi

# ---------------------------------------------------------------------------------------------- check, launch, wait
# A launcher turns a rank's one clear line into a traceback and status 1, so what can be known is checked before.
export FINETUNE_RANKS="$ranks" FINETUNE_RANKS_HERE="$GPUS_PER_NODE" # what the check plans memory for
status=0
"$PYTHON" "$HERE/finetune.py" "${arguments[@]}" --check || status=$?
((status == 0)) || exit "$status"
export FINETUNE_CHECKED=1 # the run does not print again what the check has

if ((gpus == 0)); then
    cores="$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo "$GPUS_PER_NODE")"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > GPUS_PER_NODE ? cores / GPUS_PER_NODE : 1))}"
fi
if ((NNODES > 1)); then
    echo "waiting for all $NNODES machines at $MASTER_ADDR:$MASTER_PORT (this is number $NODE_RANK)" >&2
fi

# Each rank writes the status that it ends with here; the launcher's own says only that something failed.
FINETUNE_STATUS_DIR="$(mktemp -d)"
export FINETUNE_STATUS_DIR
trap 'rm -rf -- "$FINETUNE_STATUS_DIR"' EXIT
set -m # the launcher gets a process group of its own, with Ctrl-C as it should be: the traps below pass it on
"${command[@]}" &
launcher=$!
caught=""
for name in INT TERM HUP USR1; do
    # shellcheck disable=SC2064  # the name is meant to be filled in now
    trap "caught=$name; kill -s $name $launcher 2>/dev/null || true" "$name"
done
while true; do
    status=0
    wait "$launcher" || status=$?
    kill -0 "$launcher" 2>/dev/null || break # a signal ends wait, not the launcher
done
meant="$(cat -- "$FINETUNE_STATUS_DIR"/* 2>/dev/null | sort -n | tail -n 1 || true)"  # no file: all ended well
if [[ -n "$meant" ]] && ((status != 0)); then
    status="$meant"
elif [[ -n "$caught" ]] && ((status != 0)); then
    status=$((128 + $(kill -l "$caught")))
fi
exit "$status"
