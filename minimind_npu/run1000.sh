#!/usr/bin/env bash
# Depth 32 on one node of 8 cards; else as speedrun.sh.
#   PRETRAIN=texts/ MID=mid.yaml SFT=sft.yaml RL=gsm8k_train.jsonl WANDB_RUN=d32 bash minimind_npu/run1000.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/road/drive.sh"
DEPTH=${DEPTH:-32} VOCAB=${VOCAB:-32768} OUTPUT=${OUTPUT:-$(dirname "$here")/output/road32}
[[ -n ${PRETRAIN:-} ]] || die "PRETRAIN: the texts to learn from; the built-in ones are far too few for depth $DEPTH" 2
drive "$@"
