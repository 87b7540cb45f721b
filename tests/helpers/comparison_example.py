"""A comparison as `gyroquant compare` writes it, made up: three budgets, seeds, external tools, failures, layers."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

BLOCKS, HIDDEN = 6, 128
MODULES = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
ORIGINAL = {"wikitext-2": 17.6, "c4": 24.9}
WEIGHTS = {"layers": 106_168_320, "table": 28_311_552, "rest": 35_136}
TABLE_BITS = {"gyro": 5.3, "llama.cpp: K-quants": 6.6}  # 16 for the others
UNTIED = ("quarot", "gsr", "perq")  # R1 makes the head a matrix of its own
# name, kind, gap in nats at 2, 3 and 4 bits, true bits above the budget, seeds, minutes, how flat activations become
METHODS: list[tuple[str, str, tuple[float, float, float], float, int, float, float]] = [
    ("rtn", "recipe", (6.3, 0.92, 0.110), 0.28, 1, 0.4, 0.0),
    ("gptq", "recipe", (1.52, 0.181, 0.046), 0.28, 1, 4.1, 0.0),
    ("quarot", "recipe", (1.02, 0.158, 0.041), 0.28, 3, 5.0, 0.8),
    ("gsr", "recipe", (0.83, 0.149, 0.039), 0.28, 3, 5.1, 0.85),
    ("perq", "recipe", (0.79, 0.143, 0.037), 0.281, 1, 9.8, 0.9),
    ("gyro", "recipe", (0.36, 0.088, 0.028), 0.29, 5, 31.0, 0.95),
    ("llama.cpp: K-quants", "opponent", (0.74, 0.120, 0.026), 0.62, 1, 1.2, 0.0),
    ("auto-round: default", "opponent", (0.71, 0.128, 0.034), 0.31, 1, 42.0, 0.0),
    ("GPTQModel: default", "opponent", (1.44, 0.176, 0.045), 0.27, 1, 5.5, 0.0),
    ("AutoAWQ: default", "opponent", (4.9, 0.31, 0.061), 0.28, 1, 7.0, 0.0),
]


def example() -> dict[str, Any]:
    """A fresh copy, the same numbers every time."""
    chance = random.Random(0)
    cells = [cell for bits in (2, 3, 4) for method in METHODS for cell in _cells(chance, bits, *method)]
    return {
        "format": 1,
        "name": "SmolLM2-135M-Instruct",
        "made": "2026-11-23",
        "command": "gyroquant compare SmolLM2-135M-Instruct out/ --bits 2,3,4 --external-tools all --seeds 0,1,2",
        "model": {
            "label": "SmolLM2-135M-Instruct",
            "sha256": _sha("model"),
            "model_type": "llama",
            "blocks": BLOCKS,
            "hidden": HIDDEN,
            "weights": WEIGHTS["layers"],
            "all_weights": sum(WEIGHTS.values()),
        },
        "texts": {
            "calibration": {"name": "enwiki, calibration", "sha256": _sha("calibration")},
            "tests": {
                name: {
                    "name": name,
                    "sha256": _sha(name),
                    "preset": name,
                    "windows": 60,
                    "window": 512,
                    "tokens": 30660,
                }
                for name in ORIGINAL
            },
        },
        "settings": {
            "bits": [2, 3, 4],
            "group_sizes": [64],
            "seeds": [0, 1, 2],
            "symmetric": False,
            "nsamples": 64,
            "seqlen": 512,
            "dtype": "float32",
        },
        "versions": {"gyroquant": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "notes": ["The weights of this model lie on a 4-bit grid already: at 4 bits, differences say little."],
        "original": {
            "tests": {name: _evaluation(chance, value, None) for name, value in ORIGINAL.items()},
            "outliers": _outliers(chance, 0.0),
        },
        "cells": cells,
        "verdict": [_budget(cells, bits, test) for test in ORIGINAL for bits in (2, 3, 4)],
    }


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _cells(
    chance: random.Random,
    bits: int,
    name: str,
    kind: str,
    gaps: tuple[float, float, float],
    above: float,
    seeds: int,
    minutes: float,
    flat: float,
) -> list[dict[str, Any]]:
    if name == "gyro":
        name = f"gyro-w{bits}"
    made = []
    for seed in range(seeds):
        label = name if kind == "opponent" else f"{name.partition('-w')[0]} W{bits} g64"
        cell = {
            "key": _sha(f"{name}{bits}{seed}")[:12],
            "kind": kind,
            "name": name,
            "label": f"{label} W{bits}" if kind == "opponent" else label,
            "bits": bits,
            "group_size": 64,
            "symmetric": False,
            "seed": seed,
            "command": f"gyroquant quantize SmolLM2-135M-Instruct out --recipe {name} --set seed={seed}",
            "status": "done",
            "reason": None,
            "rotated": kind == "recipe" and not name.startswith(("rtn", "gptq")),
            "nsamples": 128 if name.startswith("gyro") else 64,
        }
        if kind == "opponent":
            program = name.partition(":")[0]
            cell |= {"command": f"gyroquant compare SmolLM2-135M-Instruct OUT --external-tools '{name}' --bits {bits}"}
            cell |= {"home": f"somebody/{program}"}
        if name.startswith("AutoAWQ") and bits != 4:
            cell |= {"status": "refused", "reason": f"its kernels hold 4 bits only, not {bits}"}
        elif name.startswith("GPTQModel") and bits == 3:
            cell |= {"status": "failed", "reason": "gptqmodel.py was killed by SIGKILL; its last line: layer 4 of 30"}
        elif name.startswith("auto-round") and bits == 4:
            cell |= {"status": "missing", "reason": "not run yet"}
        else:
            gap = gaps[bits - 2] * (1 + chance.gauss(0, 0.04))
            cell |= _done(chance, bits, kind, gap, bits + above, minutes, flat)
            cell |= _sizes(name.partition("-w")[0], bits + above)
        made.append(cell)
    return made


def _done(
    chance: random.Random, bits: int, kind: str, gap: float, true_bits: float, minutes: float, flat: float
) -> dict[str, Any]:
    recipe = kind == "recipe"
    return {
        "true_bits": true_bits,
        "proof_error": chance.uniform(1e-6, 3e-6) if flat else 0.0 if recipe else None,
        "forward_equivalents": minutes * 4.2 if recipe else None,
        "measured": {"seconds": minutes * 60, "peak_memory_bytes": int(chance.uniform(1.1e9, 2.4e9))},
        "tests": {
            "wikitext-2": _evaluation(chance, ORIGINAL["wikitext-2"] * math.exp(gap), gap),
            "c4": _evaluation(chance, ORIGINAL["c4"] * math.exp(0.9 * gap), 0.9 * gap),
        },
        "tasks": None,
        "layers": _layers(chance, bits, gap) if recipe else [],
        "outliers": _outliers(chance, flat) if recipe else [],
        "versions": {"torch": "2.13.0"},
    }


def _sizes(name: str, true_bits: float) -> dict[str, Any]:
    table = int(WEIGHTS["table"] * TABLE_BITS.get(name, 16) / 8)
    parts = {"layers": int(WEIGHTS["layers"] * true_bits / 8), "embeddings": table, "head": table * (name in UNTIED)}
    parts["rest"] = 2 * WEIGHTS["rest"]
    total = sum(parts.values())
    whole = 8 * total / sum(WEIGHTS.values())
    return {"weight_bytes": parts | {"total": total}, "whole_model_bits": whole, "bytes": total + 3_600_000}


def of_last_release() -> dict[str, Any]:
    """The example as the last release writes it: without bytes of weights, and judged by true bits."""
    comparison = example()
    del comparison["model"]["all_weights"]
    for run in comparison["cells"]:
        run.pop("weight_bytes", None)
        run.pop("whole_model_bits", None)
    by_key = {run["key"]: run for run in comparison["cells"]}
    for budget in comparison["verdict"]:
        del budget["unit"]
        budget["limit"] = budget["bits"] + 0.38
        budget["over"] = [row["key"] for row in budget["rows"] if by_key[row["key"]]["true_bits"] > budget["limit"]]
        for row in budget["rows"]:
            del row["dominated_by"]
    return comparison


SIZES = {2: 50_000_000, 3: 66_000_000, 4: 82_000_000}


def of_sizes() -> dict[str, Any]:
    """The example at equal bytes, with tokens a second of our own results."""
    comparison = example()
    comparison["settings"] |= {"bits": [], "sizes": list(SIZES.values())}
    for run in comparison["cells"]:
        run |= {"max_bytes": SIZES[run["bits"]], "label": run["label"].partition(" W")[0]}
        if run["kind"] == "recipe" and run["status"] == "done":
            rates = {"decode_tokens_per_second": 7.5, "original_decode_tokens_per_second": 10.0}
            run["speed"] = {"runtime": "transformers, fp32", "online_maps": 30 * run["rotated"], **rates}
    for budget in comparison["verdict"]:
        budget |= {"max_bytes": SIZES[budget["bits"]], "bits": None}
    return comparison


def _evaluation(chance: random.Random, perplexity: float, gap: float | None) -> dict[str, Any]:
    spread = 0.025
    found: dict[str, Any] = {
        "perplexity": perplexity,
        "perplexity_interval": [perplexity * math.exp(-spread), perplexity * math.exp(spread)],
        "loss": math.log(perplexity),
        "kl": None,
        "kl_interval": None,
        "top1_agreement": None,
        "top1_interval": None,
        "window_losses": [chance.gauss(math.log(perplexity), 0.3) for _ in range(60)],
        "window_kl": None,
    }
    if gap is not None:
        kl, alike = 0.9 * gap + 0.004, 1 / (1 + 1.1 * math.sqrt(gap))
        found |= {"kl": kl, "kl_interval": [0.96 * kl, 1.04 * kl]}
        found |= {"top1_agreement": alike, "top1_interval": [alike - 0.006, alike + 0.006]}
    return found


def _layers(chance: random.Random, bits: int, gap: float) -> list[dict[str, Any]]:
    scale = min(0.6, 0.35 * gap**0.8)
    return [
        {
            "name": f"model.layers.{block}.{module}",
            "block": block,
            "module": module,
            "output_error": min(
                0.9, scale * (0.5 + block / BLOCKS) * (2.0 if "v_proj" in module else 1.0) * chance.uniform(0.7, 1.4)
            ),
            "weight_error": 0.1 / 4 ** (bits - 2) * chance.uniform(0.9, 1.1),
            "decibels": 1.5 + 6 * gap**0.5 * chance.uniform(0.7, 1.3),
        }
        for block in range(BLOCKS)
        for module in MODULES
    ]


def _outliers(chance: random.Random, flat: float) -> list[dict[str, Any]]:
    found = []
    for site, peak in (("R1", 25.0), ("R2", 9.0), ("R4", 42.0), ("attn_in", 18.0), ("mlp_in", 16.0)):
        for block in range(BLOCKS):
            ratio = 4.2 + (peak - 4.2) * (1 - flat) * chance.uniform(0.6, 1.5)
            mass = {}
            for b in (16, 32, 64, 128):
                bound = 2.9 + 1.4 * math.sqrt(128 / b) * (1.2 - flat)
                mass[str(b)] = [bound * chance.uniform(0.95, 1.05), bound * chance.uniform(0.5, 0.75)]
            found.append(
                {
                    "site": site,
                    "block": block,
                    "kurtosis": 3 + (ratio - 4) ** 2 * chance.uniform(0.5, 1.0),
                    "max_over_rms": ratio,
                    "rms": chance.uniform(0.3, 2.0),
                    "mass": mass if site == "R4" else {},
                }
            )
    return found


def _budget(cells: list[dict[str, Any]], bits: int, test: str) -> dict[str, Any]:
    done = [cell for cell in cells if cell["bits"] == bits and cell["status"] == "done" and cell["seed"] == 0]
    gap = {cell["key"]: math.log(cell["tests"][test]["perplexity"] / ORIGINAL[test]) for cell in done}
    label = {cell["key"]: cell["label"] for cell in done}
    size = {cell["key"]: cell["weight_bytes"]["total"] for cell in done}
    limit = 1.02 * max(size[cell["key"]] for cell in done if cell["kind"] == "recipe" and not cell["rotated"])
    over = [key for key in gap if size[key] > limit]
    best = min((key for key in gap if key not in over), key=gap.__getitem__)
    baseline = next(cell["key"] for cell in done if cell["name"] == "gptq")
    front = [
        cell["key"]
        for cell in done
        if not any(size[other] <= size[cell["key"]] and gap[other] < gap[cell["key"]] for other in gap)
    ]
    chosen = next(cell for cell in done if cell["name"] == f"gyro-w{bits}")
    text = (
        f"Use {label[chosen['key']]}: its perplexity is {100 * (math.exp(gap[chosen['key']]) - 1):.1f} % above the "
        f"original's, that of unrotated GPTQ {100 * (math.exp(gap[baseline]) - 1):.1f} %."
    )
    if bits == 4:
        text = "Do not rotate for this: nothing of as many bits is better than unrotated GPTQ beyond chance."
    return {
        "bits": bits,
        "test": test,
        "limit": limit,
        "unit": "weight_bytes",
        "over": over,
        "baseline": baseline,
        "best": best,
        "recommended": None if bits == 4 else chosen["key"],
        "command": None if bits == 4 else chosen["command"],
        "home": None,
        "front": front,
        "rows": [_row(cells, cell, gap, best, baseline, test) for cell in done],
        "text": text,
    }


def _row(
    cells: list[dict[str, Any]], cell: dict[str, Any], gap: dict[str, float], best: str, baseline: str, test: str
) -> dict[str, Any]:
    mine = gap[cell["key"]]
    seeds = [
        one["tests"][test]["perplexity"] for one in cells if one["label"] == cell["label"] and one["status"] == "done"
    ]

    def against(other: str) -> dict[str, Any]:
        difference = mine - gap[other]
        p = math.exp(-60 * abs(difference))
        return {
            "difference": difference,
            "interval": [difference - 0.02, difference + 0.02],
            "p": p,
            "significant": p < 0.05,
        }

    return {
        "key": cell["key"],
        "gap": mine,
        "gap_interval": [mine * 0.94 - 0.004, mine * 1.06 + 0.004],
        "against_best": against(best),
        "against_baseline": against(baseline),
        "spread": [min(seeds), max(seeds)] if len(seeds) > 1 else None,
        "dominated_by": None if cell["name"].startswith("gyro") or "llama" in cell["name"] else best,
    }


# Text that is markup to a page, to Markdown and to a template.
EVIL = "<script>alert('x')</script> | </td> \u2028 {{ 7*7 }}"


def hostile() -> dict[str, Any]:
    """A comparison whose every text is `EVIL`."""
    comparison = example()
    comparison["name"] = comparison["model"]["label"] = comparison["command"] = EVIL
    comparison["notes"] = [EVIL]
    comparison["versions"] = {EVIL: EVIL}
    for run in comparison["cells"]:
        run |= {"label": EVIL, "reason": EVIL, "command": EVIL}
        if run["kind"] == "opponent":
            run["name"] = EVIL
        for layer in run.get("layers") or ():
            layer["module"] = EVIL
        if run["status"] == "done":
            run["tasks"] = {EVIL: {"acc": 0.5, "stderr": 0.01}}
    for budget in comparison["verdict"]:
        budget |= {"text": EVIL, "command": EVIL}
    return comparison
