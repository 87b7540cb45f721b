"""Fuzzes everything that reads files from outside: GGUF and safetensors headers, indices, recipes, descriptions.

    python benchmarks/fuzz_readers.py [--minutes 10] [--seed 0] [--only gguf recipe] [--crashes FOLDER]
        [--memory 1024] [--seconds 10] [--engine auto|atheris|random] [--json FILE]

Every target runs in a process of its own, with `--memory` MB of address space above what it starts with and
`--seconds` for each input. With atheris installed, inputs are guided by the coverage of gyroquant's code; otherwise
they are random mutations of good files (the same as in tests/fuzz). Prints a table: inputs tried, accepted, refused in
words, crashes (any other exception, running out of memory, or the process dying), hangs, and the largest memory above
the start. An input that crashes or hangs is saved under the name of its target and its hash. Ends with 1 if there were
any.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("gguf", "safetensors", "index", "config", "tokenizer", "rotations", "recipe", "description", "manifest")
NAMES += ("export manifest",)
COUNTS = ("tried", "accepted", "refused", "crashes", "hangs")


class Hang(BaseException):
    """Raised in the middle of a reader that takes too long."""


class Worker:
    """Tries inputs on one target and keeps count, in a file that is there even when the process dies."""

    def __init__(self, given: argparse.Namespace):
        sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests"), str(ROOT / "src")]
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        import transformers

        if given.engine == "atheris":
            import atheris

            with atheris.instrument_imports(include=["gyroquant"]):
                import reader_targets
        else:
            import reader_targets
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        self.given, self.targets = given, reader_targets
        self.scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.target = reader_targets.make(self.scratch)[given.worker]
        for data in self.target.seeds:  # what is imported and cached at first is not the inputs' doing
            self.target.accepts(data)
        self.counts: dict[str, Any] = dict.fromkeys(COUNTS, 0) | {"memory": 0, "kinds": {}}
        self.base, self.last = self._peak(), Path(f"{given.report}.input")
        signal.signal(signal.SIGALRM, self._late)
        self._limit()

    def _limit(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
        if pages:
            most = pages * resource.getpagesize() + (self.given.memory << 20)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

    @staticmethod
    def _peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)

    @staticmethod
    def _late(*_: object) -> None:
        raise Hang

    def one(self, data: bytes) -> None:
        """Tries one input."""
        self.last.write_bytes(data)
        faulthandler.dump_traceback_later(3 * self.given.seconds, exit=True)  # where no Python code runs meanwhile
        signal.setitimer(signal.ITIMER_REAL, self.given.seconds)
        self.counts["tried"] += 1
        try:
            taken = self.target.accepts(data)
            self.counts["accepted" if taken else "refused"] += 1
        except Hang:
            self._keep(data, "hangs", "Hang")
        except BaseException as error:  # panics of Rust are no Exceptions
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self._keep(data, "crashes", f"{type(error).__name__}: {str(error)[:120]}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        if self.counts["tried"] % 20 == 0 or self.counts["tried"] < 20:
            self.write()

    def write(self) -> None:
        """Brings the counts up to date."""
        self.counts["memory"] = self._peak() - self.base
        partial = self.given.report.with_suffix(".partial")
        partial.write_text(json.dumps(self.counts))
        partial.replace(self.given.report)

    def _keep(self, data: bytes, what: str, kind: str) -> None:
        self.counts[what] += 1
        if kind not in self.counts["kinds"]:  # the first of each kind is saved
            self.counts["kinds"][kind] = saved(self.given.crashes, self.target.name, data)
        self.write()

    def run_random(self) -> None:
        """Mutations of the seeds, one after another."""
        end, seed = time.monotonic() + self.given.budget, self.given.seed
        while time.monotonic() < end:
            self.one(self.targets.mutated(self.target, seed))
            seed += 1
        self.write()

    def run_atheris(self) -> None:
        """Inputs guided by coverage, a mutation of ours among the fuzzer's own every other time."""
        import atheris

        corpus = self.scratch / "corpus"
        corpus.mkdir()
        for number, data in enumerate(self.target.seeds):
            (corpus / str(number)).write_bytes(data)

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            ours = seed % 2 and self.targets.mutated(self.target, self.given.seed + seed)
            return ours[:most] if ours else atheris.Mutate(data, most)

        longest = max(len(data) for data in self.target.seeds) + 4096
        options = [f"-max_total_time={int(self.given.budget)}", f"-seed={self.given.seed + 1}", f"-max_len={longest}"]
        options += ["-timeout=0", "-rss_limit_mb=0", "-print_final_stats=0", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], self.one, custom_mutator=mutate)
        atheris.Fuzz()


def saved(folder: Path, name: str, data: bytes) -> str:
    """Saves an input; returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return str(path)


def rows(given: argparse.Namespace, engine: str, scratch: Path) -> Iterator[dict[str, Any]]:
    """What came of each target; a process that dies counts as a crash, and another goes on behind it."""
    names = given.only or NAMES
    for name in names:
        total: dict[str, Any] = {"target": name} | dict.fromkeys(COUNTS, 0) | {"memory": 0, "kinds": {}}
        end, seed = time.monotonic() + 60 * given.minutes / len(names), given.seed
        while (left := end - time.monotonic()) > 2 or not total["tried"]:
            report = scratch / f"{name.replace(' ', '-')}-{seed}.json"
            command = [
                sys.executable,
                __file__,
                "--worker",
                name,
                "--report",
                str(report),
                "--budget",
                str(max(left, 3)),
            ]
            command += ["--seed", str(seed), "--memory", str(given.memory), "--seconds", str(given.seconds)]
            command += ["--engine", engine, "--crashes", str(given.crashes)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if not report.exists():
                sys.exit(f"the target {name} cannot be started:\n{done.stderr[-2000:]}")
            counts = json.loads(report.read_text())
            for key in COUNTS:
                total[key] += counts[key]
            total["memory"] = max(total["memory"], counts["memory"])
            total["kinds"] |= counts["kinds"]
            if done.returncode:  # killed, or stopped where no Python code ran
                hung = "Timeout (" in done.stderr
                total["hangs" if hung else "crashes"] += 1
                data = Path(f"{report}.input").read_bytes()
                total["kinds"][f"the process ended with {done.returncode}"] = saved(given.crashes, name, data)
            seed += counts["tried"] + 1
        yield total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=NAMES)
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"))
    parser.add_argument("--memory", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--engine", choices=("auto", "atheris", "random"), default="auto")
    parser.add_argument("--json", type=Path)
    for name, kind in (("--worker", str), ("--report", Path), ("--budget", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker = Worker(given)
        worker.run_atheris() if given.engine == "atheris" else worker.run_random()
        return
    there = importlib.util.find_spec("atheris") is not None
    engine = given.engine if given.engine != "auto" else "atheris" if there else "random"
    print(f"engine: {engine}; {given.minutes:g} minutes, seed {given.seed}\n")
    print("| target | inputs tried | accepted | refused | crashes | hangs | largest memory (MB) |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(given, engine, Path(scratch)):
            found.append(row)
            cells = [row["target"], *(str(row[key]) for key in COUNTS), f"{row['memory'] / 1e6:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    for row in found:
        for kind, place in row["kinds"].items():
            print(f"{row['target']}: {kind}\n    {place}")
    if given.json:
        given.json.write_text(json.dumps({"engine": engine, "rows": found}, indent=1) + "\n")
    sys.exit(any(row["crashes"] or row["hangs"] for row in found))


if __name__ == "__main__":
    main()
