"""Derives the description of an architecture from a tiny model of it, and proves every site there.

A description is guessed from one pass (`roles`), then each kind of site is tested: random maps are folded into the
tiny model, and its logits are compared. A guess that changes them is withdrawn, and a weaker one is tried: a fused R1
becomes an R1 that runs online, at the norms, then at each layer. What remains has been proven.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gyroquant.errors import GyroquantError, UnsupportedModelError
from gyroquant.maps import Dense, Diagonal, Map, PairRotation, Permutation
from gyroquant.models.deriving.facts import corrected, joined
from gyroquant.models.deriving.roles import read_roles
from gyroquant.models.deriving.tiny import tiny_model, tiny_tokens
from gyroquant.models.deriving.trace import trace_model
from gyroquant.models.execution.messages import quiet
from gyroquant.models.execution.online import attached
from gyroquant.models.folding.fold import FoldPlan, fold, folded_outer, fp32
from gyroquant.models.graph.model_graph import ModelGraph, build_graph
from gyroquant.models.graph.sites import Site, Structure, find_sites
from gyroquant.models.graph.spec import Architecture, Attention, Linear, Norm, RopeLayout

EXACT = 1e-4
"""The largest relative error of logits in fp32 at which a fold counts as exact."""


@dataclass
class Derivation:
    """A derived description.

    - proofs: the relative error of the logits, by the kind of site: ``R1``, ``R1 online``, ``R4 permutation`` ...
    - problems: the guesses that were withdrawn, with the reason.
    """

    architecture: Architecture
    proofs: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """How R1 can be used: `fused`, `online`, or `unrotated` if it cannot."""
        return "fused" if "R1" in self.proofs else "online" if "R1 online" in self.proofs else "unrotated"


def find_blocks(model: Any, ids: Tensor) -> str:
    """The path of the list of blocks of a model: of the lists that run on token ids, the one with most parameters.

    Raises UnsupportedModelError if there is none, or if the model does not run each block once.
    """
    calls: dict[str, int] = {}
    hooks = [
        child.register_forward_hook(lambda *_, name=f"{path}.{i}": calls.update({name: calls.get(name, 0) + 1}))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for i, child in enumerate(module)
    ]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    sizes: dict[str, int] = {}
    for path in {name.rpartition(".")[0] for name in calls}:
        sizes[path] = sum(parameter.numel() for parameter in model.get_submodule(path).parameters())
    if not sizes:
        raise UnsupportedModelError(f"{model.config.model_type} has no list of blocks that it runs")
    found = max(sizes, key=lambda path: (sizes[path], -len(path)))
    count = len(model.get_submodule(found))
    if any(calls.get(f"{found}.{i}") != 1 for i in range(count)):
        raise UnsupportedModelError(f"{model.config.model_type} does not run each block of {found} once")
    return found


_EXACT_PAIRS: Mapping[RopeLayout, str] = {
    "none": "any rotation of queries and keys before the scores was exact",
    "half": "rotations of pairs half a head apart were exact, and random rotations were not",
    "interleaved": "rotations of pairs of neighbours were exact, and those of pairs half a head apart were not",
}


class _Prover:
    """Folds random maps into a tiny model and compares its logits."""

    def __init__(self, model: Any, ids: Tensor):
        self.model, self.ids = model, ids
        params = dict(model.named_parameters())
        everything = dict(model.named_parameters(remove_duplicate=False))
        stored = {id(parameter): name for name, parameter in params.items()}
        self.tied = {name: stored[id(p)] for name, p in everything.items() if name not in params}
        self.tensors = {name: parameter.detach() for name, parameter in params.items()}
        self.logits = self._run({})

    @torch.no_grad()
    def _run(self, weights: Mapping[str, Tensor]) -> Tensor:
        everything = {alias: self.tensors[name] for alias, name in self.tied.items()} | self.tensors | dict(weights)
        arguments = {"input_ids": self.ids, "use_cache": False}
        logits: Tensor = functional_call(self.model, everything, (), arguments, tie_weights=False).logits
        return logits

    def graph(self, architecture: Architecture) -> ModelGraph:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return build_graph(self.model.config, shapes, self.tied, architecture)

    def error(self, graph: ModelGraph, sites: list[Site], make: Callable[[Site, int], Map], online: bool) -> float:
        """The relative error of the logits after maps were folded into sites."""
        plan = FoldPlan(graph)
        for seed, site in enumerate(sites):
            plan.add(site, make(site, seed), online)
        weights: dict[str, Tensor] = {}
        for i in range(len(graph.blocks)):
            weights |= fp32(fold(plan, {name: self.tensors[name] for name in graph.block_params(i)}))
        weights |= folded_outer(plan, {name: self.tensors[name] for name in graph.outer_params()})
        weights = {alias: weights[name] for alias, name in self.tied.items() if name in weights} | weights
        with attached(self.model, plan.online):
            logits = self._run(weights)
        return float(torch.nan_to_num((logits - self.logits).norm() / self.logits.norm(), nan=torch.inf))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + seed)


def _rotation(site: Site, seed: int) -> Map:
    matrix = torch.linalg.qr(torch.randn(site.n, site.n, generator=_generator(seed), dtype=torch.float64))[0]
    return Dense(matrix)


def _permutation(site: Site, seed: int) -> Map:
    return Permutation(torch.randperm(site.n, generator=_generator(seed)))


def _scales(site: Site, seed: int) -> Map:
    return Diagonal(0.5 + torch.rand(site.n, generator=_generator(seed), dtype=torch.float64))


class _Deriver:
    """Settles one kind of site after the other; `architecture` is the description as it stands."""

    def __init__(self, model: Any, architecture: Architecture, ids: Tensor):
        self.prover, self.model = _Prover(model, ids), model
        self.result = Derivation(architecture)

    @property
    def architecture(self) -> Architecture:
        return self.result.architecture

    def error(
        self,
        name: str,
        make: Callable[[Site, int], Map],
        *,
        online: bool,
        structure: Structure = "orthogonal",
        architecture: Architecture | None = None,
        keep: Callable[[Site], bool] = lambda site: True,
    ) -> tuple[float, str]:
        """The error of maps at all sites of a name, or infinity with the reason why they cannot be folded."""
        try:
            graph = self.prover.graph(architecture or self.architecture)
            sites = [site for site in find_sites(graph, name, online, structure) if keep(site)]
            if not sites:
                return float("inf"), f"no site {name} takes such a map"
            return self.prover.error(graph, sites, make, online), ""
        except GyroquantError as error:
            return float("inf"), str(error)
        except Exception as error:  # guesses may be wrong in ways that shapes do not allow
            return float("inf"), f"{type(error).__name__}: {error}"

    def settle(self, label: str, error: tuple[float, str]) -> bool:
        """Keeps the proof, or the reason why there is none."""
        if error[0] <= EXACT:
            self.result.proofs[label] = error[0]
            return True
        self.result.problems[label] = error[1] or f"a random map changed the logits by {error[0]:.1e}"
        return False

    def change(self, entry: Callable[[Any], Any], **fields: Any) -> Architecture:
        """The description with each entry replaced by `entry(it)`, and with other fields changed."""
        old = self.architecture
        block, outer = (tuple(entry(part) for part in parts) for parts in (old.block, old.outer))
        return replace(old, block=block, outer=outer, **fields)

    def use(self, architecture: Architecture, why: str = "") -> None:
        """Goes on with another description. `why`: the reason why guesses in the present one are withdrawn."""
        self.result.architecture = corrected(self.architecture, architecture, why)

    def problem(self, label: str) -> str:
        return f"{label} was not exact: {self.result.problems[label]}"

    def unproven(self) -> dict[str, str]:
        return {label: f"not proven: {reason}" for label, reason in self.result.problems.items()}

    def r1(self) -> None:
        fused = self.error("R1", _rotation, online=False)
        if not self.settle("R1", fused):
            reason = f"a rotation of the residual stream is not exact ({self.result.problems['R1']})"
            self.use(replace(self.architecture, r1_blocked=reason))
        if self.settle("R1 online", self.error("R1", _rotation, online=True)):
            return
        if "R1" in self.result.proofs:
            return
        for without in (_without_norm_hooks, _without_readers):
            self.use(self.change(without(self.architecture)), self.problem("R1 online"))
            if self.settle("R1 online", self.error("R1", _rotation, online=True)):
                del self.result.problems["R1 online"]
                return

    def norms(self) -> None:
        for basis in ("attn_in", "mlp_in"):
            self.settle(f"{basis} online", self.error(basis, _rotation, online=True))
            self.settle(basis, self.error(basis, _scales, online=False, structure="diagonal"))

    def r2(self) -> None:
        if not self.settle("R2", self.error("R2", _rotation, online=False)):
            self.use(self.change(_renamed({"v": "values"})), self.problem("R2"))

    def latent(self) -> None:
        if self.settle("latent", self.error("latent", _rotation, online=False)):
            return
        bases = {e.reads for e in self.architecture.block if isinstance(e, (Linear, Norm)) and e.reads[:7] == "latent."}
        for basis in sorted(bases):
            alone = self.change(_without_latents(bases - {basis}))
            error = self.error("latent", _rotation, online=False, architecture=alone)
            if not self.settle(f"latent {basis}", error):
                self.use(self.change(_without_latents({basis})), self.problem(f"latent {basis}"))
            self.result.proofs.pop(f"latent {basis}", None)
        if bases and self.settle("latent", self.error("latent", _rotation, online=False)):
            del self.result.problems["latent"]

    def heads(self) -> None:
        self.settle("attn_out", self.error("attn_out", _rotation, online=True))
        if not self.settle("R3", self.error("R3", _rotation, online=True)):
            self.use(self.change(_unhooked), self.problem("R3"))

    def qk(self) -> None:
        layouts: tuple[RopeLayout, ...] = ("none", "half", "interleaved")
        for layout in layouts:
            trial = replace(self.architecture, rope=layout)
            error = self.error("qk", _pairs(layout), online=False, architecture=trial)
            if error[0] <= EXACT:
                self.use(replace(trial, facts=joined(trial.facts, {"qk": f"rope {layout}: {_EXACT_PAIRS[layout]}"})))
                self.settle("qk", error)
                break
        else:
            self.settle("qk", error)
        self.settle("qk online", self.error("qk", _rotation, online=True))

    def r4(self) -> None:
        if not self.settle("R4", self.error("R4", _rotation, online=True)):
            self.use(self.change(_without_act), self.problem("R4"))
            return
        bases = {e.reads for e in self.architecture.block if isinstance(e, Linear) and _last(e.reads) == "act"}
        structures: tuple[tuple[Structure, Callable[[Site, int], Map]], ...] = (
            ("permutation", _permutation),
            ("diagonal", _scales),
        )
        for structure, make in structures:
            for basis in sorted(bases):
                layers = {
                    op.weight
                    for op in self.prover.graph(self.architecture).block_linears
                    if _last(op.entry.reads) == "act" and _unnumbered(op.entry.reads) == _unnumbered(basis)
                }

                def keep(site: Site, layers: set[str] = layers) -> bool:
                    return not site.blocked and site.readers[0].param in layers

                error = self.error("R4", make, online=False, structure=structure, keep=keep)
                if not self.settle(f"R4 {structure} {basis}", error) and not error[1]:
                    self.use(self.change(_without_writers(basis)), self.problem(f"R4 {structure} {basis}"))
            proofs = [error for name, error in self.result.proofs.items() if name.startswith(f"R4 {structure} ")]
            if proofs:
                self.result.proofs[f"R4 {structure}"] = max(proofs)
            self.result.proofs = {
                name: error for name, error in self.result.proofs.items() if not name.startswith(f"R4 {structure} ")
            }

    def linear(self) -> None:
        if self.settle("linear", self.error("linear", _rotation, online=True)):
            return
        wrong: dict[str, str] = {}
        for name in [e.name for e in self.architecture.block if isinstance(e, Linear) and e.quantize]:
            error = self.error("linear", _rotation, online=True, architecture=self.change(_only(name)))
            if error[0] > EXACT:
                wrong[name] = error[1] or f"a random map changed the logits by {error[0]:.1e}"
                self.result.problems[f"linear {name}"] = wrong[name]
        for name in wrong:
            self.use(self.change(_never_rounded([name])), self.problem(f"linear {name}"))
        if wrong and self.settle("linear", self.error("linear", _rotation, online=True)):
            del self.result.problems["linear"]


def _only(name: str) -> Callable[[Any], Any]:
    """No other layer is rounded."""
    return lambda entry: replace(entry, quantize=entry.name == name) if isinstance(entry, Linear) else entry


def _never_rounded(names: Collection[str]) -> Callable[[Any], Any]:
    def change(entry: Any) -> Any:
        return replace(entry, quantize=False) if isinstance(entry, Linear) and entry.name in names else entry

    return change


def _pairs(layout: str) -> Callable[[Site, int], Map]:
    def make(site: Site, seed: int) -> Map:
        if layout == "none" or site.rope is None:
            return _rotation(site, seed)
        angles = torch.rand(site.rope.pairs, generator=_generator(seed), dtype=torch.float64) * 3
        return PairRotation(site.n, angles, site.rope.interleaved)

    return make


def _renamed(names: Mapping[str, str]) -> Callable[[Any], Any]:
    def rename(entry: Any) -> Any:
        if not isinstance(entry, Linear):
            return entry
        writes = entry.writes
        if isinstance(writes, str):
            return replace(entry, writes=names.get(writes, writes))
        return replace(entry, writes=tuple(names.get(basis, basis) for basis in writes))

    return rename


def _without_latents(bases: Collection[str]) -> Callable[[Any], Any]:
    """No layer writes these latents."""
    return _renamed({basis: basis.replace("latent.", "kept.", 1) for basis in bases})


def _unhooked(entry: Any) -> Any:
    return replace(entry, hooked=False) if isinstance(entry, Attention) else entry


def _without_norm_hooks(architecture: Architecture) -> Callable[[Any], Any]:
    """Layers read the stream directly, so that R1 runs at the input of each of them and not at a norm."""
    bases = {e.writes for e in architecture.block if isinstance(e, Norm) and e.reads == "residual"}

    def change(entry: Any) -> Any:
        if isinstance(entry, Norm) and entry.writes in bases:
            return replace(entry, reads=f"{entry.name}.in", writes=f"{entry.name}.out")
        if isinstance(entry, Linear) and entry.reads in bases:
            return replace(entry, reads="residual" if entry.quantize else f"{entry.name}.in")
        if isinstance(entry, Linear) and entry.reads == "residual" and not entry.quantize:
            return replace(entry, reads=f"{entry.name}.in")
        return entry

    return change


def _without_readers(architecture: Architecture) -> Callable[[Any], Any]:
    """No layer reads the stream: R1 is not available."""

    def change(entry: Any) -> Any:
        if isinstance(entry, Linear) and entry.reads == "residual":
            return replace(entry, reads=f"{entry.name}.in")
        return entry

    return change


def _without_act(entry: Any) -> Any:
    if isinstance(entry, Linear) and entry.reads.rpartition(".")[2] == "act":
        return replace(entry, reads=f"{entry.name}.in")
    return entry


def _last(basis: str) -> str:
    return basis.rpartition(".")[2]


def _unnumbered(basis: str) -> str:
    return ".".join("{e}" if part.isdigit() else part for part in basis.split("."))


def _without_writers(basis: str) -> Callable[[Any], Any]:
    """The gate and up of one network are not known, so maps of the input of its down_proj can only run online."""
    prefix = basis.removesuffix("act")

    def change(entry: Any) -> Any:
        if isinstance(entry, Linear):
            bases = (entry.writes,) if isinstance(entry.writes, str) else entry.writes
            if any(basis in (f"{prefix}gate", f"{prefix}up") for basis in bases):
                return replace(entry, writes="fixed", alternating=False)
        return entry

    return change


def _check_shared(model: Any, path: str) -> None:
    """Raises UnsupportedModelError if blocks share parameters: a block could then not be folded without the others."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(f"{path}."):
            block = name.removeprefix(f"{path}.").partition(".")[0]
            if owners.setdefault(id(parameter), block) != block:
                raise UnsupportedModelError(
                    f"{model.config.model_type}: the blocks {owners[id(parameter)]} and {block} share parameters, "
                    "which is not supported"
                )


def derive(model: Any, ids: Tensor) -> Derivation:
    """Derives and proves the description of a tiny random model; `ids` are token ids, shape (batch, length).

    Raises UnsupportedModelError, with the reason, if the model cannot be described at all.
    """
    path = find_blocks(model, ids)
    width = model.config.get_text_config(decoder=True).hidden_size
    trace = trace_model(model, model.get_submodule(path), ids, width)
    _check_shared(model, path)
    deriver = _Deriver(model, read_roles(model, path, trace, width, ids.numel()), ids)
    deriver.prover.graph(deriver.architecture)
    for step in (
        deriver.linear,
        deriver.r1,
        deriver.r2,
        deriver.latent,
        deriver.norms,
        deriver.heads,
        deriver.qk,
        deriver.r4,
    ):
        step()
    deriver.use(replace(deriver.architecture, facts=joined(deriver.architecture.facts, deriver.unproven())))
    return deriver.result


_DERIVED: dict[tuple[str, str], Derivation] = {}


def derived(config: Any, build: Callable[[Any], Any] | None = None) -> Derivation:
    """The derivation for a decoder's configuration, from a tiny model of it. Each is made once in a process.

    `build` makes a model from a configuration; see `tiny_model`. Raises UnsupportedModelError if there is none.
    """
    key = (str(build or config.model_type), config.to_json_string(use_diff=False))
    if key not in _DERIVED:
        with torch.random.fork_rng(devices=[]), quiet():
            model = tiny_model(config, build)
            _DERIVED[key] = derive(model, tiny_tokens(model))
    return _DERIVED[key]
