# shellcheck shell=bash
# shellcheck disable=SC2154  # python: common/launch.sh sets it
# The road from texts to a model that answers, stage by stage. Source it, set what is to be another default, `drive "$@"`:
#   DEPTH OUTPUT                        what --depth says; where to (default: output/road)
#   PRETRAIN MID SFT RL                 texts, conversations or mixtures (road/mixture.py), questions; unset: built-in data
#   STAGES                              default: tokenizer rows pretrain mid sft rl report
#   NAME MAKER                          what the model is called and who made it: rows that say so (samples/make_identity.py)
#   VOCAB                               tokens of the tokenizer
#   BASE_FLAGS MID_FLAGS SFT_FLAGS RL_FLAGS    of the stages; flags behind the script go to pretrain, mid and sft
#   CORE EVAL                           flags of evaluation/core.py and evaluation/chat_eval.py, which measure each stage
#   DOLLARS_PER_HOUR WANDB_RUN          for the report card; name of the run at wandb (unset or dummy: not told there)
# The same command again goes on where it stopped: finished stages and answers stay. A stage is its folder in OUTPUT.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034  # read there
knobs="DEPTH STAGES PRETRAIN MID SFT RL NAME MAKER VOCAB BASE_FLAGS MID_FLAGS SFT_FLAGS RL_FLAGS CORE EVAL DOLLARS_PER_HOUR WANDB_RUN"
source "$here/../common/launch.sh"

# train SCRIPT STAGE [flags]: into its folder; a finished stage says so and stays as it is
train() {
    local script=$1 stage=$2 tracker=()
    shift 2
    [[ -n ${WANDB_RUN:-} && $WANDB_RUN != dummy ]] && tracker=(--report_to wandb)
    (launch "$here/$script" --output_dir "$road/$stage" "${tracker[@]}" "$@")
}

# evaluate STAGE: in context, then as a chat, each device a share of the questions; answers that are there stay
evaluate() {
    local out=$road/eval/$1 core=() chat=()
    read -ra core <<<"${CORE:-}"
    read -ra chat <<<"${EVAL:-}"
    [[ -f $road/rows/identity_test.jsonl ]] && chat+=(--also "identity=$road/rows/identity_test.jsonl")
    (launch "$here/evaluation/core.py" --model "$road/$1" --output_dir "$out" "${core[@]}")
    (launch "$here/evaluation/chat_eval.py" --model "$road/$1" --output_dir "$out" \
        --held_out "$here/data/eval/held_out.txt" "${chat[@]}")
}

# run_stage NAME [flags]
run_stage() {
    local stage=$1 own=()
    shift
    case $stage in
        tokenizer)
            [[ -d $road/tokenizer ]] && { echo "$road/tokenizer is there"; return; }
            read -ra own <<<"${PRETRAIN:-}"
            [[ -e ${PRETRAIN:-} ]] && own=("$PRETRAIN")
            "$python" "$here/train_tokenizer.py" --output_dir "$road/tokenizer" ${VOCAB:+--vocab_size "$VOCAB"} \
                ${PRETRAIN:+--data_path "${own[@]}"} ;;
        rows)
            [[ -n ${NAME:-} && -z ${MAKER:-} ]] && echo "note: NAME=$NAME is used together with MAKER only"
            [[ -n ${MAKER:-} && -f $road/rows/sft.yaml ]] && ! grep -qsF -- "${NAME:-}" "$road/rows/identity_test.jsonl" &&
                echo "note: $road/rows was made without NAME=${NAME:-}; take it away to have rows with it"
            [[ -f $road/rows/sft.yaml ]] && { echo "$road/rows is there"; return; }
            # NAME alone is a machine's name in some shells
            "$python" "$here/samples/road_rows.py" "$road/rows" ${PRETRAIN:+--texts "$PRETRAIN"} \
                ${MAKER:+--name "${NAME:-}" --maker "$MAKER"} ;;
        pretrain)
            read -ra own <<<"${BASE_FLAGS:-}"
            train train.py pretrain --depth "$DEPTH" --tokenizer "$road/tokenizer" ${PRETRAIN:+--data_path "$PRETRAIN"} "${own[@]}" "$@" ;;
        mid)
            read -ra own <<<"${MID_FLAGS:-}"
            train train.py mid --stage mid --from_weight "$road/pretrain" --data_path "${MID:-$road/rows/mid.yaml}" "${own[@]}" "$@" ;;
        sft)
            read -ra own <<<"${SFT_FLAGS:-}"
            train train.py sft --stage sft --from_weight "$road/mid" --data_path "${SFT:-$road/rows/sft.yaml}" "${own[@]}" "$@" ;;
        rl)
            read -ra own <<<"${RL_FLAGS:-}"
            train train_rl.py rl --from_weight "$road/sft" ${RL:+--data_path "$RL"} "${own[@]}" ;;
        report) "$python" "$here/road/report.py" generate --output_dir "$road" ;;
        *) die "STAGES: unknown stage $stage" 2 ;;
    esac
}

# drive [flags]: all stages, each measured when it has ended
drive() {
    local stage
    road=${OUTPUT:-$(dirname "$here")/output/road}
    unset OUTPUT DATA MODEL
    prepare
    : "${python:?}"
    if [[ -n ${WANDB_RUN:-} && $WANDB_RUN != dummy ]]; then
        "$python" -c 'import wandb' 2>/dev/null || die "WANDB_RUN=$WANDB_RUN: $python -m pip install wandb"
    fi
    mkdir -p "$road"
    [[ -f $road/road.json ]] || "$python" "$here/road/report.py" reset --output_dir "$road" \
        ${DOLLARS_PER_HOUR:+--dollars_per_hour "$DOLLARS_PER_HOUR"}
    for stage in ${STAGES:-tokenizer rows pretrain mid sft rl report}; do
        echo "== $stage"
        run_stage "$stage" "$@"
        case $stage in pretrain | mid | sft | rl) evaluate "$stage" ;; esac
    done
}
