#!/usr/bin/env bash
# A model that calls tools: the stages up to sft, then conversations with tools, measured before and after.
#   bash minimind_npu/train_toolcall.sh                # built-in rows; what run_all.sh has done already stays
#   TOOLS=tools.jsonl bash minimind_npu/train_toolcall.sh --learning_rate 1e-5       # of data_prepare_toolcall.py
# Variables and flags: those of run_all.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export STAGES=${STAGES:-tokenizer pretrain sft toolcall}
exec bash "$here/run_all.sh" "$@"
