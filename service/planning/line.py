"""Numerics of a model line, resolved once from what its user asked for and what the training hardware is."""

from service.core.executor import Capabilities
from service.core.specs import TrainingSpec
from service.core.stage_specs import Numerics


def resolve_numerics(training: TrainingSpec, capabilities: Capabilities) -> Numerics:
    """Resolve ``auto`` and fix everything else outside the model's description that changes bits.

    An explicit precision or compile choice is respected. ``auto`` takes bf16 where the hardware is faster
    with it, and compiles on CUDA only: on a CPU compiling costs 30-45 s in every training process, for less
    than a tenth of the time of a step.
    """
    if training.precision == "auto":
        precision = "bf16" if capabilities.bf16 else "fp32"
    else:
        precision = training.precision
    compiled = capabilities.device == "cuda" if training.compile == "auto" else training.compile == "on"
    return Numerics(
        device="cuda" if capabilities.device == "cuda" else "cpu",
        precision="bf16" if precision == "bf16" else "fp32",
        compile=compiled,
        threads=capabilities.threads,
    )
