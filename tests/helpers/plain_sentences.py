"""English sentences with a simple grammar, for tasks that make items from prose."""

from __future__ import annotations

import random

# fmt: off
NOUNS = [
    "farmer", "teacher", "builder", "painter", "writer", "dancer", "doctor", "lawyer", "sailor", "hunter", "baker",
    "tailor", "garden", "window", "bridge", "castle", "forest", "harbor", "market", "temple", "valley", "village",
    "island", "desert", "meadow", "station", "kitchen", "cottage", "factory", "library",
]
VERBS = ["watched", "painted", "visited", "followed", "admired", "crossed", "entered", "avoided", "guarded", "repaired"]
ADJECTIVES = ["quiet", "narrow", "famous", "distant", "gentle", "modern", "ancient", "pleasant", "crowded", "ordinary"]
# fmt: on


def prose(sentences: int, seed: int = 0) -> str:
    """Paragraphs of five sentences, such as "The quiet farmer watched the old bridge near the famous castle."."""
    choose = random.Random(seed).choice
    lines = [
        f"The {choose(ADJECTIVES)} {choose(NOUNS)} {choose(VERBS)} the {choose(ADJECTIVES)} {choose(NOUNS)} "
        f"near the {choose(ADJECTIVES)} {choose(NOUNS)}."
        for _ in range(sentences)
    ]
    return "\n\n".join(" ".join(lines[start : start + 5]) for start in range(0, sentences, 5))
