#!/usr/bin/env bash
# Environment and launcher of every recipe; `source` it, then `launch path/to/train.py [flags]`.
#   MODEL DATA OUTPUT             what to train, on what, where to (become --model_name_or_path --data_path --output_dir)
#   NPROC DEVICES                 processes on this machine (default: one per device, 2 on CPU); device ids, e.g. DEVICES=0,2
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   several machines: run the same command on each with its NODE_RANK
#   HOSTFILE                      several machines through the deepspeed launcher (ssh), run on one of them
#   DANPU_CHECKSUM=size           checkpoints without sha256: faster to save, damage that keeps a file's size is not seen
#   DANPU_NO_VENV=1 DANPU_VERBOSE=1            never make a .venv; show every rank, all that libraries and pip say
# A wrapper with variables of its own names them in $knobs before it sources this file.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# One word as a shell reads it back.
quoted() {
    if [[ $1 =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then printf '%s' "$1"; else printf "'%s'" "${1//\'/\'\\\'\'}"; fi
}

# What continues this run, for people to paste: the variables that were given, this script, its flags; all but
# --overwrite_output_dir, which would begin anew. $@ are the words after the script's name.
own_command() {
    local name word skip=0 command=
    for name in MODEL DATA OUTPUT NPROC DEVICES NNODES NODE_RANK MASTER_ADDR MASTER_PORT HOSTFILE ${knobs:-} \
        CUDA_VISIBLE_DEVICES ASCEND_RT_VISIBLE_DEVICES DANPU_DEVICE DANPU_CACHE DANPU_KEY DANPU_CHECKSUM DANPU_NO_VENV DANPU_VERBOSE; do
        if [[ -n ${!name:-} ]]; then command+="$name=$(quoted "${!name}") "; fi
    done
    command+="bash $(quoted "$0")"
    for word in "$@"; do
        case $skip$word in
            [01]--overwrite[_-]output[_-]dir) skip=1; continue ;;
            [01]--overwrite[_-]output[_-]dir=*) skip=0; continue ;;
            1--*) ;;
            1*) skip=0; continue ;;
        esac
        skip=0
        command+=" $(quoted "$word")"
    done
    printf '%s' "$command"
}
rerun=$(own_command "$@") # now: the wrapper has not set anything yet

die() { echo "launch: $1" >&2; exit "${2:-1}"; }

# Files and pipes are UTF-8 whatever the locale; a terminal keeps its encoding and gets ? for what it cannot show.
use_utf8() {
    local charmap
    charmap=$(locale charmap 2>/dev/null) || charmap=
    if [[ $charmap == GB* || $charmap == BIG5* ]]; then
        export PYTHONIOENCODING=${PYTHONIOENCODING:-$charmap:replace}
    fi
    export PYTHONUTF8=${PYTHONUTF8:-1}
}

# Set $python: the active one when it has the requirements ($1: a file, or a folder with the file for this machine),
# else $root/.venv, made or completed here once. $1 = --look: make and install nothing.
choose_python() {
    local candidate
    use_utf8
    for candidate in python python3 python3.11 python3.12 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
            python=$("$candidate" "$root/common/runs/environment.py" "$1") || exit
            return
        fi
    done
    die "needs Python 3.10, 3.11 or 3.12; none is on PATH"
}

# Ascend: take CANN's environment from its usual places unless it is already set.
source_cann() {
    local file options=$-
    [[ -z ${ASCEND_HOME_PATH:-} && ${DANPU_DEVICE:-npu} == npu ]] || return 0
    for file in /usr/local/Ascend/{cann,ascend-toolkit}/set_env.sh ~/Ascend/{cann,ascend-toolkit}/set_env.sh; do
        [[ -r $file ]] || continue
        set +eu # Ascend's script reads unset variables and ends with commands that may fail
        # shellcheck disable=SC1090
        source "$file"
        if [[ $options == *e* ]]; then set -e; fi
        if [[ $options == *u* ]]; then set -u; fi
        return 0
    done
}

# Ask Python about this machine: the chosen one, or the active one before there is a choice.
machine() { "${python:-python}" "$root/common/runs/machine.py" "$@"; }

# HCCL and the NPU runtime; what the user has set stays.
npu_settings() {
    # seconds to wait for the other ranks when a communicator is made: the default of 120 is shorter than rank 0's
    # tokenising, and a rank that gives up takes all down with EI0006 (120 to 7200)
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1800}
    # every host of the run is trusted: else each machine needs a file that lists the others
    export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
    # the driver's log: errors only, and not on the terminal
    export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3} ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
}

# Make only the devices in DEVICES visible.
choose_devices() {
    [[ $DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]] || die "DEVICES=$DEVICES is not a list like 0,2" 2
    CUDA_VISIBLE_DEVICES=$DEVICES
    ASCEND_RT_VISIBLE_DEVICES=$(machine ascending "$DEVICES")
    export CUDA_VISIBLE_DEVICES ASCEND_RT_VISIBLE_DEVICES
}

quiet_libraries() {
    export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1
    if [[ ${DANPU_VERBOSE:-0} != 1 ]]; then
        export TRANSFORMERS_VERBOSITY=error DATASETS_VERBOSITY=error PYTHONWARNINGS=ignore TORCH_CPP_LOG_LEVEL=ERROR GLOG_minloglevel=2
        export TRANSFORMERS_NO_ADVISORY_WARNINGS=1 HF_HUB_DISABLE_PROGRESS_BARS=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    fi
}

# Everything before the start: set $python, the environment and ${flags[@]}, what the variables above say as flags.
prepare() {
    source_cann
    choose_python "$root"
    PATH=$(cd "$(dirname "$python")" && pwd):$PATH # ninja, which DeepSpeed looks for
    export PATH
    quiet_libraries
    if [[ -n ${DEVICES:-} ]]; then choose_devices; fi
    flags=()
    [[ -n ${MODEL:-} ]] && flags+=(--model_name_or_path "$MODEL")
    [[ -n ${DATA:-} ]] && flags+=(--data_path "$DATA")
    [[ -n ${OUTPUT:-} ]] && flags+=(--output_dir "$OUTPUT")
    [[ ${NPROC:-1} =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC is not a positive number" 2
    if machine ascend; then
        npu_settings
    else # packed rows have another length each step: blocks of memory that grow instead of new ones beside them
        export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
    fi
    export DANPU_RERUN="${DANPU_RERUN:-$rerun}"
}

# HOSTFILE: what deepspeed's launcher lacks. It starts the other machines through pdsh, and hands them few variables;
# names of tokens and keys stay out, since the command line of a process can be read by everybody there.
prepare_hosts() {
    [[ -r $HOSTFILE ]] || die "HOSTFILE=$HOSTFILE cannot be read" 2
    if (($(grep -cE '^[^#[:space:]]' "$HOSTFILE") > 1)) && ! command -v pdsh >/dev/null; then
        die "HOSTFILE starts the other machines through pdsh, which is not here: apt-get install pdsh, or run this command on each machine with NNODES, NODE_RANK and MASTER_ADDR"
    fi
    local name own=${DS_ENV_FILE:-.deepspeed_env} file
    file=$(mktemp "${TMPDIR:-/tmp}/danpu-environment-XXXXXX") || die "no file can be made in ${TMPDIR:-/tmp}"
    for name in $(compgen -e | grep -E '^(DANPU|HF|HCCL|ASCEND|NCCL|GLOO|PYTORCH|TOKENIZERS|TRANSFORMERS|DATASETS|MODELSCOPE)_' |
        grep -vE '_.*(TOKEN|KEY|SECRET)|^DANPU_RERUN$') ${DANPU_KEY:+DANPU_KEY}; do # that one names a file
        printf '%s=%s\n' "$name" "${!name//$'\n'/ }"
    done | sed 's/["$`\\]/\\&/g' >"$file" # it puts values between double quotes
    for name in ~/"$own" "$own"; do # deepspeed's own file, which comes last and so counts
        if [[ -f $name ]]; then grep '=' "$name" >>"$file" || true; fi
    done
    export DS_ENV_FILE=$file
}

# launch [--accelerate YAML] path/to/train.py [flags]
launch() {
    local script=("$1")
    if [[ $1 == --accelerate ]]; then
        script=("$1" "$2" "$3")
        shift 2
    fi
    shift
    prepare
    if [[ -n ${HOSTFILE:-} ]]; then
        prepare_hosts
        [[ ${script[0]} != --accelerate ]] || die "HOSTFILE starts the deepspeed launcher, not accelerate: use train_zero3.sh" 2
        exec "$python" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" "${script[@]}" "${flags[@]}" "$@"
    fi
    exec "$python" "$root/common/launch.py" "${NPROC:-auto}" "${script[@]}" "${flags[@]}" "$@"
}
