"""Retrieval and zero-shot classification of a text-image model, beside the published numbers.

    python chinese_clip_ddp/eval.py                        # both, of the held-out sample pictures
    python chinese_clip_ddp/eval.py --model MODEL --data_path MUGE/valid_imgs.tsv
    python chinese_clip_ddp/eval.py --model MODEL --data_path coco-cn_test.txt --image_root val2014/
    python chinese_clip_ddp/eval.py --model MODEL --data_path cifar-100/        # with label_cn.txt

Retrieval takes whatever training takes, Chinese-CLIP's files (MUGE, Flickr30k-CN, COCO-CN) among
it, and the captions of COCO-CN and Flickr8k-CN as published ("picture#zhc#0<TAB>caption").
Classification takes ELEVATER's folders (test/000/... and label_cn.txt), any folder of classes, and
pairs beside a labels_cn.txt: the class of a picture is then the name that stands in its caption.
"""

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli  # noqa: I001  (device before torch)

import torch

import index
import model
import retrieval
from batches import check_captions
from common.data.pictures import SUFFIXES, Place
from rows import describe, load_pairs, lost_texts

from common.data import files
from common.data.progress import Progress
from common.runs import flags

DEFAULT = HERE.parent / "output" / HERE.name
LABELS = ("label_cn.txt", "labels_cn.txt")  # of ELEVATER in Chinese, one class a line
TEMPLATES = "templates_cn.txt"  # for these classes, one a line
CAPTION_LINE = re.compile(r"(?P<picture>[^\t]+?)#(?:zh\w*#)?\d+\t(?P<text>.+)")
# R@1/5/10 from text to picture, and back where published, in percent. Source: Chinese-CLIP's
# Results.md (Yang et al. 2022)
RETRIEVAL = {
    "muge": [
        ("CN-CLIP B/16", "zero-shot", (52.1, 76.7, 84.4), None),
        ("CN-CLIP L/14", "zero-shot", (56.3, 79.8, 86.2), None),
        ("CN-CLIP L/14-336", "zero-shot", (59.0, 81.4, 87.8), None),
        ("CN-CLIP H/14", "zero-shot", (63.0, 84.1, 89.2), None),
        ("CN-CLIP B/16", "fine-tuned", (58.4, 83.6, 90.0), None),
        ("CN-CLIP H/14", "fine-tuned", (68.9, 88.7, 93.1), None),
    ],
    "flickr30k-cn": [
        ("CN-CLIP B/16", "zero-shot", (62.7, 86.9, 92.8), (74.6, 93.5, 97.1)),
        ("CN-CLIP H/14", "zero-shot", (71.2, 91.4, 95.5), None),
        ("CN-CLIP B/16", "fine-tuned", (79.1, 94.8, 97.4), (93.5, 99.0, 99.5)),
    ],
    "coco-cn": [
        ("CN-CLIP B/16", "zero-shot", (62.2, 86.6, 94.9), (57.0, 84.1, 93.6)),
        ("CN-CLIP H/14", "zero-shot", (69.2, 89.9, 96.1), None),
        ("CN-CLIP B/16", "fine-tuned", (77.0, 97.1, 99.0), None),
    ],
}
CLASSIFICATION = {"cifar-10": 92.0, "cifar-100": 64.4, "mnist": 67.6, "imagenet": 48.3}  # B/16
# what a name may have behind that of its benchmark
OF_A_SPLIT = r"([-_.](cn|zh|test|valid|val|train|imgs|texts|retrieval|\d+k|tsv|jsonl|txt|csv))*"
NAMES = {  # as they stand in paths
    "muge": r"muge",
    "flickr30k-cn": r"flickr[-_]?30k",
    "coco-cn": r"coco[-_]?cn",
    "cifar-100": r"cifar[-_]?100",
    "cifar-10": r"cifar[-_]?10",
    "mnist": r"mnist",
    "imagenet": r"imagenet",
}


# ---- what is asked -------------------------------------------------------------------------------


@dataclass
class Questions:
    """Texts and pictures that stand once each, and which belong together.

    lost: texts none of whose pictures is there; they stay questions, and are misses.
    """

    texts: list[str]
    places: list[Place]
    pairs: list[tuple[int, int]]
    lost: list[str] = field(default_factory=list)


def questions_of(rows, lost: list[str] = ()) -> Questions:
    """Of rows of load_pairs."""
    text_hashes, picture_hashes, pairs = retrieval.number_pairs(
        rows["text_hash"], rows["picture_hash"]
    )
    texts = dict(zip(rows["text_hash"], rows["text"], strict=True))
    places = dict(zip(rows["picture_hash"], rows["place"], strict=True))
    return Questions(
        [texts[one] for one in text_hashes],
        [Place(**places[one]) for one in picture_hashes],
        pairs,
        list(lost),
    )


def read_rows(args):
    """The pairs, only the held-out ones where files of the data are such by their names."""
    rows, stats = load_pairs(
        args.data_path, args.image_root, args.column_map or None, missing_limit=1.0
    )
    print(describe(stats))
    if args.held_out == "false":
        return rows
    if any(rows["held_out"]):
        return rows.select([i for i, held_out in enumerate(rows["held_out"]) if held_out])
    if not any(files.says_held_out(Path(name)) for name in (args.data_path, *stats["shapes"])):
        print(
            f"nothing is held out by its name (valid, test): all {len(rows):,} pairs are asked, "
            "also those that a training with them has seen"
        )
    return rows


def read_questions(args, rows) -> Questions:
    """rows: of read_rows, None for a file of captions. SystemExit with one line for data that holds
    no pair."""
    path = Path(args.data_path)
    if is_caption_file(path):
        return read_caption_lines(path, args.image_root)
    only_held_out = args.held_out == "true" and any(rows["held_out"])
    return questions_of(
        rows, lost_texts(args.data_path, rows, args.column_map or None, only_held_out)
    )


def is_caption_file(path: Path) -> bool:
    return path.suffix == ".txt" and path.is_file()


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding=files.encoding_of(path), errors="replace").splitlines()


def read_caption_lines(path: Path, image_root: str) -> Questions:
    """COCO-CN's and Flickr8k-CN's own layout: picture#zhc#0<TAB>caption."""
    texts = []
    places = []
    root = Path(image_root or path.parent)
    for number, line in enumerate(lines_of(path), 1):
        found = CAPTION_LINE.fullmatch(line.strip())
        if found is None:
            if line.strip():
                raise SystemExit(f"{path}:{number}: not of the form picture#zhc#0<TAB>caption")
            continue
        name = found["picture"]
        suffix = "" if name.lower().endswith(SUFFIXES) else ".jpg"
        texts.append(found["text"].strip())
        places.append(Place(os.path.abspath(root / (name + suffix)), root=os.path.abspath(root)))
    if not any(os.path.isfile(place.path) for place in places):
        shown = ", ".join(dict.fromkeys(place.path for place in places[:3]))
        raise SystemExit(f"all pictures are missing, e.g. {shown}; name their folder: --image_root")
    return Questions(*retrieval.number_pairs(texts, places))


@dataclass
class Classes:
    """names: of the classes; places and labels: pictures, and the number of the class of each."""

    names: list[str]
    places: list[Place]
    labels: list[int]


def label_file(folder: Path) -> Path | None:
    return next((folder / name for name in LABELS if (folder / name).is_file()), None)


def class_folders(folder: Path) -> list[Path]:
    pictures = folder / "test" if (folder / "test").is_dir() else folder
    found = [path for path in pictures.iterdir() if path.is_dir()]
    return sorted(path for path in found if not path.name.startswith("."))


def class_names(labels: Path) -> list[str]:
    return [line.strip() for line in lines_of(labels) if line.strip()]


def read_captioned_classes(args, rows) -> Classes:
    """Pairs (rows: of read_rows) beside a file of class names: the longest name in a caption is the
    class."""
    names = class_names(label_file(Path(args.data_path)))
    found = Classes(names, [], [])
    for text, place in zip(rows["text"], rows["place"], strict=True):
        inside = [i for i, name in enumerate(names) if name in text]
        if inside:
            found.labels.append(max(inside, key=lambda i: len(names[i])))
            found.places.append(Place(**place))
    if len(found.places) < len(rows):
        print(f"{len(rows) - len(found.places):,} captions name no class and are left out")
    return found


def read_classes(folder: Path) -> Classes:
    """ELEVATER's layout, or class_name/picture. SystemExit with one line for what is neither."""
    if not folder.is_dir():
        raise SystemExit(f"{folder}: classification wants a folder of classes")
    labels = label_file(folder)
    classes = class_folders(folder)
    names = class_names(labels) if labels else [path.name for path in classes]
    found = Classes(names, [], [])
    for path in classes:
        label = names.index(path.name) if path.name in names else _number(path, len(names), labels)
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                found.places.append(Place(os.path.abspath(file), root=os.path.abspath(folder)))
                found.labels.append(label)
    if not found.places:
        raise SystemExit(f"{folder}: no class_name/picture in it")
    return found


def _number(path: Path, count: int, labels: Path | None) -> int:
    """Of a folder called 000, 001 ... in ELEVATER."""
    if not path.name.isdigit() or int(path.name) >= count:
        raise SystemExit(f"{path}: neither one of the {count} lines of {labels} nor their number")
    return int(path.name)


def read_templates(given: str, folder: str = "") -> list[str]:
    """A file with one template a line, a template, or "" for those beside the data, else those of
    retrieval.py."""
    beside = Path(folder) / TEMPLATES
    if not given and not beside.is_file():
        return list(retrieval.TEMPLATES)
    given = given or str(beside)
    templates = [given]
    if os.path.isfile(given):
        templates = [line.strip() for line in lines_of(Path(given)) if line.strip()]
    for template in templates:
        if template.count("{}") != 1:
            raise SystemExit(f"--templates: {template!r} has no {{}} for the class, or several")
    return templates


# ---- what is answered ----------------------------------------------------------------------------


def embed_places(embedder, places: list[Place]) -> tuple[torch.Tensor, list[int], dict[str, int]]:
    """-> vectors [M, E] of the pictures that can be used, their numbers, {problem: how many}."""
    with Progress("embed pictures", total=len(places), unit="pictures") as progress:
        vectors, problems = index.embedding(embedder, progress.update)(places)
    kept = [i for i in range(len(places)) if i not in problems]
    counts: dict[str, int] = {}
    for problem in problems.values():
        counts[problem] = counts.get(problem, 0) + 1
    return vectors, kept, counts


def evaluate_retrieval(embedder, asked: Questions) -> dict:
    """T->I and I->T R@1/5/10, mean recall, and {"unusable": {problem: pictures}}, which are misses
    both ways."""
    images, kept, problems = embed_places(embedder, asked.places)
    texts = embedder.embed_text(asked.texts + asked.lost)
    pairs = retrieval.among(asked.pairs, kept)
    lost = len(asked.places) - len(kept)
    return retrieval.both_ways(texts, images, pairs, lost) | {"unusable": problems}


def evaluate_classes(
    embedder, asked: Classes, templates: list[str], average: str = "vectors"
) -> dict:
    """Accuracy of the nearest class; pictures that cannot be used are misses, and are counted.

    average: over the templates of a class, its "vectors" or its "probabilities".
    """
    images, kept, problems = embed_places(embedder, asked.places)
    of_vectors = average == "vectors"
    classes = retrieval.class_vectors(embedder.embed_text, asked.names, templates, of_vectors)
    labels = [asked.labels[i] for i in kept]
    of_unusable = [asked.labels[i] for i in set(range(len(asked.labels))).difference(kept)]
    found = retrieval.zero_shot(images, classes, labels, embedder.logit_scale, of_unusable)
    return found | {"unusable": problems}


# ---- what is said --------------------------------------------------------------------------------


def benchmark_of(given: str, path: str) -> str:
    """The benchmark whose numbers are printed beside: given, or by the name of the data; of a file,
    and of a folder test/, that of the folder it lies in too."""
    full = Path(os.path.abspath(path))
    is_whole = full.is_dir() and not files.says_held_out(full)
    parts = [part.lower() for part in full.parts[-1 if is_whole else -2 :]]
    found = [
        name
        for name, told in NAMES.items()
        if any(re.fullmatch(told + OF_A_SPLIT, part) for part in parts)
    ]
    return given or next(iter(found), "")


def retrieval_table(found: dict, name: str, benchmark: str = "") -> str:
    """Markdown, in percent."""
    lines = [
        "| | T→I R@1 | R@5 | R@10 | MR | I→T R@1 | R@5 | R@10 | MR |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    ways = ("text_to_image", "image_to_text")
    ours = [tuple(100 * found[way][f"R@{k}"] for k in retrieval.KS) for way in ways]
    lines.append(_line(f"**{name}**", *ours))
    for who, how, there, back in RETRIEVAL.get(benchmark, []):
        lines.append(_line(f"{who}, {how}, published", there, back))
    return "\n".join(lines)


def _line(name: str, *ways: tuple | None) -> str:
    cells = []
    for way in ways:
        if way is None:
            cells += ["–"] * 4
        else:
            cells += [f"{value:.1f}" for value in (*way, sum(way) / 3)]
    return f"| {name} | {' | '.join(cells)} |"


def counts_line(found: dict) -> str:
    """What the recalls are of."""
    to_image, to_text = found["text_to_image"], found["image_to_text"]
    told = f"{to_image['queries']:,} texts, {to_text['queries']:,} pictures"
    if to_image["without_answer"]:
        told += f"; {to_image['without_answer']:,} texts have no usable picture and count as misses"
    if to_text["without_answer"]:
        told += f"; {to_text['without_answer']:,} pictures have no text and count as misses"
    return told + unusable(found)


def unusable(found: dict) -> str:
    told = ", ".join(f"{count:,} {problem}" for problem, count in found["unusable"].items())
    return f"; pictures that cannot be used and count as misses: {told}" if told else ""


def classes_table(found: dict, name: str, benchmark: str = "") -> str:
    """Markdown, in percent."""
    values = [100 * found[key] for key in ("top1", "top5", "per_class", "largest_class")]
    cells = " | ".join(f"{value:.1f}" for value in values)
    lines = [
        "| | top 1 | top 5 | mean of classes | the largest class |",
        "|---|---:|---:|---:|---:|",
        f"| **{name}** | {cells} |",
    ]
    if benchmark in CLASSIFICATION:
        lines.append(f"| CN-CLIP B/16, published | {CLASSIFICATION[benchmark]} | – | – | – |")
    return "\n".join(lines)


def parse() -> object:
    parser = cli.Parser(__doc__)
    flag = parser.add_argument
    flag("--model", default=os.environ.get("MODEL", str(DEFAULT)), help="run or model folder")
    flag("--data_path", default=str(HERE / "data"), help="what is asked; see above")
    flag("--image_root", default="", help="where relative names of pictures begin")
    flag("--column_map", default="", help="rename columns: 'text=标题,image=图片'")
    flag("--held_out", default="true", choices=["true", "false"])
    flag("--task", default="auto", choices=["auto", "retrieval", "classification"])
    flag("--templates", default="", help="a file with one a line, or one with {} for the class")
    flag(
        "--average",
        default="vectors",
        choices=["vectors", "probabilities"],
        help="what is averaged over the templates of a class",
    )
    flag("--benchmark", default="", choices=["", *NAMES], help="default: by the data's name")
    flag("--output", default="", help="write the figures to this .json as well")
    args = parser.parse_args()
    files.entries(args.data_path)  # refuses what is not there
    return args


def tasks_of(args) -> list[str]:
    """retrieval, classification, or both."""
    folder = Path(args.data_path)
    if args.task != "auto":
        return [args.task]
    if label_file(folder) is None:
        return ["retrieval"]
    return ["classification"] if class_folders(folder) else ["retrieval", "classification"]


def say_unused(args, tasks: list[str], asks_captions: bool) -> None:
    """One line for flags that change nothing here.

    asks_captions: pairs of a data set are read, not only a folder of classes or lines of captions.
    """
    if "classification" not in tasks:
        flags.say_unused(["templates", "average"], "nothing is classified")
    if not asks_captions:
        flags.say_unused(["column_map", "held_out"], "no table of pairs is read")
    if tasks == ["classification"] and not asks_captions:
        flags.say_unused(["image_root"], "pictures lie in the folders of their classes")


def answer_retrieval(args, embedder, name: str, asked: Questions) -> dict:
    """Evaluated and printed."""
    window = embedder.preparation.max_length
    for warning in check_captions(asked.texts, embedder.tokenizer, window)["warnings"]:
        print(warning)
    found = evaluate_retrieval(embedder, asked)
    print(f"\n{retrieval_table(found, name, benchmark_of(args.benchmark, args.data_path))}")
    print(f"{counts_line(found)}; mean recall {100 * found['mean_recall']:.1f}")
    return found


def answer_classes(args, embedder, name: str, asked: Classes, templates: list[str]) -> dict:
    """Evaluated and printed."""
    found = evaluate_classes(embedder, asked, templates, args.average)
    print(f"\n{classes_table(found, name, benchmark_of(args.benchmark, args.data_path))}")
    print(f"{found['pictures']:,} pictures, {found['classes']:,} classes{unusable(found)}")
    return found


def main() -> None:
    cli.quiet_libraries()
    args = parse()
    templates = read_templates(args.templates, args.data_path)
    folder = Path(args.data_path)
    tasks = tasks_of(args)
    captioned = label_file(folder) is not None and not class_folders(folder)
    pairs_asked = "retrieval" in tasks and not is_caption_file(folder)
    say_unused(args, tasks, captioned or pairs_asked)
    rows = None
    if pairs_asked or ("classification" in tasks and captioned):
        rows = read_rows(args)
    asked = {}
    if "retrieval" in tasks:
        asked["retrieval"] = read_questions(args, rows)
    if "classification" in tasks:
        asked["classification"] = (
            read_captioned_classes(args, rows) if captioned else read_classes(folder)
        )
    embedder = model.load(args.model)
    name = "/".join(Path(embedder.path).parts[-3:])
    facts = {"model": args.model, "data": args.data_path}
    if "retrieval" in asked:
        facts["retrieval"] = answer_retrieval(args, embedder, name, asked["retrieval"])
    if "classification" in asked:
        classes = asked["classification"]
        facts["classification"] = answer_classes(args, embedder, name, classes, templates)
    if args.output:
        with files.atomic_file(args.output) as part:
            part.write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
