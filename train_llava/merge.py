"""Adapter and projector of a run -> a whole LLaVA that plain transformers and vLLM open, after
checking that they were trained on that base.

python train_llava/merge.py --adapter output/train_llava/final --output_dir my_llava
--base MODEL    where the base model is now; default: where the adapter says it is
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from model import check_model, load_processor, open_model

from common import cli
from common.convert import adapter
from common.convert.older_readers import for_older_readers
from common.data.files import new_folder
from common.runs.generate import remember_ends


def merge(folder: str | Path, out: str | Path, base: str | None = None) -> Path:
    """Write base + adapter + projector as an ordinary LLaVA folder `out`, in the base's dtype, with
    the adapter's processor. SystemExit for what does not belong together."""
    base = adapter.check_base(folder, base)
    check_model(base, "--base")
    with new_folder(out) as part:
        model = open_model(base, "--base", dtype="auto")
        model = adapter.merge_into(adapter.put_on(model, folder))
        processor = load_processor(str(folder), "--adapter")
        remember_ends(model, processor.tokenizer)
        model.save_pretrained(part)
        processor.save_pretrained(part)
        for_older_readers(part)
    return Path(out)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--adapter", required=True, help="folder with adapter_config.json")
    parser.add_argument("--output_dir", required=True, help="where the merged model goes; empty")
    parser.add_argument("--base", default=None, help="base model; default: the adapter's own")
    args = parser.parse_args()
    print("merged model:", merge(args.adapter, args.output_dir, args.base))


if __name__ == "__main__":
    cli.run(main)
