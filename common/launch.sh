#!/usr/bin/env bash
# Environment and launcher of every recipe; `source` it, then `launch path/to/train.py [flags]`.
#   MODEL DATA OUTPUT             what to train, on what, where to (become --model_name_or_path --data_path --output_dir)
#   NPROC DEVICES                 processes on this machine (default: one per device, 2 on CPU); device ids, e.g. DEVICES=0,2
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   several machines: run the same command on each with its NODE_RANK
#   HOSTFILE                      several machines through the deepspeed launcher (ssh), run on one of them
#   DANPU_NO_VENV=1 DANPU_VERBOSE=1            never make a .venv; show every rank and every library message
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() { echo "launch: $1" >&2; exit "${2:-1}"; }

# Print what python $1 lacks of requirements file $2, one per line; nothing when it has all.
missing() {
    "$1" - "$2" <<'PY'
import pathlib, platform, re, sys
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(print("python 3.10-3.12 (this is %s)" % platform.python_version()))
import importlib.metadata as md
def check(path):
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            check(path.parent / line[3:].strip())
        spec, _, marker = line.partition(";")
        found = re.match(r"([\w.-]+)==(\S+)", spec)
        if not found or (marker and not eval(marker, {"python_version": "%d.%d" % sys.version_info[:2]})):
            continue
        try:
            have = md.version(found[1]).split("+")[0]
        except md.PackageNotFoundError:
            have = "not installed"
        if have != found[2]:
            print(f"{found[1]}=={found[2]} ({have})")
check(pathlib.Path(sys.argv[1]))
PY
}

# Set $python: the active one when it has the requirements ($1), else $root/.venv, made or completed here once.
choose_python() {
    local requirements=$1 active lacks="" candidate base=""
    active=$(command -v python || command -v python3 || true)
    if [[ -n $active ]]; then
        if [[ ! -f $requirements ]]; then python=$active; return; fi # a recipe and common/ copied without the list
        lacks=$(missing "$active" "$requirements")
        if [[ -z $lacks ]]; then python=$active; return; fi
    fi
    if [[ ${DANPU_NO_VENV:-0} == 1 ]]; then
        die "DANPU_NO_VENV=1, and ${active:-no python} lacks $(paste -sd, - <<<"$lacks"). Run: pip install -r $requirements"
    fi
    python=$root/.venv/bin/python
    exec 9>"$root/.venv.lock"
    flock 9 2>/dev/null || true # a second start waits for the first instead of installing into the same folder
    if [[ ! -x $python ]]; then
        for candidate in python3.11 python3.12 python3.10 python3 python; do
            if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then base=$candidate; break; fi
        done
        [[ -n $base ]] || die "needs Python 3.10, 3.11 or 3.12; none is on PATH"
        echo "launch: the active Python lacks $(wc -l <<<"$lacks") requirements; making $root/.venv with $("$base" --version), once"
        "$base" -m venv "$root/.venv" || die "python -m venv failed; on Debian/Ubuntu: apt install python3-venv"
    fi
    if [[ -n $(missing "$python" "$requirements") ]]; then
        echo "launch: installing $(basename "$requirements") into .venv; the first time takes some minutes"
        "$python" -m pip install --disable-pip-version-check -r "$requirements" || die "pip install failed; the same command again continues"
    fi
    exec 9>&-
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

# An Ascend driver is here: its cards, or its tool where the cards were not passed into the container.
npu_machine() {
    [[ ${DANPU_DEVICE:-npu} == npu ]] && { compgen -G "/dev/davinci[0-9]*" || command -v npu-smi; } >/dev/null
}

# HCCL and the NPU runtime; what the user has set stays.
npu_settings() {
    # seconds to wait for the other ranks when a communicator is made: the default of 120 is shorter than rank 0's
    # tokenising, and a rank that gives up takes all down with EI0006 (120 to 7200)
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1800}
    # seconds to wait inside a collective: rank 0 saves or evaluates alone meanwhile; matches --ddp_timeout 7200
    export HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-7200}
    # every host of the run is trusted: else each machine needs a file that lists the others
    export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
    # the driver's log: errors only, and not on the terminal
    export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3} ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
}

# Make only the devices in DEVICES visible. Ascend's driver stops reading at the first id that does not ascend.
choose_devices() {
    [[ $DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]] || die "DEVICES=$DEVICES is not a list like 0,2" 2
    CUDA_VISIBLE_DEVICES=$DEVICES
    ASCEND_RT_VISIBLE_DEVICES=$(tr , '\n' <<<"$DEVICES" | sort -nu | paste -sd, -)
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
    local requirements=requirements.txt
    source_cann
    if npu_machine && [[ -f $root/requirements-npu.txt ]]; then requirements="requirements-npu.txt"; fi
    choose_python "$root/$requirements"
    PATH=$(cd "$(dirname "$python")" && pwd):$PATH # ninja, which DeepSpeed looks for
    export PATH
    quiet_libraries
    if [[ -n ${DEVICES:-} ]]; then choose_devices; fi
    flags=()
    [[ -n ${MODEL:-} ]] && flags+=(--model_name_or_path "$MODEL")
    [[ -n ${DATA:-} ]] && flags+=(--data_path "$DATA")
    [[ -n ${OUTPUT:-} ]] && flags+=(--output_dir "$OUTPUT")
    [[ ${NPROC:-1} =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC is not a positive number" 2
    if npu_machine; then npu_settings; fi
    export DANPU_RERUN="${DANPU_RERUN:-bash $0}"
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
        [[ -r $HOSTFILE ]] || die "HOSTFILE=$HOSTFILE cannot be read" 2
        [[ ${script[0]} != --accelerate ]] || die "HOSTFILE starts the deepspeed launcher, not accelerate: use train_zero3.sh" 2
        exec "$python" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" "${script[@]}" "${flags[@]}" "$@"
    fi
    exec "$python" "$root/common/launch.py" "${NPROC:-auto}" "${script[@]}" "${flags[@]}" "$@"
}
