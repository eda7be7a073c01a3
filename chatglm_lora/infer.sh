#!/usr/bin/env bash
# Batch inference, a whole model on every visible device; the rows are spread over them.
#   MODEL=output/chatglm_lora DATA=questions.jsonl OUTPUT=answers.jsonl bash chatglm_lora/infer.sh --max_new_tokens 256
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/infer.py" "$@"
