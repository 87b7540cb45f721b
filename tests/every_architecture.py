"""The second table of docs/architectures.md: every class of transformers that has a causal language model.

    PYTHONPATH=tests/helpers python tests/every_architecture.py docs/architectures.md

`make architectures` runs this. The page begins with the first table, that of `architecture_table`. The second one has
two halves:

- `derived_rows`: the description of each class, derived from a tiny random model of it, with its proofs. A test makes
  this half again.
- `quantized_rows`: each tiny model is rounded and saved. One process then loads every result and compares logits, with
  the cache and without it. Another process, without gyroquant, must fail to open any of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import architecture_table
import torch
import transformers
from tiny_runs import streamed_logits

import gyroquant
from gyroquant.errors import GyroquantError
from gyroquant.models.deriving.derive import EXACT, Derivation, derive
from gyroquant.models.deriving.tiny import causal_model_types, default_config, tiny_model, tiny_tokens
from gyroquant.models.execution.messages import quiet
from gyroquant.models.graph.model_graph import ModelGraph
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.folds import plan_folds
from gyroquant.pipeline.job import prepare
from gyroquant.recipes.schema import load_recipe
from gyroquant.testing.models import prose, tokenizer

SITES = ("R2", "R3", "R4", "qk", "attn_out", "attn_in", "mlp_in", "latent")
LEVELS = ("fused", "online", "unrotated", "refused")
COLUMNS = ("class", "kind", "R1", *SITES, "error", "why R1 is not fused", "rounded with", "reloaded", "cache")
Row = dict[str, str]
"""The cells of one class, by column."""

# Classes whose configuration does not mark them as parts of an encoder-decoder model. All others are text decoders.
ENCODERS = frozenset(
    {
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "git"),
        *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
        *("xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
    }
)
PARTS = frozenset({"gemma4_assistant", "gemma4_unified_assistant", "trocr"})
"""Draft models that read the states of another model, and the decoder of an image encoder."""

SAME = 1e-5
"""The largest relative error of logits in fp32 at which a model counts as reloaded unchanged."""
STEPS = 8
"""The number of tokens that are decoded one by one."""
DIFFERS = "differs in the original too"
NO_CACHE = ("no cache", "not causal")
_STEPS_OF_TRANSFORM = (("R1", False), ("R1", True), ("R2", False), ("latent", False), ("R3", True), ("R4", True))
_CACHES = ("past_key_values", "cache_params", "state")
_REASONS = {
    "are not described": "other parts write to the stream",
    "changed the logits": "a rotation is not exact",
    "does not run each": "blocks do not run once each",
    "share parameters": "blocks share parameters",
    "requires the PIL": "needs a package, PIL",
    "was not read as": "differs, block by block, from the pass of transformers",
    "has no language model of the type": "no automatic class opens its configuration",
}
_ALONE = """
import json, pathlib, sys
sys.modules["gyroquant"] = None  # so that importing it raises
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
for folder in sorted(pathlib.Path(sys.argv[1]).glob("*/out")):
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        error = ""
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    print(json.dumps([folder.parent.name, error]), flush=True)
assert not [name for name in sys.modules if name.startswith("gyroquant.")]
"""


@contextmanager
def repeatable() -> Iterator[None]:
    """Random numbers are the same each time, and the messages of transformers are off, in a with block."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        yield


def kind(family: str) -> str:
    """`text` for a text decoder that stands alone, `other` for encoders and for parts of other models."""
    try:
        config: Any = default_config(family)
    except Exception:  # configurations check their settings and raise many kinds
        config = None
    other = family in ENCODERS or family in PARTS or bool(getattr(config, "is_encoder_decoder", False))
    return "other" if other else "text"


def short_reason(text: str) -> str:
    """A reason in a few words. Of errors that were caused by others, the first cause."""
    text = " ".join(text.split()).replace("|", "/")
    gain = re.search(r"(\S+) has a gain and writes to the residual stream", text)
    if gain:
        return "post-norm" if re.search(r"\.\d+\.|\.\d+$", gain[1]) else "norm after the embedding"
    cause = re.sub(r".*\b(?=\w+Error: )", "", text).removeprefix("UnsupportedModelError: ")
    while cause.endswith(")") and cause.count(")") > cause.count("("):  # those around the message of a cause
        cause = cause[:-1]
    return next((short for part, short in _REASONS.items() if part in text), _cut(cause))


def _cut(text: str, length: int = 90) -> str:
    return text if len(text) <= length else text[: length - 4].rpartition(" ")[0] + " ..."


def site_cell(derivation: Derivation, site: str) -> str:
    """How maps at a site were proven: `fused`, `online`, `both`, or empty."""
    online_only = site in ("R3", "R4", "attn_out")
    online = (site if online_only else f"{site} online") in derivation.proofs
    fused = any(name in derivation.proofs for name in (f"{site} permutation", f"{site} diagonal"))
    fused = fused or (not online_only and site in derivation.proofs)
    return {(True, True): "both", (True, False): "fused", (False, True): "online", (False, False): ""}[fused, online]


def derived_row(family: str) -> tuple[Row, float]:
    """The derived half of the row of one class, and the seconds that the derivation took."""
    row = dict.fromkeys(COLUMNS, "") | {"class": family, "kind": kind(family), "R1": "refused"}
    problem, start = "no tiny model", time.perf_counter()
    try:
        with repeatable():
            model = tiny_model(default_config(family))
            problem, start = "not derived", time.perf_counter()
            derivation = derive(model, tiny_tokens(model))
    except Exception as error:  # whatever it is, the table shows it
        row["why R1 is not fused"] = f"{problem}: {short_reason(_message(error))}"
        return row, time.perf_counter() - start
    row |= {"R1": derivation.level} | {site: site_cell(derivation, site) for site in SITES}
    row["error"] = f"{max(derivation.proofs.values()):.0e}" if derivation.proofs else ""
    if derivation.level != "fused":
        row["why R1 is not fused"] = short_reason(derivation.problems["R1"])
    return row, time.perf_counter() - start


def derived_rows(families: Sequence[str] | None = None) -> tuple[list[Row], dict[str, float]]:
    """The derived halves of the rows, and the seconds of each class."""
    made = {family: derived_row(family) for family in families or causal_model_types()}
    return [row for row, _ in made.values()], {family: seconds for family, (_, seconds) in made.items()}


@dataclass
class Rounded:
    """What became of one class.

    - transform: the sites whose maps were used.
    - original, cache: the check of the cache on the original and on the result; see `cache_check`.
    - reloaded: the relative error of the logits of the result, loaded in a fresh process.
    - problem, reload_problem: why it was not rounded or not loaded, the whole message.
    - alone: the error of a process without gyroquant that opens the result. Empty if it opens.
    """

    transform: str = ""
    original: str = ""
    cache: str = ""
    reloaded: float | None = None
    problem: str = ""
    reload_problem: str = ""
    alone: str = ""

    @property
    def cells(self) -> Row:
        """The cells of this half of a row."""
        if self.problem:
            return {"rounded with": f"not rounded: {short_reason(self.problem)}"}
        row = {"rounded with": self.transform or "no map"}
        if self.reloaded is None:
            return row | {"reloaded": f"fails: {short_reason(self.reload_problem)}"}
        row["reloaded"] = "equal" if self.reloaded <= SAME else f"{self.reloaded:.0e}"
        equal, original = _equal(self.cache), _equal(self.original)
        if self.cache in NO_CACHE:
            return row | {"cache": self.cache}
        return row | {"cache": "equal" if equal else "differs" if original else DIFFERS}


def _equal(cache: str) -> bool:
    return bool(re.fullmatch(r"[\d.]+e[-+]\d+", cache)) and float(cache) <= EXACT


@torch.no_grad()
def cache_check(model: Any, ids: torch.Tensor) -> str:
    """The relative error of logits of the last tokens, decoded one by one with the cache, against a pass without it.

    `no cache` if the model has no cache, `not causal` if logits depend on later tokens. An error is returned as text.
    """
    try:
        whole, first = model(input_ids=ids, use_cache=False).logits, ids[:, :-STEPS]
        other = model(input_ids=torch.cat([first, ids[:, :STEPS]], 1), use_cache=False).logits
        if relative(other[:, :-STEPS], whole[:, :-STEPS]) > EXACT:
            return "not causal"
        cache = _cache_of(model(input_ids=first, use_cache=True)) or _given_cache(model, first)
        if not cache:
            return "no cache"
        steps = []
        for i in range(ids.shape[1] - STEPS, ids.shape[1]):
            out = model(input_ids=ids[:, i : i + 1], use_cache=True, **cache)
            steps.append(out.logits[:, -1:])
            cache = _cache_of(out) or cache
        return f"{relative(torch.cat(steps, 1), whole[:, -STEPS:]):.1e}"
    except Exception as error:  # models raise many kinds
        return _message(error)


def _cache_of(out: Any) -> dict[str, Any]:
    return {name: out[name] for name in _CACHES if getattr(out, name, None) is not None}


def _given_cache(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """A cache that the model fills but does not return. Empty if it does not fill it."""
    cache = transformers.DynamicCache(config=model.config)
    try:
        model(input_ids=ids, use_cache=True, past_key_values=cache)
        return {"past_key_values": cache} if cache.get_seq_length() else {}
    except (TypeError, ValueError):
        return {}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of logits; infinite if they are not finite."""
    return float(torch.nan_to_num((found - expected).norm() / expected.norm(), nan=torch.inf))


def recipe(transform: Mapping[str, Any]) -> dict[str, Any]:
    """Rounding to nearest at 8 bits, one scale for each row."""
    few = {"nsamples": 2, "seqlen": 24}
    weights = {"bits": 8, "group_size": -1, "solver": "rtn"}
    return {"transform": dict(transform), "weights": weights, "calibration": few, "proof": few}


def chosen_transform(graph: ModelGraph) -> dict[str, Any]:
    """Hadamard maps at the sites where the model takes them: R1 fused if possible, R3 and R4 online."""
    transform: dict[str, Any] = {}
    for site, online in _STEPS_OF_TRANSFORM:
        if site in transform:
            continue
        trial = transform | {site: {"method": "hadamard"} | ({"online": True} if online else {})}
        try:
            plan_folds(graph, load_recipe(recipe(trial)))
        except GyroquantError:
            continue
        transform = trial
    return transform


def round_tiny(family: str, folder: Path) -> Rounded:
    """Saves a tiny model in `folder`, rounds it into `folder/out`, and keeps the logits of what was saved."""
    result = Rounded()
    try:
        model = tiny_model(default_config(family))
        ids = tiny_tokens(model)
        result.original = cache_check(model, ids)
        model.save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        transform = chosen_transform(open_model(folder / "model").graph)
        result.transform = " ".join(
            f"{site} online" if site == "R1" and step.get("online") else site for site, step in transform.items()
        )
        job = prepare(folder / "model", folder / "out", recipe(transform), [prose(2000)], save_dtype="float32")
        pipeline.run(job)
    except Exception as error:  # whatever it is, the table shows it
        result.problem = _message(error, folder)
        shutil.rmtree(folder, ignore_errors=True)
        return result
    try:
        logits = streamed_logits(folder / "out", ids)
        if logits.shape[:2] != ids.shape:
            raise ValueError(f"block by block, {ids.shape[1]} tokens give logits at {logits.shape[1]} positions")
        torch.save({"ids": ids, "logits": logits}, folder / "kept.pt")
    except Exception as error:
        result.reload_problem = _message(error, folder)
    return result


def _message(error: Exception, folder: Path | None = None) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if folder is None else text.replace(f"{folder}/", "")


def reload_all(root: Path) -> Iterator[tuple[str, float | None, str, str]]:
    """Loads every result below `root`: class, error of its logits or None, the check of its cache, why it fails."""
    for folder in sorted(path.parent for path in root.glob("*/kept.pt")):
        kept = torch.load(folder / "kept.pt")
        try:
            model = gyroquant.load(folder / "out", dtype=torch.float32)
            with torch.no_grad():
                error = relative(model(input_ids=kept["ids"], use_cache=False).logits, kept["logits"])
            yield folder.name, error, cache_check(model, kept["ids"]), ""
        except Exception as caught:
            yield folder.name, None, "", _message(caught, folder)


def quantized_rows(root: Path, families: Sequence[str] | None = None) -> dict[str, Rounded]:
    """What became of every class; the results are saved below `root`."""
    results: dict[str, Rounded] = {}
    for family in families or causal_model_types():
        with repeatable():
            results[family] = round_tiny(family, root / family)
        print(family, results[family].transform, results[family].problem, file=sys.stderr, flush=True)
    for family, error, cache, problem in _lines([sys.executable, __file__, "reload", str(root)]):
        results[family].reloaded, results[family].cache, results[family].reload_problem = error, cache, problem
        print(family, error, cache, "| original:", results[family].original, problem, file=sys.stderr, flush=True)
    for family, error in _lines([sys.executable, "-c", _ALONE, str(root)]):
        results[family].alone = error
    return results


def _lines(command: list[str]) -> Iterator[list[Any]]:
    """Runs a program in the folder of temporary files and reads the lines of JSON that it prints."""
    helpers = str(Path(__file__).parent / "helpers")
    environment = os.environ | {"PYTHONPATH": helpers, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=tempfile.gettempdir(), env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[1]} ended with {done.returncode}")
    return (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


COUNTS = ("classes", "all", *LEVELS, "rounded", "reloaded equal", "with a cache", "cache equal", DIFFERS)


def counts(rows: Sequence[Row]) -> list[str]:
    """The lines of the table of counts: text decoders, all classes."""
    lines = [line(COUNTS), "|---|" + "--:|" * (len(COUNTS) - 1)]
    for name, chosen in (("text decoders", [row for row in rows if row["kind"] == "text"]), ("all", list(rows))):
        rounded = [row for row in chosen if not row["rounded with"].startswith("not rounded")]
        numbers = [len(chosen), *(sum(row["R1"] == level for row in chosen) for level in LEVELS), len(rounded)]
        numbers.append(sum(row["reloaded"] == "equal" for row in rounded))
        caches = [row["cache"] for row in rounded if row["cache"] not in ("", *NO_CACHE)]
        numbers += [len(caches), caches.count("equal"), caches.count(DIFFERS)]
        lines.append(line((name, *map(str, numbers))))
    return lines


def line(cells: Sequence[str]) -> str:
    """A line of a table. Without spaces, so that it is not taken for a line of the first table."""
    return f"|{'|'.join(cells)}|"


SECTION = """
## Every class of transformers

`make architectures` makes this page: {date}, transformers {transformers}, torch {torch}, {minutes:.0f} minutes of CPU
time. A test derives every class again and compares R1 and the proven sites.

transformers has {classes} classes with a causal language model. Most of them have no hand-written description, so
gyroquant derives one from a tiny random model of the class. Each such model has the default settings of the class, but
small sizes and few layers of each kind. Random maps are folded into each kind of site, at all its places, and the
logits in fp32 are compared with those of the original. The table shows what was derived for each class, also where a
hand-written description exists. One derivation takes at most {seconds:.1f} seconds ({slowest}).

- *kind*: `text` is a decoder of text that stands alone. `other` is an encoder, or a part of another model.
- *R1*: `fused`; `online` if R1 can only run with the model; `unrotated` if the stream takes no map, so that the model
  can only be rounded and use other sites; `refused` if there is no description.
- *R2 to latent*: `fused`, `online` or `both`, if proven. Fused maps at R4 are permutations or scales, at attn_in and
  mlp_in scales, and at qk rotations of the pairs that RoPE turns. An empty cell: no proof, so such maps are refused.
- *error*: the largest relative error of the logits among all proofs.
- *why R1 is not fused*: *post-norm* as above; *norm after the embedding*, which has a gain too; *a rotation is not
  exact*, because something else than linear layers and norms reads, writes or scales the stream (fixed positions, for
  example).
- *rounded with*: the tiny model was rounded at 8 bits with Hadamards at these sites. R3 and R4 ran online. So did R1
  where parts around the decoder, such as those for images, write into the stream.
- *reloaded*: a new process loaded the result. `equal`: the relative difference from the logits of the saved model, run
  block by block, is at most {same:.0e}.
- *cache*: the last {steps} tokens were decoded one by one with the cache, and the logits compared with those of a pass
  without it. `equal`: they differ by at most {exact:.0e}. `differs in the original too`: so they do in the model of
  transformers, before gyroquant changed anything. `not causal`: logits depend on later tokens, so a cache cannot be
  exact.

A process without gyroquant tried to open all {saved} saved results. It opened {opened} of them. {named} of the errors
name the remedy, `import gyroquant`.

"""


def joined(row: Row, result: Rounded) -> Row:
    """A whole row. The reason why a class is refused stands there once."""
    refused = row["R1"] == "refused" and result.problem
    return row | ({"rounded with": "not rounded"} if refused else result.cells)


def page(root: Path, families: Sequence[str] | None = None) -> str:
    """The whole page: both tables."""
    rows, seconds = derived_rows(families)
    results = quantized_rows(root, families)
    rows = [joined(row, results[row["class"]]) for row in rows]
    saved = [result for result in results.values() if not result.problem]
    slowest = max(seconds, key=lambda family: seconds[family])
    first = architecture_table.page()
    text = SECTION.format(
        date=date.today(),
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        minutes=sum(os.times()[:4]) / 60,
        classes=len(rows),
        seconds=seconds[slowest],
        slowest=slowest,
        same=SAME,
        exact=EXACT,
        steps=STEPS,
        saved=len(saved),
        opened=sum(not result.alone for result in saved),
        named=sum("import gyroquant" in result.alone for result in saved),
    )
    table = [line(COLUMNS), "|---|---|" + "---|" * (len(COLUMNS) - 2), *(line(list(row.values())) for row in rows)]
    return first + text + "\n".join([*counts(rows), "", *table]) + "\n"


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1] == "reload":
        for loaded in reload_all(Path(sys.argv[2])):
            print(json.dumps(loaded), flush=True)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            made = page(Path(scratch), sys.argv[2:] or None)
        Path(sys.argv[1]).write_text(made, encoding="utf-8")
