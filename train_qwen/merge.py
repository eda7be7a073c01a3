"""Merge a LoRA adapter into its base model, after checking that it was trained on that base.

python train_qwen/merge.py --adapter output/train_qwen/final --output_dir output/train_qwen/merged
--base MODEL    where the base model is now; default: where the adapter says it is
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for common/
from common import cli
from common.convert import adapter


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--adapter", required=True, help="folder with adapter_config.json")
    parser.add_argument("--output_dir", required=True, help="where the merged model goes; empty")
    parser.add_argument("--base", default=None, help="base model; default: the adapter's own")
    args = parser.parse_args()
    print("merged model:", adapter.merge(args.adapter, args.output_dir, args.base))


if __name__ == "__main__":
    cli.run(main)
