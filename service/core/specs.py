"""The specification of a model line, as the API receives it and the store keeps it.

Every field but name and dataset has a default.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from service.core.paradigm_specs import Fraction01, ParadigmSpec, PathSwitchingSpec
from service.core.serving_specs import DEFAULT_SERVING, ServingSpec
from service.core.spec import Spec

MAX_PEAK_LR = 1.0
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class ArchitectureSpec(Spec):
    """Exactly one of a preset's name, a transformers config and the path of a base checkpoint."""

    preset: str | None = None
    config: dict[str, Any] | None = None
    base: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.preset, self.config, self.base)) != 1:
            raise ValueError("give exactly one of preset, config and base")
        return self


class TokenizerTrainSpec(Spec):
    """A byte-level BPE, trained on the first data version."""

    vocab_size: int = Field(4096, ge=260, le=1_000_000)


class TokenizerSpec(Spec):
    """Train a tokenizer, or use the ``tokenizer.json`` at ``path``."""

    train: TokenizerTrainSpec | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.train is None) == (self.path is None):
            raise ValueError("give exactly one of train and path")
        return self


class TrainingRecipe(Spec):
    """The training settings that a line uses exactly as its user set them. Each affects results bit for bit.

    ``sequence_length`` is in tokens. ``peak_lr`` is the rate of the trunk after ``warmup_steps``.
    ``replay_mixture`` says how replayed rows are drawn from the older data versions. ``epochs`` are passes
    over each data version.
    """

    sequence_length: int = Field(128, ge=8, le=1 << 20)
    peak_lr: float = Field(2e-3, gt=0, le=MAX_PEAK_LR, allow_inf_nan=False)
    warmup_steps: int = Field(20, ge=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[Fraction01, Fraction01] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0, le=1, allow_inf_nan=False)
    grad_clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    replay_mixture: Literal["equal", "by_size", "recency"] = "equal"
    epochs: int = Field(1, ge=1, le=1000)
    seed: int = Field(0, ge=0, lt=1 << 63)


class TrainingSpec(TrainingRecipe):
    """How a line trains. Only ``workers`` and ``strategy``, which do not affect its results, may change later.

    ``replay_fraction`` is the share of replayed rows in the line's own stream, from the second data version on; a
    branch has its own. ``workers`` is the number of data-parallel training processes.
    """

    batch_tokens: int = Field(2048, ge=8)
    micro_batch_tokens: int | None = Field(None, ge=8)
    replay_fraction: Fraction01 = Field(0.15, description="from_scratch, which reads all data: 0")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    checkpoint_every: int = Field(200, ge=1)
    workers: int = Field(1, ge=1, le=1024)
    strategy: Literal["ddp"] = "ddp"

    @model_validator(mode="after")
    def _a_batch_holds_a_row(self) -> Self:
        if self.batch_tokens < self.sequence_length:
            raise ValueError("batch_tokens must be at least sequence_length")
        if self.batch_rows < self.workers:
            raise ValueError("every worker needs at least one row of a batch")
        return self

    @property
    def batch_rows(self) -> int:
        return self.batch_tokens // self.sequence_length


class GateSpec(Spec):
    """How much worse than the served version a candidate may be, in nats per token.

    There is a limit for the newest slice and one for every older slice. ``max_backward_transfer`` limits the
    mean change of the older slices' losses since each slice was new; None sets no limit.
    """

    max_new_loss_increase: float = Field(0.0, allow_inf_nan=False)
    max_old_loss_increase: float = Field(0.05, allow_inf_nan=False)
    max_backward_transfer: float | None = Field(None, allow_inf_nan=False)


class ModelSpec(Spec):
    """A model line as a user creates it.

    Without ``tokenizer`` the line trains one, or uses its base checkpoint's. ``auto_update`` makes an
    update of every new data version; ``auto_release`` serves every version that passes the gate.
    """

    name: Name
    dataset: Name
    architecture: ArchitectureSpec = ArchitectureSpec(preset="tiny")
    tokenizer: TokenizerSpec | None = None
    paradigm: ParadigmSpec = PathSwitchingSpec()
    training: TrainingSpec = TrainingSpec()
    gate: GateSpec = GateSpec()
    serving: ServingSpec = DEFAULT_SERVING
    auto_update: bool = True
    auto_release: bool = True

    @model_validator(mode="before")
    @classmethod
    def _from_scratch_replays_nothing_by_default(cls, document: Any) -> Any:
        """Default to no replay for from_scratch, which reads all data in every version anyway."""
        if not isinstance(document, dict):
            return document
        paradigm, training = document.get("paradigm"), document.get("training", {})
        name = paradigm.get("name") if isinstance(paradigm, dict) else getattr(paradigm, "name", None)
        if isinstance(training, TrainingSpec):
            training = training.model_dump(include=training.model_fields_set)
        if name == "from_scratch" and isinstance(training, dict):
            return document | {"training": {"replay_fraction": 0.0} | training}
        return document

    @model_validator(mode="after")
    def _base_brings_its_tokenizer(self) -> Self:
        if self.architecture.base is not None and self.tokenizer is not None:
            raise ValueError("a base checkpoint brings its own tokenizer")
        return self

    @model_validator(mode="after")
    def _nothing_is_replayed_from_scratch(self) -> Self:
        if self.paradigm.name == "from_scratch" and self.training.replay_fraction:
            raise ValueError("from_scratch reads all data for every version: replay_fraction must be 0")
        return self
