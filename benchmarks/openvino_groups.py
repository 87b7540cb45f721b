"""Every width by every group size in OpenVINO: how many of 32 greedy tokens are those of the same weights in fp32.

    python benchmarks/openvino_groups.py [--hidden 576 960 2560 3072] [--bits 2 3 4 8] [--groups N ...] [--as-they-are]

Random Llamas of one layer whose rows have 576, 960, 2560 or 3072 weights are rounded to nearest in groups of every
size that divides the rows, symmetric and asymmetric (what reads the stream: q, k, v, gate and up), exported, and run
by OpenVINO: a prompt in one call, then single tokens through the cache. A cell has the greedy tokens alike "exact /
default": in fp32 throughout and as OpenVINO runs the file by default, with a "+" the near ties among the others
(`gyroquant.formats.usage_check`). The check of an export wants 32 and at least 30, near ties included. What fails it is
bold, and the command ends with 1. With `--as-they-are` groups are not written as smaller ones: what that is for.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.formats import usage_check as in_use
from gyroquant.formats.export import TOLERANCE
from gyroquant.formats.native.runtime import TransformersRuntime
from gyroquant.formats.openvino import writer as openvino
from gyroquant.formats.runtime import open_runtime

WORDS, HEAD = 64, 64
LIMITS = {True: TOLERANCE, False: in_use.DEFAULT_ERROR}


def model_of(hidden: int) -> Any:
    """A random Llama whose tokens depend on its layer: the stream is small before it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=HEAD,
        num_key_value_heads=1,
        vocab_size=WORDS,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.1 if "embed" in name else parameter.shape[1] ** -0.5)
    return model


def groups_of(hidden: int) -> list[int]:
    """Every size of a group that rows of `hidden` have."""
    return [*(size for size in range(16, 257) if hidden % size == 0), -1]


def cell(model: Any, place: Path, bits: int, group: int, symmetric: bool) -> tuple[str, float]:
    """Greedy tokens alike, and the largest error of the exact logits; "refused" where the format does not hold it."""
    weights = {"bits": bits, "group_size": group, "symmetric": symmetric, "scale": "minmax", "solver": "rtn"}
    recipe = {
        "name": "groups",
        "weights": weights | {"ignore": ["o_proj", "down_proj", "lm_head"]},
        "proof": {"seqlen": 32},
    }
    gq.quantize(model, recipe, None, out=place / "out", options=gq.OutputOptions(save_dtype="float32"))
    try:
        gq.export(place / "out", "openvino", place / "x", check=False)
    except InputError:
        return "refused", 0.0
    ids = torch.randint(WORDS, (in_use.PROMPT,), generator=torch.Generator().manual_seed(0))
    texts = in_use.texts_of(ids, in_use.STEPS, None)
    usage = in_use.usage_of(TransformersRuntime(place / "out", exact=True), *texts)
    shown, wrong, error = [], False, 0.0
    for exact, limit in LIMITS.items():
        found = in_use.compare_usage(open_runtime("openvino", place / "x", exact), usage, limit)
        ties = f"+{found['greedy_near_ties']}" if found["greedy_near_ties"] else ""
        shown.append(f"{found['greedy_tokens_alike']}{ties}")
        wrong = wrong or bool(in_use.faults(found, limit, exact))
        error = max(error, found["relative_logit_error"] if exact else 0.0)
    return f"**{' / '.join(shown)}**" if wrong else " / ".join(shown), error


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[576, 960, 2560, 3072])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--groups", type=int, nargs="+", help="only these")
    parser.add_argument("--as-they-are", action="store_true", help="write every group as it is")
    given = parser.parse_args()
    held_as = (lambda group, columns: group) if given.as_they_are else openvino.held_group
    vars(import_module("gyroquant.formats.openvino.operations"))["held_group"] = held_as
    names = ("openvino", "torch", "transformers")
    print(", ".join(f"{name} {version(name)}" for name in names), end="\n\n")
    kinds = [(bits, symmetric) for bits in given.bits for symmetric in (True, False)]
    titles = [f"W{bits} {'sym' if symmetric else 'asym'}" for bits, symmetric in kinds]
    print(f"| row | group | held as | {' | '.join(titles)} | largest error, exact |")
    print(f"|--:|--:|--:|{'--:|' * len(titles)}--:|")
    wrong = False
    for hidden in given.hidden:
        model = model_of(hidden)
        for group in (one for one in groups_of(hidden) if given.groups is None or one in given.groups):
            found = []
            for bits, symmetric in kinds:
                with TemporaryDirectory(prefix="gyroquant-") as place:
                    found.append(cell(model, Path(place), bits, group, symmetric))
            wrong = wrong or any("**" in text for text, _ in found)
            held = "the row" if group == -1 else held_as(group, hidden)
            cells = " | ".join(text for text, _ in found)
            print(f"| {hidden} | {group} | {held} | {cells} | {max(e for _, e in found):.0e} |", flush=True)
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
