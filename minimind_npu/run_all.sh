#!/usr/bin/env bash
# From nothing to a model that answers: tokenizer, pre-training, the stages after it, evaluation, a chat, a table.
#   bash minimind_npu/run_all.sh                       # built-in data and a tiny model: some minutes on 2 CPU cores
#   SIZE=64m PRETRAIN=pretrain.jsonl SFT=sft.jsonl DPO=dpo.jsonl REASON=r1.jsonl bash minimind_npu/run_all.sh
#   STAGES="sft dpo eval" bash minimind_npu/run_all.sh
# The same command again goes on where it stopped. Flags go to every training stage, those in EVAL to eval.py, those in
# EVAL_TOOLS to eval_toolcall.py.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034  # read there
knobs="SIZE STAGES PRETRAIN SFT LORA DPO REASON TOOLS EVAL EVAL_TOOLS"
source "$here/../common/launch.sh"
SIZE=${SIZE:-tiny} STAGES=${STAGES:-tokenizer pretrain sft lora dpo reason eval chat}
OUTPUT=${OUTPUT:-$(dirname "$here")/output/$(basename "$here")}
root_out=$OUTPUT
unset OUTPUT DATA MODEL
prepare
: "${python:?}"
read -ra eval_flags <<<"${EVAL:-}"
read -ra tool_flags <<<"${EVAL_TOOLS:-}"

# train STAGE FROM DATA [flags]: one stage into its folder; a finished one says so and stays as it is
train() {
    local stage=$1 from=$2 rows=$3
    shift 3
    (launch "$here/train.py" --stage "$stage" --from_weight "$from" --output_dir "$root_out/$stage" \
        ${rows:+--data_path "$rows"} "$@")
}

# use_tools STAGE WHEN: how the model of a stage uses tools
use_tools() {
    "$python" "$here/eval_toolcall.py" --model_name_or_path "$root_out/$1/final" \
        --output_dir "$root_out/eval_toolcall/$2" "${tool_flags[@]}"
}

for stage in $STAGES; do
    echo "== $stage"
    tokenizer=$here/tokenizer
    [[ -d $root_out/tokenizer ]] && tokenizer=$root_out/tokenizer
    case $stage in
        tokenizer)
            [[ -d $root_out/tokenizer ]] && { echo "$root_out/tokenizer is there"; continue; }
            "$python" "$here/train_tokenizer.py" --output_dir "$root_out/tokenizer" ${PRETRAIN:+--data_path "$PRETRAIN"} ;;
        pretrain) train pretrain "$SIZE" "${PRETRAIN:-}" --tokenizer "$tokenizer" "$@" ;;
        sft) train sft "$root_out/pretrain/final" "${SFT:-}" "$@" ;;
        lora) train lora "$root_out/sft/final" "${LORA:-}" "$@" ;;
        dpo) train dpo "$root_out/sft/final" "${DPO:-}" "$@" ;;
        distill) train distill "$SIZE" "${SFT:-}" --teacher "$root_out/sft/final" "$@" ;;
        reason) train reason "$root_out/dpo/final" "${REASON:-}" "$@" ;;
        toolcall)
            rows=${TOOLS:-$root_out/tools.jsonl}
            if [[ -z ${TOOLS:-} && ! -f $rows ]]; then # with conversations between them, so that it goes on talking
                "$python" "$here/samples/tool_rows.py" "$root_out/tool_rows.jsonl"
                "$python" "$here/data_prepare_toolcall.py" --data_path "$root_out/tool_rows.jsonl" \
                    --mix "${SFT:-$here/data/sft}" --mix_ratio 0.5 --output "$rows"
            fi
            toy=() # its usual window of 256 tokens is too small for the definitions of tools; there are many rows
            [[ $SIZE == tiny* ]] && toy=(--model_max_length 512 --num_train_epochs 1)
            use_tools sft before
            train sft "$root_out/sft/final" "$rows" --output_dir "$root_out/toolcall" "${toy[@]}" "$@"
            use_tools toolcall after ;;
        eval) "$python" "$here/evaluation/eval.py" --model_name_or_path "$root_out/sft/final" \
            --output_dir "$root_out/eval" "${eval_flags[@]}" ;;
        chat) printf '%s\n' 你是谁？ 三加五等于几？ /exit | "$python" "$here/chat.py" --max_new_tokens 64 \
            --model_name_or_path "$root_out/sft/final" ;;
        *) die "STAGES: unknown stage $stage" 2 ;;
    esac
done
"$python" "$here/summary.py" "$root_out"
