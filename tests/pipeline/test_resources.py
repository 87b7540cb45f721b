"""What a job takes is estimated before any work, and refused where there is not as much."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from tiny_runs import with_text_repeated

import gyroquant as gq
from gyroquant.pipeline import resources as module
from gyroquant.pipeline.job import Job, prepare
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.resources import check_fits, disk, estimate, hidden_bytes
from gyroquant.pipeline.stages import quantize
from gyroquant.system.environment import resident_memory_bytes
from gyroquant.system.worker_pool import Workers

BRIEF = ["weights.group_size=16", "calibration.nsamples=8", "calibration.seqlen=32"]
ROTATED = {"R1": "hadamard", "R4": "hadamard"}


def job(folder: Path, corpus: Path, tmp_path: Path, recipe: str, *changes: str, **options: object) -> Job:
    loaded = gq.load_recipe(recipe, [*BRIEF, *changes])
    return prepare(folder, tmp_path / "out", loaded, corpus, tokenizer=tiny_models.tokenizer(), **options)  # type: ignore[arg-type]


def stages(made: Job) -> dict[str, int]:
    return {stage.name: stage.peak_memory_bytes for stage in estimate(made).stages}


@pytest.mark.parametrize(
    ("recipe", "changes", "names"),
    [
        ("rtn", [], ["quantize", "save"]),
        ("gsr", [], ["prove", "quantize", "save"]),
        ("smoothquant", ["activations=null"], ["measure", "prove", "quantize", "save"]),
        ("spinquant", [], ["learn", "prove", "quantize", "save"]),
        ("gyro-w2", ["weights.allocate.budget=4"], ["prove", "allocate", "quantize", "save", "finetune"]),
    ],
)
def test_the_stages_are_those_of_the_recipe(
    recipe: str, changes: list[str], names: list[str], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    found = stages(job(folders["llama"], corpus, tmp_path, recipe, *changes))
    assert list(found) == names
    assert all(peak > resident_memory_bytes() * 0.9 for peak in found.values())


def test_second_moments_of_groups_of_outputs_are_counted(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Of an input of n numbers, one of the whole, and one for each group of each layer that reads it."""
    plain, guided = (
        MemoryModel(job(folders["llama"], corpus, tmp_path, "gptq", *changes))
        for changes in ((), ("weights.guided={groups: 3}",))
    )
    read = [op.in_features for op in plain.group.linears if op.entry.quantize]
    assert guided.second_moments() - plain.second_moments() == sum(4 * 3 * n**2 for n in read)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt2", "cohere2", "llama_tied"])
def test_every_kind_of_model_can_be_estimated(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    for recipe in ("rtn", "gptq", "gsr"):
        assert estimate(job(folders[name], corpus, tmp_path, recipe)).peak_memory_bytes > 0


def test_hidden_states_are_counted_where_they_lie(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    few = job(folders["llama"], corpus, tmp_path, "gptq", "calibration.dtype=float32")
    size = 8 * 32 * 64 * 4
    assert hidden_bytes(few) == size
    assert hidden_bytes(job(folders["llama"], corpus, tmp_path, "gptaq", "calibration.dtype=float32")) == 2 * size
    assert hidden_bytes(job(folders["llama"], corpus, tmp_path, "rtn")) == 0
    result, scratch = disk(few)
    assert scratch == result + 3 * size  # of two blocks, and what is being written
    many = job(folders["llama"], corpus, tmp_path, "gptq", "calibration.dtype=float32")
    many = with_text_repeated(many, 1000)
    assert stages(many)["quantize"] - stages(few)["quantize"] == pytest.approx(999 * size, rel=0.4)
    off = job(folders["llama"], corpus, tmp_path, "gptq", "calibration.dtype=float32", offload=tmp_path / "hidden")
    off = with_text_repeated(off, 1000)
    assert stages(many)["quantize"] - stages(off)["quantize"] == pytest.approx(1000 * size, rel=0.1)


def test_what_does_not_fit_is_refused_with_a_remedy(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(folders["llama"], corpus, tmp_path, "gptq", "calibration.dtype=float32")
    made = with_text_repeated(made, 3000)
    check_fits(made)
    monkeypatch.setattr(module, "available_memory", lambda: 100 << 20)
    expected = r"MB of memory .*stage 'quantize'.*105 MB are available.*--offload DIR"
    with pytest.raises(gq.InputError, match=expected) as e:
        check_fits(made)
    assert "--nsamples" in str(e.value)
    learned = job(folders["llama"], corpus, tmp_path, "spinquant")
    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    with pytest.raises(gq.InputError, match=r"learn\.objective=blocks"):
        check_fits(learned)
    assert not (tmp_path / "out").exists()


def test_disks_that_are_too_small_are_refused(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(folders["llama"], corpus, tmp_path, "gptq", offload=tmp_path / "hidden")
    asked: list[tuple[Path, int]] = []
    monkeypatch.setattr(module, "check_rooms", asked.extend)
    check_fits(made)
    assert asked == [(tmp_path / "out", sum(disk(made))), (tmp_path / "hidden", hidden_bytes(made))]
    (tmp_path / ".out.journal").mkdir()
    (tmp_path / ".out.journal" / "x").write_bytes(bytes(1000))
    asked.clear()
    check_fits(made)
    assert asked[0] == (tmp_path / "out", sum(disk(made)) - 1000)
    (tmp_path / ".out.journal" / "x").write_bytes(bytes(10 * sum(disk(made))))
    asked.clear()
    check_fits(made)
    assert asked[0] == (tmp_path / "out", 0)  # which is no room for what lies elsewhere


APART = ["calibration.dtype=float32", "calibration.inputs=original"]


def with_memory(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Has the machine say that it has so many bytes of memory left."""
    for where in (module, quantize):
        monkeypatch.setattr(where, "available_memory", lambda: count)


def test_workers_count_with_all_that_they_hold(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def many(*changes: str, **options: object) -> Job:
        found = job(folders["llama"], corpus, tmp_path, "gptq", *APART, *changes, **options)
        return with_text_repeated(found, 3000)

    with_memory(monkeypatch, 1 << 45)
    alone, size = many(), hidden_bytes(many())
    base, around = resident_memory_bytes(), stages(alone)["quantize"]
    for count in (1, 3):
        apart = many(workers=Workers(count, 1))
        assert stages(apart)["quantize"] == pytest.approx(around + count * around, rel=0.1)
        assert stages(apart)["save"] == pytest.approx(stages(alone)["save"], rel=0.05)
        assert disk(apart) == (disk(alone)[0], disk(alone)[0] + count * size)
    off = many(workers=Workers(3, 1), offload=tmp_path / "hidden")
    assert stages(apart)["quantize"] - stages(off)["quantize"] == pytest.approx(4 * size, rel=0.05)
    assert stages(off)["quantize"] > 3 * base
    assert stages(many(workers=Workers(3, 1, "local")))["quantize"] == pytest.approx(
        stages(apart)["quantize"], rel=0.05
    )
    elsewhere = stages(many(workers=Workers(3, 1, "auto")))["quantize"]
    assert elsewhere == pytest.approx(base + size, rel=0.2)
    asked: list[tuple[Path, int]] = []
    monkeypatch.setattr(module, "check_rooms", asked.extend)
    check_fits(off)
    assert asked[1] == (tmp_path / "hidden", 4 * size)


def test_no_more_workers_are_counted_than_there_is_room_for(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, 1 << 45)
    peaks = [
        stages(job(folders["llama"], corpus, tmp_path, "gptq", *APART, workers=Workers(count, 1)))["quantize"]
        for count in (1, 2)
    ]
    each = peaks[1] - peaks[0]
    made = job(folders["llama"], corpus, tmp_path, "gptq", *APART, workers=Workers(8, 1))
    with_memory(monkeypatch, int(3 * 1.25 * each))
    assert 2 * each < stages(made)["quantize"] < 4.2 * each
    check_fits(made)
    with_memory(monkeypatch, int(0.9 * each))
    with pytest.raises(gq.InputError, match=r"stage 'quantize'.*without --workers and --ray"):
        check_fits(made)
    by_ray = job(folders["llama"], corpus, tmp_path, "gptq", *APART, workers=Workers(8, 1, "local"))
    with_memory(monkeypatch, int(3 * 1.25 * each))
    with pytest.raises(gq.InputError, match="stage 'quantize'"):  # Ray looks at no memory
        check_fits(by_ray)
