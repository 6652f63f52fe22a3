"""What a run will need before it begins: where each tensor goes, memory and time.

Memory is that of the worst stage of the worst layer (plan_layer.py has the formulas) or of what lies outside the
layers, above what the process holds anyhow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen_quant.errors import ResourceError
from qwen_quant.quantize.plan_gradients import moment_bytes, moment_stage, moment_work, state_bytes
from qwen_quant.quantize.plan_layer import (
    CODE,
    FLOAT,
    NARROW,
    PIECE,
    PLAIN,
    CalibratedLayer,
    LayerPlan,
    Stage,
    Work,
    aiming_work,
    copied_layer,
    copy_work,
    exact_tokens,
    hessian_and_solve,
    largest,
    packing_bytes,
    solve_bytes,
)
from qwen_quant.quantize.recipe import Recipe
from qwen_quant.quantize.stored import StoredTensor
from qwen_quant.spec import ModelSpec

# Activations up to this size are kept in memory, more of them in files (scratch.py), which takes hardly more
# time: the system holds of them what there is room for.
IN_MEMORY = 128 << 20


@dataclass(frozen=True)
class Plan:
    """A run: its tensors, its layers and what lies outside them, and what is done `beside` (plan_beside.py). `base`
    is what the process holds anyhow."""

    tensors: tuple[StoredTensor, ...]
    layers: tuple[LayerPlan, ...]
    outer: Stage
    outer_work: Work
    base: float
    keep_activations: bool = True
    hidden_states: float = 0
    kept: float = 0  # of a layer's activations
    states: float = 0  # hidden states at every layer, for gradients
    moments: float = 0  # of gradients, through the whole run
    spill: bool = False  # whether all these lie in files
    beside: tuple[Stage, ...] = ()

    @property
    def output_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def set_aside(self) -> float:
        """Bytes at most of what can lie in files."""
        return self.hidden_states + max(self.kept, self.states) + self.moments

    @property
    def worst(self) -> Stage:
        stages = (self.outer, *self.beside, *(layer.worst for layer in self.layers))
        return max(stages, key=self.resident)

    @property
    def peak(self) -> float:
        """Resident memory at the worst moment, bytes."""
        return self.resident(self.worst)

    def resident(self, stage: Stage) -> float:
        """Resident memory at `stage`, bytes."""
        return self.base + stage.overhead + stage.nbytes + self.moments * (not self.spill)

    @property
    def work(self) -> Work:
        return sum((layer.work for layer in self.layers), self.outer_work)


def plan_run(
    spec: ModelSpec,
    tensors: list[StoredTensor],
    recipe: Recipe | None,
    base: float = 0.0,
    keep_activations: bool = True,
    beside: tuple[Stage, ...] = (),
    spill: bool = False,
) -> Plan:
    """The plan of a run that writes `tensors`; without a `recipe` nothing is quantized, only copied. With `spill`
    hidden states and what is kept lie in files."""
    by_layer: dict[int, list[StoredTensor]] = {}
    for tensor in tensors:
        by_layer.setdefault(tensor.info.layer, []).append(tensor)
    layers = []
    for layer in range(spec.num_hidden_layers):
        mine = by_layer[layer]
        if recipe is not None and recipe.calibrate:
            layers.append(CalibratedLayer(spec, layer, mine, recipe, keep_activations, spill).plan())
        else:
            layers.append(copied_layer(layer, mine))
    tokens = recipe.num_samples * recipe.seq_len if recipe is not None and recipe.calibrate else 0
    exact = exact_tokens(recipe) if recipe is not None and recipe.calibrate else 0
    outer = by_layer[-1]
    hidden = FLOAT * (tokens + exact) * spec.hidden_size
    dense = any(not spec.is_sparse(layer) for layer in range(spec.num_hidden_layers))
    kept = NARROW * tokens * max(spec.q_size, spec.intermediate_size if dense else 0)
    plan = Plan(
        tuple(tensors),
        tuple(layers),
        _outer_stage(spec, outer, tokens, exact, 0 if spill else hidden),
        _outer_work(spec, outer, tokens, exact),
        base,
        keep_activations,
        hidden,
        kept if keep_activations else 0,
        spill=spill,
        beside=beside,
    )
    return (
        _output_aware(plan, spec, recipe) if tokens and recipe is not None and recipe.output_aware else plan
    )


def _output_aware(plan: Plan, spec: ModelSpec, recipe: Recipe) -> Plan:
    """`plan` with the gradients that are taken first."""
    tensors = list(plan.tensors)
    gradients = moment_stage(spec, tensors, recipe, plan.spill)
    held = 0 if plan.spill else plan.hidden_states
    return replace(
        plan,
        outer=max(plan.outer, replace(gradients, nbytes=gradients.nbytes + held), key=lambda s: s.nbytes),
        outer_work=plan.outer_work + moment_work(spec, tensors, recipe),
        states=state_bytes(spec, recipe),
        moments=moment_bytes(spec, tensors),
    )


def can_spill(recipe: Recipe | None) -> bool:
    """Whether hidden states can lie in files: where the CPU calibrates."""
    return recipe is not None and recipe.calibrate and recipe.device == "cpu"


def fit(plan: Plan, spec: ModelSpec, recipe: Recipe | None, max_ram: int, model: str) -> Plan:
    """`plan`, or one with the same result that needs less. Raises ResourceError, naming the remedy, when none needs
    at most `max_ram` bytes."""
    if plan.peak <= max_ram:
        return plan
    for stage in plan.beside:
        if plan.resident(stage) > max_ram:
            need = f"{stage.name} needs about {size(plan.resident(stage))}, --max-ram is {size(max_ram)}"
            raise ResourceError(f"{model}: {need}; {stage.remedy}")

    def with_samples(count: int) -> Plan:
        assert recipe is not None
        less, files = replace(recipe, num_samples=count), can_spill(recipe)
        return plan_run(spec, list(plan.tensors), less, plan.base, files, plan.beside, files)

    calibrated = recipe is not None and recipe.calibrate
    if recipe is not None and calibrated:
        smaller = with_samples(recipe.num_samples)
        if smaller.peak <= max_ram:
            return smaller
    need = f"{model}: {plan.worst.name} needs about {size(plan.peak)}, --max-ram is {size(max_ram)}"
    if recipe is None or not calibrated:
        raise ResourceError(f"{need}; no option lowers it, give more")
    if with_samples(1).peak <= max_ram:
        low, high = 1, recipe.num_samples  # `low` fits, `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if with_samples(middle).peak <= max_ram else (low, middle)
        raise ResourceError(f"{need}; fewer calibration windows fit: --num-samples {low}, or lower --seq-len")
    least = size(with_samples(1).peak)
    raise ResourceError(
        f"{need}; with one calibration window (--num-samples 1) it still needs {least}: give more, or round "
        "without calibration (--no-calibration)"
    )


def size(nbytes: float) -> str:
    """Bytes for people, in powers of ten."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def _outer_stage(
    spec: ModelSpec, tensors: list[StoredTensor], tokens: int, exact: int, hidden: float
) -> Stage:
    """Embedding the calibration tokens, solving embedding and head in pieces, or copying them so; `exact` tokens pass
    in full precision too, and `hidden` bytes of them are in memory."""
    embedding = hidden + 4 * PIECE if tokens else 0
    floats = max(PLAIN if tensor.quantized else 3 for tensor in tensors)
    copying = FLOAT * floats * min(PIECE // 2, largest(tensors))
    stages = [Stage("embedding", embedding), Stage("writing embedding and head", copying)]
    if tokens:
        solved = [tensor for tensor in tensors if tensor.quantized]
        held = hidden + CODE * sum(tensor.weights for tensor in solved)
        piece = min(PIECE // 2 // spec.hidden_size, spec.vocab_size)
        aiming = FLOAT * spec.hidden_size * (piece + spec.hidden_size) if exact else 0
        need = held + max((solve_bytes(1, piece, spec.hidden_size) + aiming for _ in solved), default=0)
        packing = max((packing_bytes(tensor) * piece / tensor.info.shape[0] for tensor in solved), default=0)
        stages.append(Stage("solving embedding and head", need + packing))
    return max(stages, key=lambda stage: stage.nbytes)


def _outer_work(spec: ModelSpec, tensors: list[StoredTensor], tokens: int, exact: int) -> Work:
    """A head (or tied embedding) is solved like other linears; an embedding alone is only rounded."""
    work = copy_work(tensors)
    for tensor in tensors:
        if tokens and tensor.quantized and (tensor.info.role == "head" or spec.tie_word_embeddings):
            work += hessian_and_solve(1, tokens, spec.vocab_size, spec.hidden_size)
            if exact:
                work += aiming_work(exact, spec.vocab_size, spec.hidden_size, spec.hidden_size)
    return work
