"""`--target-bpw` and `--target-size` of `export`: the types of a file that may have so many bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_quant.errors import UsageError

if TYPE_CHECKING:
    from qwen_quant.checkpoint import Checkpoint
    from qwen_quant.cli.export import ExportOptions
    from qwen_quant.exporters.gguf import TypeOptions
    from qwen_quant.exporters.gguf_budget import Budget, BudgetedFile
    from qwen_quant.quantize.plan_layer import Stage
    from qwen_quant.quantize.recipe import Recipe
    from qwen_quant.quantize.resume import LayerStore


def wanted(options: ExportOptions) -> bool:
    """Whether a budget is given. Raises UsageError for options that contradict one."""
    given = {"--target-bpw": options.target_bpw, "--target-size": options.target_size}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) == 2:
        raise UsageError("--target-bpw and --target-size: give one of them")
    if not chosen:
        return False
    if options.target_bpw is not None and not 0 < options.target_bpw <= 16:
        raise UsageError(f"--target-bpw {options.target_bpw}: must lie between 0 and 16 bits per weight")
    for name, value in (("--type", options.type), ("--pure", options.pure)):
        if value:
            raise UsageError(f"{name} fixes the types that {chosen[0]} would choose; drop one of them")
    if options.no_calibration:
        raise UsageError(f"{chosen[0]} measures losses by calibration; drop --no-calibration")
    return True


def prepare(checkpoint: Checkpoint, options: ExportOptions, types: TypeOptions) -> tuple[Budget, int]:
    """The choices there are, and the bytes to spend on them.

    Raises UsageError for a budget that is too small, CheckpointError for a checkpoint that is quantized already.
    """
    from qwen_quant.cli.planning import parse_size
    from qwen_quant.exporters.gguf_budget import Budget
    from qwen_quant.quantize.stream import require_full_precision
    from qwen_quant.tokenizer import Tokenizer

    require_full_precision(checkpoint)
    budget = Budget(checkpoint, types)
    if options.target_size is not None:
        nbytes = parse_size(options.target_size, "--target-size")
        nbytes -= budget.header_bytes(Tokenizer.from_folder(checkpoint.folder))
    else:
        assert options.target_bpw is not None
        nbytes = budget.bytes_for(options.target_bpw)
    budget.check(nbytes)
    return budget, nbytes


def memory(budget: Budget, recipe: Recipe) -> tuple[Stage, ...]:
    """What measuring the losses will need."""
    from qwen_quant.quantize.plan_beside import measuring

    return (measuring(budget.checkpoint.spec, budget.file.stored, recipe),)


def choose(budget: Budget, nbytes: int, recipe: Recipe, store: LayerStore | None) -> BudgetedFile:
    """Measure what each tensor loses on each grid, or take it from `store`, and spend the bytes."""
    from qwen_quant.cli.calibrating import calibration_windows
    from qwen_quant.quantize.sensitivity import measure_losses

    windows, _ = calibration_windows(budget.checkpoint, recipe)
    return budget.spend(measure_losses(budget.checkpoint, budget.menu, windows, recipe, store), nbytes)
