#!/usr/bin/env bash
# Reinforcement learning on every visible device (two processes on a CPU): grpo, ppo, spo, cispo or reinforce.
#   bash minimind_npu/train_rl.sh                                  # built-in model and sums
#   DATA=gsm8k.jsonl MODEL=output/mm64/sft bash minimind_npu/train_rl.sh --rewards "exact:1 format:0.2"
#   DATA=my.jsonl bash minimind_npu/train_rl.sh --algorithm ppo --rewards "my_reward.py:1"
# Without MODEL (or --from_weight) it goes on from what run_all.sh has tuned, and trains that first where nothing is there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
tuned=$(dirname "$here")/output/$(basename "$here")
if [[ -z ${MODEL:-} && " $* " != *" --from_weight"* && " $* " != *" --model_name_or_path"* && " $* " != *" --size"* ]] &&
    ! compgen -G "$tuned/sft/final/*.safetensors" >/dev/null && [[ " $* " != *" --help "* && " $* " != *" -h "* ]]; then
    (launch "$here/train_rl.py" --size tiny --check_flags true "$@") # mistakes now, not after minutes of training
    (unset DATA OUTPUT MODEL && STAGES="tokenizer pretrain sft" bash "$here/run_all.sh")
fi
launch "$here/train_rl.py" "$@"
