"""Every fault that the disk or the system can have for a run, and what came of it.

    python benchmarks/faults.py [--every N] [--json FILE]

A tiny model is quantized by three recipes. Each run is killed (SIGKILL) before and after every N-th step towards the
disk (writing, syncing, renaming, deleting a file), or told there that the disk is full; then the same command is given
again. And every file of a killed run's journal is damaged, one at a time: a bit flipped, the end cut off, the file
deleted; and every file of the finished folder, which `gyroquant verify` is then asked about. `same` is how often the
second run ended with the bytes of an undisturbed one, `refused` how often it, or `verify`, said which file is damaged,
`lost` anything else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

import fault_injection
import tiny_models
from fault_injection import Fault
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gyroquant as gq
from gyroquant.errors import GyroquantError

_FIRST_BLOCK = "block-00000.json"


def flipped(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Cuts off the last byte of a file."""
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {"a bit flipped": flipped, "end cut off": cut, "deleted": Path.unlink}


class Trial:
    """One recipe on one model: what it gives undisturbed, and what of a disturbed one."""

    def __init__(self, name: str, model: Path, corpus: Path, place: Path):
        self.name, self.model, self.corpus, self.place, self.count = name, model, corpus, place, 0
        code, self.steps = fault_injection.disturbed(None, self._work(place / "undisturbed" / "out"))
        assert code == 0
        self.wanted = fault_injection.content(place / "undisturbed" / "out")

    def _work(self, out: Path) -> Callable[[], object]:
        return partial(fault_injection.quantize, self.model, out, self.corpus, self.name)

    def _out(self) -> Path:
        self.count += 1
        return self.place / str(self.count) / "out"

    def after(self, fault: Fault) -> str:
        """What comes of a fault and the same command again."""
        out = self._out()
        code, _ = fault_injection.disturbed(fault, self._work(out))
        if code == 0:
            return "no fault"  # a step that writes nothing, so no disk was too full for it
        if fault_injection.disturbed(None, self._work(out))[0] and out.with_name(".out.journal").exists():
            return "lost"  # without a journal it was done, and is only not done twice
        return self._compared(out)

    def _compared(self, out: Path) -> str:
        return "same" if out.exists() and fault_injection.content(out) == self.wanted else "lost"

    def damaged_result(self, damage: Callable[[Path], None]) -> Counter[str]:
        """What `gyroquant verify` says when the files of the finished folder are damaged, one after the other."""
        outcomes: Counter[str] = Counter()
        for path in sorted((self.place / "undisturbed" / "out").iterdir()):
            copy = Path(shutil.copytree(path.parent, self._out()))
            damage(copy / path.name)
            try:
                said = " ".join(gq.verify(copy)["problems"])
            except GyroquantError as error:
                said = str(error)
            outcomes["refused" if path.name in said else "lost"] += 1
        return outcomes

    def damaged(self, damage: Callable[[Path], None]) -> Counter[str]:
        """What comes of damaging the files of a journal, one after the other."""
        outcomes: Counter[str] = Counter()
        fault, tried = Fault("kill", _FIRST_BLOCK, before=False), set[str]()
        while True:
            out = self._out()
            fault_injection.disturbed(fault, self._work(out))
            journal = out.with_name(".out.journal")
            left = sorted({path.name for path in journal.iterdir() if path.is_file()} - tried)
            if not left:
                return outcomes
            tried.add(left[0])
            damage(journal / left[0])
            code, said = fault_injection.told(self._work(out))
            outcomes[
                self._compared(out) if code == 0 else "refused" if f"{left[0]} is damaged" in said else "lost"
            ] += 1


def trials(place: Path, every: int) -> list[dict[str, object]]:
    """The rows of the table."""
    corpus, rows = place / "corpus.txt", []
    corpus.write_text(tiny_models.prose(6000), encoding="utf-8")
    model = tiny_models.Folders(place / "models")["llama"]
    for name in fault_injection.RECIPES:
        trial = Trial(name, model, corpus, place / name[:5])
        faults = {
            "killed before a step": [Fault("kill", at) for at in range(0, trial.steps, every)],
            "killed after a step": [Fault("kill", at, before=False) for at in range(0, trial.steps, every)],
            "disk full": [Fault("full", at) for at in range(0, trial.steps, every)],
        }
        for kind, points in faults.items():
            came = Counter(trial.after(fault) for fault in track(points, f"{name}: {kind}"))
            came.pop("no fault", None)
            rows.append({"recipe": name, "fault": kind, "tried": sum(came.values()), **came})
        for kind, damage in DAMAGES.items():
            for what, came in (("journal", trial.damaged(damage)), ("result", trial.damaged_result(damage))):
                rows.append({"recipe": name, "fault": f"{what}: {kind}", "tried": sum(came.values()), **came})
    return rows


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every N-th step")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = trials(Path(place), asked.every)
    table = Table("recipe", "fault", "tried", "same", "refused", "lost")
    for row in rows:
        table.add_row(
            str(row["recipe"]),
            str(row["fault"]),
            *(str(row.get(key, 0)) for key in ("tried", "same", "refused", "lost")),
        )
    Console().print(table)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row.get("lost") for row in rows))


if __name__ == "__main__":
    main()
