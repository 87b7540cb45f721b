"""Our recipes, as they are, on another architecture: a Qwen3 trained here for some minutes, its tokenizer its own.

    python benchmarks/second_model.py --text FILE --validation FILE --out FOLDER [--minutes 10] [--recipes NAME ...]

Trains on `--text` unless FOLDER/model is there, then runs each recipe on the same text and measures perplexity on the
validation text (32 windows of 256). What was measured stands in FOLDER/results.json and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

import gyroquant as gq
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare

LENGTH, BATCH, RATE = 256, 8, 2e-3
CONFIG = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64, "vocab_size": 4096}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
RECIPES = ("rtn-w2", "gptq-w2", "signround-w2", "gsr-w2", "quarot-w2", "bbt-spectral", "gyro-w2")


def tokenizer(text: Path) -> PreTrainedTokenizerFast:
    """Byte pairs, learned on the text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train(
        [str(text)],
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"], initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def train(text: Path, folder: Path, minutes: float) -> None:
    """Trains for so long, by AdamW with a learning rate that rises for a twentieth and falls to nothing."""
    words = tokenizer(text)
    ids = torch.tensor(words(text.read_text(), verbose=False)["input_ids"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**CONFIG, pad_token_id=0, eos_token_id=0, bos_token_id=0))
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    started, seen = time.perf_counter(), 0
    with tqdm(total=round(minutes * 60), unit="s", desc="train") as bar:
        while (done := (time.perf_counter() - started) / 60 / minutes) < 1:
            starts = torch.randint(len(ids) - LENGTH, (BATCH,))
            batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
            for group in adam.param_groups:
                group["lr"] = RATE * min(1.0, done * 20) * (1 + math.cos(math.pi * done)) / 2
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            seen += batch.numel()
            bar.n = min(round(done * minutes * 60), bar.total)
            bar.set_postfix(loss=f"{loss.item():.2f}", tokens=seen)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def measured(out: Path, text: Path, validation: Path, recipe: str | None) -> dict[str, Any]:
    """Perplexity, true bits and minutes of a recipe on the model in the folder; None is the model as it is."""
    model = out / "model"
    if recipe is None:
        return {"perplexity": gq.evaluate(model, validation, window=LENGTH, windows=32)["perplexity"], "bits": 32}
    folder = out / recipe
    manifest = pipeline.run(prepare(model, folder, gq.load_recipe(recipe), text, overwrite=True))
    scores = gq.evaluate(folder, validation, against=model, window=LENGTH, windows=32)
    found = {key: scores[key] for key in ("perplexity", "perplexity_interval", "kl")}
    return found | {
        "bits": manifest["bits"]["per_weight"],
        "seconds": manifest["seconds"],
        "proof": manifest["proof"]["relative_logit_error"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--text", "--validation", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "model" / "config.json").exists():
        train(given.text, given.out / "model", given.minutes)
    path = given.out / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    print("| | proof | perplexity | 95 % | ln gap | true bits | minutes |\n|---|--:|--:|--:|--:|--:|--:|")
    for recipe in (None, *given.recipes):
        name = recipe or "original"
        if name not in found:
            found[name] = measured(given.out, given.text, given.validation, recipe)
            path.write_text(json.dumps(found, indent=1) + "\n")
        one = found[name]
        if recipe is None:
            print(f"| original | - | {one['perplexity']:.2f} | - | 0 | {one['bits']} | - |")
            continue
        low, high = one["perplexity_interval"]
        gap = math.log(one["perplexity"] / found["original"]["perplexity"])
        print(
            f"| {name} | {one['proof']:.1e} | {one['perplexity']:.2f} | {low:.2f} to {high:.2f} | {gap:.3f} "
            f"| {one['bits']:.3f} | {one['seconds'] / 60:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
