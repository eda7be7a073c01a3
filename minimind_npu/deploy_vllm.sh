#!/usr/bin/env bash
# A trained model behind vLLM, on NVIDIA cards or (vllm-ascend) Ascend cards.
#   bash minimind_npu/deploy_vllm.sh serve                           # export the newest run, start the container, ask it
#   bash minimind_npu/deploy_vllm.sh convert --weight sft --model-dir my_model        # the export alone
#   bash minimind_npu/deploy_vllm.sh vllm --model-dir my_model --dry-run              # the container's command, not run
#   bash minimind_npu/deploy_vllm.sh serve --weight full_sft --hidden-size 640 --num-hidden-layers 8 --use-moe
#                                                                    # MiniMind's own out/full_sft_640_moe.pth
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"

what=${1:-}
case $what in
    convert | vllm | serve) shift ;;
    -h | --help) sed -n '2,7s/^# \?//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) die "the first word is convert, vllm or serve (--help shows examples)" 2 ;;
esac

root=$(cd "$here/.." && pwd)
recipe=$(basename "$here")
weight='' hidden='' layers='' moe=0 dry=0
model_dir='' name='' port=8000 length=4096 image=''
device=${DANPU_DEVICE:-}
while (($#)); do
    flag=$1
    case $flag in
        --use-moe) moe=1 && shift && continue ;;
        --dry-run) dry=1 && shift && continue ;;
    esac
    (($# > 1)) || die "$flag needs a value" 2
    case $flag in
        --weight) weight=$2 ;;
        --hidden-size) hidden=$2 ;;
        --num-hidden-layers) layers=$2 ;;
        --model-dir) model_dir=$2 ;;
        --name) name=$2 ;;
        --vllm-port) port=$2 ;;
        --vllm-image) image=$2 ;;
        --max-model-len) length=$2 ;;
        --device) device=$2 ;;
        *) die "unknown flag $flag" 2 ;;
    esac
    shift 2
done
for number in "$hidden" "$layers" "$port" "$length"; do
    [[ $number =~ ^[0-9]*$ ]] || die "$number is no number" 2
done
[[ $name =~ ^[A-Za-z0-9_.-]*$ ]] || die "--name $name: letters, digits and _.- only" 2
model_dir=${model_dir:-$root/output/$recipe/vllm}
name=${name:-$recipe}

# Runs a command; with --dry-run it is only shown, as it could be pasted.
act() {
    if ((dry)); then
        printf '%q ' "$@" && printf '\n'
    else
        "$@"
    fi
}

# The stage whose finished run that answers is the newest.
newest_stage() {
    local stage found='' runs=$root/output/$recipe
    for stage in sft dpo reason distill; do
        if [[ "$runs/$stage/final/config.json" -nt "$runs/$found/final/config.json" ]]; then found=$stage; fi
    done
    echo "${found:-sft}"
}

convert() {
    choose_python "$root/requirements.txt"
    if [[ -f $model_dir/config.json ]] && ((!dry)); then
        echo "deploy: $model_dir is there and taken as it is; remove it to export again"
        check_sizes
        return
    fi
    local run file
    weight=${weight:-$(newest_stage)}
    run=$root/output/$recipe/$weight
    file=$root/out/${weight}_${hidden:-512}
    if ((moe)); then file+=_moe; fi
    local export=("$python" "$here/export.py" --output_dir "$model_dir")
    if [[ -d $run ]] || ((dry)); then
        act "${export[@]}" --model "$run"
    elif [[ -f $file.pth ]]; then # MiniMind's own weights
        act "$python" "$here/export.py" --import --model "$file.pth" --output_dir "$model_dir.imported"
        act "${export[@]}" --model "$model_dir.imported"
    else
        die "neither $run nor $file.pth is there: train one (bash $here/run_all.sh)" 1
    fi
    if ((!dry)); then check_sizes; fi
}

# What was typed must be what the exported model is: a container that serves another one would say nothing.
check_sizes() {
    "$python" - "$model_dir/config.json" "$hidden" "$layers" "$moe" <<'PYTHON' || exit 1
import json, sys

path, hidden, layers, moe = sys.argv[1:]
config = json.load(open(path, encoding="utf-8"))
found = {"--hidden-size": str(config["hidden_size"]), "--num-hidden-layers": str(config["num_hidden_layers"])}
for flag, typed in (("--hidden-size", hidden), ("--num-hidden-layers", layers)):
    if typed and typed != found[flag]:
        sys.exit(f"{flag} is {typed}, but the model has {found[flag]}")
if moe == "1" and not config.get("num_experts"):
    sys.exit("--use-moe is given, but the model has no experts")
PYTHON
}

vllm() {
    if ((!dry)); then
        [[ -f $model_dir/config.json ]] || die "$model_dir holds no exported model: bash $here/deploy_vllm.sh convert" 1
        command -v docker >/dev/null || die "docker is not installed; without it: vllm serve $model_dir --host 127.0.0.1" 1
    fi
    if [[ -z $device ]]; then
        device=cuda
        if compgen -G '/dev/davinci[0-9]*' >/dev/null; then device=npu; fi
    fi
    # only this machine can ask it: the port is bound to 127.0.0.1
    local run serve
    run=(docker run --rm --name "$name-vllm" --shm-size 16g -p "127.0.0.1:$port:8000" -v "$model_dir:/model:ro")
    if ((!dry)) && [[ $what == serve ]]; then run+=(--detach); fi
    serve=(/model --served-model-name "$name" --max-model-len "$length" --port 8000)
    case $device in
        cuda) act "${run[@]}" --gpus all "${image:-vllm/vllm-openai:v0.13.0}" --model "${serve[@]}" ;;
        npu)
            local card
            for card in /dev/davinci[0-9]*; do run+=(--device "$card"); done
            for card in davinci_manager devmm_svm hisi_hdc; do run+=(--device "/dev/$card"); done
            run+=(-v /usr/local/dcmi:/usr/local/dcmi:ro -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro)
            run+=(-v /usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64:ro)
            run+=(-v /usr/local/Ascend/driver/version.info:/usr/local/Ascend/driver/version.info:ro)
            run+=(-v /etc/ascend_install.info:/etc/ascend_install.info:ro)
            act "${run[@]}" "${image:-quay.io/ascend/vllm-ascend:v0.13.0}" vllm serve "${serve[@]}" ;;
        *) die "--device $device: cuda or npu" 2 ;;
    esac
}

# Waits until the container answers, and asks it once.
ask() {
    local url=http://127.0.0.1:$port second
    local body="{\"model\": \"$name\", \"max_tokens\": 32, \"messages\": [{\"role\": \"user\", \"content\": \"你好\"}]}"
    if ((dry)); then
        act curl --silent --fail --data "$body" --header "content-type: application/json" "$url/v1/chat/completions"
        return
    fi
    for ((second = 0; second < 150; second++)); do
        if curl --silent --fail "$url/health" >/dev/null; then break; fi
        docker inspect "$name-vllm" >/dev/null 2>&1 || die "the container has ended: docker logs shows why (leave --rm out)" 1
        sleep 1
    done
    curl --silent --fail --data "$body" --header "content-type: application/json" "$url/v1/chat/completions" ||
        die "no answer after 150 s: docker logs $name-vllm" 1
    echo
    echo "serving $name: $url/v1   (docker stop $name-vllm ends it)"
}

case $what in
    convert) convert ;;
    vllm) vllm ;;
    serve) convert && vllm && ask ;;
esac
