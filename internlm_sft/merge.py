"""Merge a LoRA adapter into its base model, after checking that it was trained on that base.

python internlm_sft/merge.py --adapter output/lora/final --output_dir output/merged [--base MODEL]
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli  # noqa: I001  (before torch and transformers: it brings the device)

import published  # noqa: F401  (a base that is not converted yet gets the command for it)
from common.convert import adapter


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--adapter", required=True, help="folder with adapter_config.json")
    parser.add_argument(
        "--output_dir", required=True, help="where the merged model goes; must be empty"
    )
    parser.add_argument("--base", help="base model; default: the one the adapter names")
    args = parser.parse_args()
    print("merged model:", adapter.merge(args.adapter, args.output_dir, args.base))


if __name__ == "__main__":
    cli.run(main)
