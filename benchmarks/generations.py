"""What a rounded model writes beside its original, for five prompts, unedited, as Markdown.

    python benchmarks/generations.py ORIGINAL OUT [OUT ...] [--tokens 60]

Greedy, in bfloat16, with the model's chat template where it has one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

import gyroquant as gq

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "Give me three tips for learning a language.",
    "What happened in the French Revolution?",
)


def answers(folder: Path, tokens: int) -> list[str]:
    """What a model says to each prompt."""
    model, words = gq.load(folder, dtype="bfloat16"), AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        if words.chat_template:
            chat = [{"role": "user", "content": prompt}]
            ids = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        else:
            ids = words(prompt, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        found.append(words.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=60)
    given = parser.parse_args()
    said = {folder.name: answers(folder, given.tokens) for folder in given.models}
    for number, prompt in enumerate(PROMPTS):
        print(f"**{prompt}**\n")
        for name, found in said.items():
            print(f"{name}:\n")
            print("\n".join(f"> {line}".rstrip() for line in found[number].splitlines() or [""]) + "\n")


if __name__ == "__main__":
    main()
