"""What a folder that gyroquant wrote still is: its files, its arrays, the command that makes it again, its proof."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from gyroquant.calibration.measure import Want, measure
from gyroquant.calibration.text import load_text
from gyroquant.deploy import MANIFEST as EXPORT_MANIFEST
from gyroquant.environment import versions
from gyroquant.errors import GyroquantError, InputError, ProofError, RecipeError
from gyroquant.integrity import FILE, Integrity, check, unchecked
from gyroquant.job import Job, learning_setting, prepare
from gyroquant.learning import learn
from gyroquant.learning.live import learnable
from gyroquant.learning.rotations import FILE_NAME, load_rotations
from gyroquant.maps import Dense
from gyroquant.models.fold import FoldPlan
from gyroquant.models.prove import folded_outer, prove
from gyroquant.models.runner import BlockRunner, evaluating
from gyroquant.models.sites import site_key
from gyroquant.models.source import open_model
from gyroquant.pipeline import proof_sample
from gyroquant.planning import plan_folds
from gyroquant.progress import Stages
from gyroquant.recipe import load_recipe

MANIFEST = "gyroquant.json"
_NOISE = 1e-6  # relative logit errors below this are the rounding of fp32
_ROUNDING = 1e-2  # how far, relatively, a parameter may be from itself made on another machine and stored in 16 bits
_ALIKE = 5.0  # by which factor errors of the same proof differ between machines


def verify(
    out: str | Path,
    *,
    proof: bool = False,
    against: str | Path | None = None,
    text: str | Path | None = None,
    recipe_file: str | Path | None = None,
    progress: Stages | None = None,
) -> dict[str, Any]:
    """Checks a folder that gyroquant wrote, an export included: the sha256 of every file, every stored array, and says
    which command makes it again. `problems` says what is wrong and what to do; it is empty when nothing is.

    With `proof`, the equivalence proof is made again on the original, `against` (by default where it was), and the
    calibration text. `recipe_file` is written with the recipe as YAML, for the command. Raises InputError for a folder
    that gyroquant did not write, and for a model or text that is not there.
    """
    out, progress = Path(out), progress or Stages()
    manifest, exported = _manifest(out)
    problems: list[str] = []
    result: dict[str, Any] = {"folder": str(out), "files": None, "extra": [], "tensors": None, "proof": None}
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    with progress.stage("sha256", max(1, size >> 20)) as advance:
        found = check(out, advance)
    problems += _damage(out, found)
    if found is not None:
        result |= {"files": found.files, "bytes": found.bytes, "extra": list(found.extra)}
    if exported:
        arguments = ["gyroquant", "export", str(manifest["source"]), str(out), "--format", str(manifest["format"])]
        again = manifest.get("facts", {}).get("requantized")
        result["command"] = shlex.join([*arguments, *(["--requantize", again] if again else [])])
    else:
        with unchecked():
            result["tensors"], wrong = _arrays(out, progress)
            problems += wrong
            result["command"] = _command(out, manifest, recipe_file)
    if proof and exported:
        raise InputError(
            f"{out} is an export: `gyroquant verify-export` runs it, and --proof is for {manifest['source']}"
        )
    if proof:
        result["proof"] = _proved_again(out, manifest, against, text, progress)
        problems += result["proof"].pop("problems")
    now = versions()
    result["versions"] = {
        name: [was, now.get(name)] for name, was in manifest.get("versions", {}).items() if was != now.get(name)
    }
    return result | {"problems": problems, "passed": not problems}


def _manifest(out: Path) -> tuple[dict[str, Any], bool]:
    """What a folder's manifest says, and whether it is that of an export."""
    for name in (MANIFEST, EXPORT_MANIFEST):
        path = out / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                needed = ("source", "format") if name == EXPORT_MANIFEST else ("model", "recipe", "proof")
                if all(key in found for key in needed):
                    return _as_it_ran(found), name == EXPORT_MANIFEST
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{path} is damaged: {error}. Copy or make the folder again") from error
            raise InputError(f"{path} is no manifest that gyroquant wrote, or is damaged")
    raise InputError(f"{out} is not a folder that gyroquant wrote: it has neither {MANIFEST} nor {EXPORT_MANIFEST}")


def _as_it_ran(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest that says of its recipe what went without saying when it was written: windows began without BOS."""
    calibration = manifest.get("recipe", {}).get("calibration")
    if isinstance(calibration, dict):
        calibration.setdefault("add_bos", False)
    return manifest


def _damage(out: Path, found: Integrity | None) -> list[str]:
    if found is None:
        return [f"{out} has no {FILE}, so nothing is known of its files: it is older than checksums, or lost them"]
    remedy = "copy it again, or make the folder again"
    lines = [f"{name} is missing: {remedy}" for name in found.missing]
    lines += [f"{name}, or its line in {FILE}, is damaged (its sha256 is another): {remedy}" for name in found.changed]
    return lines + [f"{name} is not in {FILE}: take it out, or {remedy}" for name in found.unlisted]


def _arrays(out: Path, progress: Stages) -> tuple[int, list[str]]:
    """How many parameters could be decoded, one at a time in memory, and what is wrong with the others."""
    failures = (GyroquantError, SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError)
    try:
        store = open_model(out)
    except failures as error:
        return 0, [f"the weights cannot be opened: {error}"]
    good, problems = 0, []
    with progress.stage("decode", len(store.shapes)) as advance:
        for name in store.shapes:
            try:
                store.read([name])
                good += 1
            except failures as error:
                problems.append(f"{name} cannot be decoded: {error}")
            advance()
    try:
        _ = store.online
    except failures as error:
        problems.append(f"what runs with the model cannot be read: {error}")
    return good, problems


def _command(out: Path, manifest: Mapping[str, Any], recipe_file: str | Path | None) -> str:
    """The command that makes a folder again, from its manifest; the text is named as its file was."""
    if recipe_file is not None:
        Path(recipe_file).write_text(yaml.safe_dump(manifest["recipe"], sort_keys=False), encoding="utf-8")
    arguments = ["gyroquant", "quantize", str(manifest["model"]), str(out)]
    changes = None if recipe_file is not None else _changes(manifest["recipe"])
    if changes is None:
        arguments += ["--recipe", str(recipe_file or "RECIPE.yaml")]
    else:
        arguments += ["--recipe", str(manifest["recipe"]["name"]).partition(" (")[0]]
        arguments += [part for change in changes for part in ("--set", change)]
    if manifest["text"] is not None:
        arguments += ["--text", manifest["text"]["name"]]
    config = json.loads((out / "config.json").read_text(encoding="utf-8")) if (out / "config.json").is_file() else {}
    arguments += [] if "quantization_config" in config else ["--dense"]
    return shlex.join([*arguments, "--save-dtype", str(config.get("dtype", "auto"))])


def _changes(recipe: Mapping[str, Any]) -> list[str] | None:
    """The ``KEY=VALUE`` that make a recipe from the preset of its name; None where they do not."""
    name = str(recipe.get("name", ""))
    try:
        start = load_recipe(name.partition(" (")[0])
        changes = [] if start.name == name else [f"name={json.dumps(name)}"]
        changes += [change for change in _differences(start.to_dict(), recipe) if not change.startswith("name=")]
        made = load_recipe(name.partition(" (")[0], changes)
    except RecipeError:
        return None
    return changes if made.to_dict() == recipe else None


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], place: str = "") -> list[str]:
    found: list[str] = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{place}{key}.")
        elif old != new:
            found.append(f"{place}{key}={json.dumps(new)}")
    return found


def _proved_again(
    out: Path, manifest: Mapping[str, Any], against: str | Path | None, text: str | Path | None, progress: Stages
) -> dict[str, Any]:
    """The proof of the recipe on the original and the text, beside the one that is recorded."""
    recorded = dict(manifest["proof"])
    if recorded["tokens"] == 0:
        return {"recorded": 0.0, "again": 0.0, "note": "nothing was folded: there is nothing to prove", "problems": []}
    recipe = load_recipe(manifest["recipe"])
    dtype = manifest.get("calibration_dtype")
    if dtype is not None:
        recipe = load_recipe(recipe, [f"calibration.dtype={dtype}"])
    with TemporaryDirectory() as scratch:
        old = "bos" not in (manifest["text"] or {})  # of a run that read every file as prose
        words = load_text(_text(manifest, text), prose=old)
        job = prepare(_original(manifest, against), Path(scratch) / "out", recipe, words)
        problems = _other_text(job, manifest)
        with evaluating(job.store.skeleton()):
            plan, source = _planned_again(job, out, progress)
            found, wrong = _proved(job, plan, progress)
            problems += _other_weights(out, job, plan)
    return {"recorded": recorded["relative_logit_error"], "again": found, "maps": source, "model": job.store.label} | {
        "threshold": recorded["threshold"],
        "problems": [*problems, *(wrong or _disagreement(recorded["relative_logit_error"], found))],
    }


def _original(manifest: Mapping[str, Any], against: str | Path | None) -> str | Path:
    if against is not None:
        return against
    label = str(manifest["model"])
    if not Path(label).exists():
        raise InputError(f"the proof needs the original, which is not at {label!r} any more: give --against MODEL")
    return label


def _text(manifest: Mapping[str, Any], text: str | Path | None) -> str | Path:
    """The calibration text: as given, else as the recipe names it."""
    if text is not None:
        return text
    named = manifest["recipe"]["calibration"]["text"]
    if named is None or not (Path(named).exists() or ":" in named or "." not in Path(named).name):
        was = manifest["text"] or {"name": "a text", "sha256": "unknown"}
        raise InputError(
            f"the proof needs the text of the run, {was['name']} (sha256 {was['sha256'][:12]}): give --text FILE"
        )
    return str(named)


def _other_text(job: Job, manifest: Mapping[str, Any]) -> list[str]:
    was = manifest["text"]
    if was is None or job.text is None or job.text.sha256 == was["sha256"]:
        return []
    return [
        f"the text {job.text.name} (sha256 {job.text.sha256[:12]}) is not the one of the run, {was['name']} "
        f"({was['sha256'][:12]}), so the proofs cannot be compared: give that one with --text"
    ]


def _planned_again(job: Job, out: Path, progress: Stages) -> tuple[FoldPlan, str]:
    """The recipe's maps on the original, and where they come from: chosen anew, or those learned in the run."""
    recipe, dtype = job.recipe, job.compute_dtype
    plan, source = job.plan, "chosen from the recipe again"
    if job.measures:
        assert job.tokens is not None
        tokens, source = job.tokens, "measured again"

        def look(so_far: FoldPlan, wants: list[Want]) -> None:
            measure(job.store, so_far, wants, tokens, progress, dtype, job.output.device)

        plan = plan_folds(job.graph, recipe, look)
    if recipe.learn is None:
        return plan, source
    labels = learnable(plan, recipe.learn.sites)
    rotations = load_rotations(out) if (out / FILE_NAME).exists() else {}
    keys = {site_key(plan.folded[place.index][0]) for place in labels.values()}
    if keys <= rotations.keys():
        return _with_rotations(plan, rotations), f"{source}, learned ones from {FILE_NAME}"
    setting = learning_setting(recipe, job.tokens, job.targets, job.quantizers, dtype)
    return learn(job.store, plan, recipe.learn, setting, progress).plan, "learned again"


def _with_rotations(plan: FoldPlan, rotations: Mapping[str, torch.Tensor]) -> FoldPlan:
    """A plan with the rotation of a file in the place of everything that is fused at its site."""
    changed, done = FoldPlan(plan.graph), set[str]()
    for site, m, online in plan.folded:
        key = site_key(site) if site.name in ("R1", "R2") and not online else ""
        if key not in rotations:
            changed.add(site, m, online)
        elif key not in done:
            changed.add(site, Dense(rotations[key]), online)
            done.add(key)
    return changed


def _proved(job: Job, plan: FoldPlan, progress: Stages) -> tuple[float | None, list[str]]:
    runner, blocks = BlockRunner(job.store.skeleton(), plan.graph), len(plan.graph.blocks)
    try:
        with progress.stage("prove", blocks) as advance:
            threshold = job.recipe.proof.threshold
            found = prove(job.store, plan, runner, proof_sample(job), threshold, lambda done, total: advance())
    except ProofError as error:
        return None, [f"the proof does not hold: {error}"]
    return found.relative_logit_error, []


def _other_weights(out: Path, job: Job, plan: FoldPlan) -> list[str]:
    """The tables of vectors around the blocks that are not what these maps make of the original: they are stored
    unrounded, and nothing tunes them.
    """
    with unchecked():
        store = open_model(out)
    wrong = []
    for name, folded in folded_outer(plan, job.store.read(plan.graph.outer_params())).items():
        if name in store.shapes and folded.dim() == 2 and name not in job.targets:
            found = store.read([name])[name]
            away = float((found.float() - folded.to(found.dtype).float()).norm() / folded.norm())
            if not away <= _ROUNDING:
                wrong.append(f"{name} is not what the recipe makes of {job.store.label}: {away:.1e} away from it")
    return wrong


def _disagreement(recorded: float, found: float | None) -> list[str]:
    """Why two errors cannot be of the same proof: noise of the machine is left out."""
    assert found is not None
    low, high = sorted((max(recorded, _NOISE), max(found, _NOISE)))
    if high <= _ALIKE * low:
        return []
    return [
        f"the proof gives a relative logit error of {found:.1e}, and {recorded:.1e} is recorded: this is another "
        "model, text or version than that of the run"
    ]


__all__ = ["verify"]
