"""How each entry of a derived description is known, in plain sentences: `Architecture.facts`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from gyroquant.models.graph.spec import Architecture, Entry, Linear

KEPT = "kept: it meets no basis that changes"


def told(entries: Iterable[Entry], said: Iterable[tuple[Entry, str]]) -> dict[str, str]:
    """How each entry is known, by name. Where blocks contradict each other: what each of them showed."""
    found: dict[str, dict[Entry, str]] = defaultdict(dict)
    for entry, fact in said:
        found[entry.name].setdefault(entry, fact)
    facts = {}
    for entry in entries:
        seen = found.get(entry.name) or found.get(entry.name.removesuffix(".weight"), {})
        contrary = f"the blocks contradict each other ({' | '.join(dict.fromkeys(seen.values()))})"
        facts[entry.name] = seen.get(entry, contrary if seen else KEPT)
        if isinstance(entry, Linear) and not entry.quantize:
            facts[entry.name] += "; never rounded"
    return facts


def joined(facts: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """The facts of both. What both have to say about a name is in one sentence."""
    return {**facts, **{name: f"{facts[name]}; {text}" if name in facts else text for name, text in more.items()}}


def corrected(old: Architecture, new: Architecture, why: str) -> Architecture:
    """`new`, with a fact about each entry that differs from that of `old`. `why`: why that guess was withdrawn."""
    facts = dict(new.facts)
    for before, after in ((old.block, new.block), (old.outer, new.outer)):
        entries = {entry.name: entry for entry in after if not isinstance(entry, tuple)}
        for entry in before:
            if not isinstance(entry, tuple) and entries.get(entry.name) != entry:
                change = _changes(entry, entries.get(entry.name))
                facts = joined(facts, {entry.name: f"withdrawn: it {change}, because {why}"})
    return replace(new, facts=facts)


def _changes(old: Entry, new: Entry | None) -> str:
    if new is None:
        return "is left out"
    changes = []
    for field in fields(new):
        name, value, before = field.name, getattr(new, field.name), getattr(old, field.name, "")
        if value != before:
            verb = name if name in ("reads", "writes") else f"has {name}"
            changes.append(f"{verb} {listed(value)} in place of {listed(before)}")
    return " and ".join(changes)


def listed(value: Any) -> str:
    """A basis, or several, as text."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
