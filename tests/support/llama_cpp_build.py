"""llama.cpp for tests: its converter and its Python binding, from the source distribution of llama-cpp-python. Compiled
once, into a cache beside the environment; no developer who installs requirements-dev.txt waits for it.

    python tests/support/llama_cpp_build.py            # build it now: three minutes of CPU time

LLAMA_CPP_CACHE names the folder, else ~/.cache/danpu/llama_cpp. The wheel stays there too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from filelock import FileLock

VERSION = "0.3.36"
NEEDS = "diskcache==5.6.3"  # the one package that the binding imports and danpu does not have
CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
# no code for this very CPU (the cache may be a shared folder), nothing that the test does not call, and
# little optimised: the models are tiny
FLAGS = "-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1"
# the binding's build settings force a library on that only llama.cpp's programs call, two thirds of the work
PROGRAMS = "set(LLAMA_BUILD_COMMON ON CACHE"


def build() -> Path:
    """The folder with python/ (for sys.path) and converter/; made on first use, safe with several processes at once.

    Errors: RuntimeError with pip's last words where it cannot be fetched or compiled.
    """
    cache = Path(os.environ.get("LLAMA_CPP_CACHE") or "~/.cache/danpu/llama_cpp").expanduser()
    folder = cache / f"{VERSION}-py{sys.version_info[0]}{sys.version_info[1]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        if not folder.is_dir():
            print(
                f"llama.cpp: building {VERSION} (once, into {cache})", file=sys.stderr, flush=True
            )
            made = Path(tempfile.mkdtemp(prefix="part-", dir=cache))
            try:
                make(made, cache)
                made.rename(folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    return folder


def make(folder: Path, cache: Path) -> None:
    (folder / "converter").mkdir()
    if not list(cache.glob(f"*{VERSION}.tar.gz")):
        pip(
            "download",
            "--no-binary",
            "llama-cpp-python",
            "--dest",
            cache,
            f"llama-cpp-python=={VERSION}",
        )
    (source,) = cache.glob(f"*{VERSION}.tar.gz")
    with tempfile.TemporaryDirectory(dir=cache) as scratch, tarfile.open(source) as archive:
        archive.extractall(scratch, filter="data")
        (unpacked,) = Path(scratch).iterdir()
        wheels = f"*{VERSION}-*.whl"
        if not list(cache.glob(wheels)):
            settings = unpacked / "CMakeLists.txt"
            text = settings.read_text(encoding="utf-8")
            settings.write_text(text.replace(PROGRAMS, PROGRAMS.replace(" ON ", " OFF ")))
            pip("wheel", "--wheel-dir", cache, unpacked)
        for name in CONVERTER:
            shutil.move(unpacked / "vendor/llama.cpp" / name, folder / "converter" / name)
    pip("install", "--target", folder / "python", next(cache.glob(wheels)), NEEDS)


def pip(*words) -> None:
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--no-deps", *map(str, words[1:])]
    cores = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    env = os.environ | {"CMAKE_ARGS": FLAGS, "CMAKE_BUILD_PARALLEL_LEVEL": cores}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        raise RuntimeError(f"llama.cpp: pip {words[0]} failed: {said}")


if __name__ == "__main__":
    print(build())
