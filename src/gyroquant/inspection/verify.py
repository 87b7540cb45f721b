"""Verifies a folder that gyroquant wrote: its files, its arrays and its proof. Returns the command that made it."""

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

from gyroquant.calibration.measure import SiteMeasurement, measure
from gyroquant.calibration.text import load_text
from gyroquant.errors import GyroquantError, InputError, ProofError, RecipeError
from gyroquant.finetuning import learn
from gyroquant.finetuning.differentiable_fold import learnable
from gyroquant.finetuning.rotations_file import FILE_NAME, load_rotations
from gyroquant.formats.export import MANIFEST as EXPORT_MANIFEST
from gyroquant.maps import Dense
from gyroquant.models.execution.runner import BlockRunner, evaluating
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.prove import prove
from gyroquant.models.graph.sites import site_key
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.folds import plan_folds
from gyroquant.pipeline.job import Job, prepare
from gyroquant.pipeline.planning import learning_setting
from gyroquant.pipeline.stages.windows import Windows, made_windows
from gyroquant.recipes.compat import current_manifest
from gyroquant.recipes.schema import load_recipe
from gyroquant.system.checksums import CHECKSUM_FILE, Integrity, check, unchecked
from gyroquant.system.environment import versions
from gyroquant.system.progress import Progress

MANIFEST = "gyroquant.json"
_NOISE = 1e-6  # relative logit errors below this are fp32 rounding
_ROUNDING = 1e-2  # largest relative difference of a parameter folded on another machine and stored in 16 bits
_ALIKE = 5.0  # largest factor between errors of the same proof on different machines


def verify(
    out: str | Path,
    *,
    proof: bool = False,
    against: str | Path | None = None,
    text: str | Path | None = None,
    recipe_file: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Checks a folder that gyroquant wrote, which may be an export: the sha256 of every file, and every stored array.

    The result also holds the `command` that makes the folder again. `problems` lists what is wrong and what to do; it
    is empty if nothing is wrong.

    - `proof`: also makes the proof again, on the original model and the calibration text.
    - `against`: the original model. Default: the path in the manifest.
    - `text`: the calibration text. Default: the text in the manifest.
    - `recipe_file`: a file to write the recipe to, as YAML; the command then uses it.

    Raises InputError if gyroquant did not write the folder, or if the model or the text does not exist.
    """
    out, progress = Path(out), progress or Progress()
    manifest, exported = _manifest(out)
    problems: list[str] = []
    result: dict[str, Any] = {"folder": str(out), "files": None, "extra": [], "tensors": None, "proof": None}
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    with progress.stage("sha256", max(1, size >> 20)) as advance:
        integrity = check(out, advance)
    problems += _damage(out, integrity)
    if integrity is not None:
        result |= {"files": integrity.files, "bytes": integrity.bytes, "extra": list(integrity.extra)}
    if exported:
        arguments = ["gyroquant", "export", str(manifest["source"]), str(out), "--format", str(manifest["format"])]
        again = manifest.get("facts", {}).get("requantized")
        result["command"] = shlex.join([*arguments, *(["--requantize", again] if again else [])])
    else:
        result["command"] = _command(out, manifest, recipe_file)
    if (out / MANIFEST).is_file():  # an archive has it too
        with unchecked():
            result["tensors"], wrong = _arrays(out, progress)
            problems += wrong
    if proof and exported:
        raise InputError(
            f"{out} is an export: `gyroquant verify-export` runs it, and --proof is for {manifest['source']}"
        )
    if proof:
        result["proof"] = _repeat_proof(out, manifest, against, text, progress)
        problems += result["proof"].pop("problems")
    now = versions()
    result["versions"] = {
        name: [was, now.get(name)] for name, was in manifest.get("versions", {}).items() if was != now.get(name)
    }
    return result | {"problems": problems, "passed": not problems}


def _manifest(out: Path) -> tuple[dict[str, Any], bool]:
    """The manifest of a folder, and whether the folder is an export."""
    for name in (EXPORT_MANIFEST, MANIFEST):
        path = out / name
        if path.is_file():
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
                needed = ("source", "format") if name == EXPORT_MANIFEST else ("model", "recipe", "proof")
                if all(key in manifest for key in needed):
                    return _with_old_defaults(manifest), name == EXPORT_MANIFEST
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{path} is damaged: {error}. Copy or make the folder again") from error
            raise InputError(f"{path} is not a manifest of gyroquant, or it is damaged. Copy or make the folder again")
    raise InputError(f"{out} is not a folder that gyroquant wrote: it has neither {MANIFEST} nor {EXPORT_MANIFEST}")


def _with_old_defaults(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest under today's names. If its recipe lacks `add_bos`, it is set to false, the old default."""
    manifest = current_manifest(manifest)
    calibration = manifest.get("recipe", {}).get("calibration")
    if isinstance(calibration, dict):
        calibration.setdefault("add_bos", False)
    return manifest


def _damage(out: Path, integrity: Integrity | None) -> list[str]:
    if integrity is None:
        return [
            f"{out} has no {CHECKSUM_FILE}, so its files cannot be checked: it was made before checksums, or lost them"
        ]
    remedy = "copy it again, or make the folder again"
    lines = [f"{name} is missing: {remedy}" for name in integrity.missing]
    lines += [
        f"{name}, or its line in {CHECKSUM_FILE}, is damaged (its sha256 differs): {remedy}"
        for name in integrity.changed
    ]
    return lines + [f"{name} is not in {CHECKSUM_FILE}: remove it, or {remedy}" for name in integrity.unlisted]


def _arrays(out: Path, progress: Progress) -> tuple[int, list[str]]:
    """The number of parameters that could be decoded, and problems of the others. Memory holds one at a time."""
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
        problems.append(f"the online operations of the model cannot be read: {error}")
    return good, problems


def _command(out: Path, manifest: Mapping[str, Any], recipe_file: str | Path | None) -> str:
    """The command that makes a folder again, from its manifest. The text has the name of its file."""
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
    """The ``KEY=VALUE`` changes that make a recipe from the preset of its name; None if there are no such changes."""
    name = str(recipe.get("name", ""))
    try:
        start = load_recipe(name.partition(" (")[0])
        changes = [] if start.name == name else [f"name={json.dumps(name)}"]
        changes += [change for change in _differences(start.to_dict(), recipe) if not change.startswith("name=")]
        rebuilt = load_recipe(name.partition(" (")[0], changes)
    except RecipeError:
        return None
    return changes if rebuilt.to_dict() == recipe else None


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], place: str = "") -> list[str]:
    changes: list[str] = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += _differences(old, new, f"{place}{key}.")
        elif old != new:
            changes.append(f"{place}{key}={json.dumps(new)}")
    return changes


def _repeat_proof(
    out: Path, manifest: Mapping[str, Any], against: str | Path | None, text: str | Path | None, progress: Progress
) -> dict[str, Any]:
    """Makes the proof again on the original and the text. Returns it with the recorded proof."""
    recorded = dict(manifest["proof"])
    if recorded["tokens"] == 0:
        return {"recorded": 0.0, "again": 0.0, "note": "nothing was folded: there is nothing to prove", "problems": []}
    recipe = load_recipe(manifest["recipe"])
    dtype = manifest.get("calibration_dtype")
    if dtype is not None:
        recipe = load_recipe(recipe, [f"calibration.dtype={dtype}"])
    with TemporaryDirectory() as scratch:
        old = "bos" not in (manifest["text"] or {})  # such a run read every file as prose
        written = recipe.calibration.source == "self"
        source = None if written else load_text(_text(manifest, text), prose=old)
        job = prepare(_original(manifest, against), Path(scratch) / "out", recipe, source)
        if Windows().applies(job):
            job.state.tokens, _ = made_windows(job, progress)
        problems = _other_text(job, manifest)
        with evaluating(job.store.skeleton()):
            plan, origin = _plan_again(job, out, progress)
            error, wrong = _prove(job, plan, progress)
            problems += _other_weights(out, job, plan)
    return {"recorded": recorded["relative_logit_error"], "again": error, "maps": origin, "model": job.store.label} | {
        "threshold": recorded["threshold"],
        "problems": [*problems, *(wrong or _disagreement(recorded["relative_logit_error"], error))],
    }


def _original(manifest: Mapping[str, Any], against: str | Path | None) -> str | Path:
    if against is not None:
        return against
    label = str(manifest["model"])
    if not Path(label).exists():
        raise InputError(f"the proof needs the original, which is not at {label!r} any more: give --against MODEL")
    return label


def _text(manifest: Mapping[str, Any], text: str | Path | None) -> str | Path:
    """The calibration text: `text`, or the one that the recipe names."""
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


def _plan_again(job: Job, out: Path, progress: Progress) -> tuple[FoldPlan, str]:
    """The recipe's maps on the original, and their origin: chosen again, or learned in the run."""
    recipe, dtype = job.recipe, job.compute_dtype
    plan, origin = job.plan, "chosen from the recipe again"
    if job.measures:
        assert job.tokens is not None
        tokens, origin = job.tokens, "measured again"

        def measure_sites(so_far: FoldPlan, sites: list[SiteMeasurement]) -> None:
            measure(job.store, so_far, sites, tokens, progress, dtype, job.output.device)

        plan = plan_folds(job.graph, recipe, measure_sites)
    if recipe.learn is None:
        return plan, origin
    labels = learnable(plan, recipe.learn.sites)
    rotations = load_rotations(out) if (out / FILE_NAME).exists() else {}
    keys = {site_key(plan.folded[place.index][0]) for place in labels.values()}
    if keys <= rotations.keys():
        return _with_rotations(plan, rotations), f"{origin}, learned ones from {FILE_NAME}"
    setting = learning_setting(recipe, job.plan, job.tokens, job.targets, job.quantizers, dtype)
    return learn(job.store, plan, recipe.learn, setting, progress).plan, "learned again"


def _with_rotations(plan: FoldPlan, rotations: Mapping[str, torch.Tensor]) -> FoldPlan:
    """A plan in which the rotations of a file replace all fused maps at their sites."""
    changed, done = FoldPlan(plan.graph), set[str]()
    for site, m, online in plan.folded:
        key = site_key(site) if site.kind.stored_rotation and not online else ""
        if key not in rotations:
            changed.add(site, m, online)
        elif key not in done:
            changed.add(site, Dense(rotations[key]), online)
            done.add(key)
    return changed


def _prove(job: Job, plan: FoldPlan, progress: Progress) -> tuple[float | None, list[str]]:
    runner, blocks = BlockRunner.of(job.store), len(plan.graph.blocks)
    try:
        with progress.stage("prove", blocks) as advance:
            threshold = job.recipe.proof.threshold
            proof = prove(job.store, plan, runner, job.proof_tokens, threshold, lambda done, total: advance())
    except ProofError as error:
        return None, [f"the proof does not hold: {error}"]
    return proof.relative_logit_error, []


def _other_weights(out: Path, job: Job, plan: FoldPlan) -> list[str]:
    """Problems: matrices around the blocks that differ from the folded ones of the original.

    These matrices are stored unrounded and are not tuned.
    """
    with unchecked():
        store = open_model(out)
    wrong = []
    for name, folded in plan.read_outer(job.store).items():
        if name in store.shapes and folded.dim() == 2 and name not in job.targets:
            stored = store.read([name])[name]
            difference = float((stored.float() - folded.to(stored.dtype).float()).norm() / folded.norm())
            if not difference <= _ROUNDING:
                wrong.append(
                    f"{name} is not what the recipe makes of {job.store.label}: relative difference {difference:.1e}"
                )
    return wrong


def _disagreement(recorded: float, error: float | None) -> list[str]:
    """The problem, if two errors cannot belong to the same proof. Rounding noise does not count."""
    assert error is not None
    low, high = sorted((max(recorded, _NOISE), max(error, _NOISE)))
    if high <= _ALIKE * low:
        return []
    return [
        f"the proof gives a relative logit error of {error:.1e}, and {recorded:.1e} is recorded: this is another "
        "model, text or version than that of the run"
    ]


__all__ = ["verify"]
