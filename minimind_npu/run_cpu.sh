#!/usr/bin/env bash
# The whole road on a CPU: tokenizer, pretrain, mid, sft, rl, evaluations, report card; depth 4 on the built-in data.
#   bash minimind_npu/run_cpu.sh                               # 9 minutes on two cores
#   OUTPUT=output/mine DEPTH=6 bash minimind_npu/run_cpu.sh
#   STAGES="rl report" bash minimind_npu/run_cpu.sh            # goes on from what is there
# Variables: road/drive.sh. A laptop has no time for the tokens that --depth asks for, so lengths and rates are typed here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/road/drive.sh"
DEPTH=${DEPTH:-4} NPROC=${NPROC:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
small="--torch_compile true --model_max_length 256 --per_device_train_batch_size 4 --optimizer muon --muon_lr 0.01 --learning_rate 3e-3 --num_train_epochs 1"
BASE_FLAGS=${BASE_FLAGS-$small} MID_FLAGS=${MID_FLAGS-$small} SFT_FLAGS=${SFT_FLAGS-$small}
RL_FLAGS=${RL_FLAGS-"--max_steps 8 --prompts_per_step 16 --group_size 16 --temperature 1.5 --learning_rate 3e-4 --model_max_length 128 --max_new_tokens 48"}
CORE=${CORE-"--num_rows 40"} EVAL=${EVAL-"--num_rows 40 --max_new_tokens 64"}
drive "$@"
