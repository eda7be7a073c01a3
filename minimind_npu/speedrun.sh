#!/usr/bin/env bash
# Depth 20 on one node of 8 cards: from texts to a chat model and its report card.
#   PRETRAIN=texts/ SFT=mix.yaml RL=gsm8k_train.jsonl bash minimind_npu/speedrun.sh
#   WANDB_RUN=d20 DOLLARS_PER_HOUR=24 PRETRAIN=texts/ MID=mid.yaml SFT=sft.yaml RL=gsm8k_train.jsonl bash minimind_npu/speedrun.sh
# Variables: road/drive.sh; what to download before: README.md. The same command again goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/road/drive.sh"
DEPTH=${DEPTH:-20} VOCAB=${VOCAB:-32768}
[[ -n ${PRETRAIN:-} ]] || die "PRETRAIN: the texts to learn from; the built-in ones are far too few for depth $DEPTH" 2
drive "$@"
