"""Resolve a model line: everything about a model that decides its bits, fixed once for its first update."""

from service.core.executor import Capabilities
from service.core.specs import ArchitectureSpec, ModelSpec, TrainingRecipe, TrainingSpec
from service.core.stage_specs import LineSpec, Numerics


def resolve_line(spec: ModelSpec, base_key: str | None, tokenizer_key: str, numerics: Numerics) -> LineSpec:
    """The line of a model. ``base_key`` is the artifact key of its base checkpoint, if it has one."""
    training = spec.training
    micro_batch_tokens = training.micro_batch_tokens
    return LineSpec(
        **training.fields_of(TrainingRecipe),
        architecture=ArchitectureSpec(base=base_key) if base_key else spec.architecture,
        tokenizer_key=tokenizer_key,
        numerics=numerics,
        batch_rows=training.batch_rows,
        micro_batch_rows=(
            max(1, micro_batch_tokens // training.sequence_length) if micro_batch_tokens else None
        ),
    )


def resolve_numerics(training: TrainingSpec, capabilities: Capabilities) -> Numerics:
    """The numerics of a line, from what the user requested and what the training hardware can do.

    An explicit ``precision`` or ``compile`` is respected. ``auto`` picks bf16 if the hardware runs it faster
    than fp32, and compiles on CUDA only: on a CPU, compiling takes 30-45 s in every training process and
    saves less than a tenth of each step.
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
