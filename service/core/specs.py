"""What a user asks of a model line, as the API and the store hold it: frozen, closed, with a default that trains."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from service.core.serving_specs import DEFAULT_SERVING, ServingSpec
from service.core.spec import Spec

MAX_PEAK_LR = 1.0
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Fraction01 = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


# --- what a user asks for -------------------------------------------------------------------------------------------


class ArchitectureSpec(Spec):
    """A preset by name, a transformers config, or a base checkpoint: exactly one of them."""

    preset: str | None = None
    config: dict[str, Any] | None = None
    base: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.preset, self.config, self.base)) != 1:
            raise ValueError("give exactly one of preset, config and base")
        return self


class TokenizerTrainSpec(Spec):
    vocab_size: int = Field(4096, ge=260, le=1_000_000)


class TokenizerSpec(Spec):
    """Train one on the first data version, or take the ``tokenizer.json`` at ``path``."""

    train: TokenizerTrainSpec | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.train is None) == (self.path is None):
            raise ValueError("give exactly one of train and path")
        return self


class FixedLength(Spec):
    """Branch length as a fraction of this version's own steps: the paper's rule."""

    rule: Literal["fixed"] = "fixed"
    fraction: float = Field(0.6, gt=0, le=1, allow_inf_nan=False)


class _HeldLength(Spec):
    """Held between ``min`` and ``max`` of this version's steps."""

    min: float = Field(0.05, ge=0, allow_inf_nan=False)
    max: float = Field(gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError("min must not exceed max")
        return self


class ProportionalLength(_HeldLength):
    """Branch length as a fraction of all steps so far, held between ``min`` and ``max`` of this version's steps."""

    rule: Literal["proportional"] = "proportional"
    fraction: float = Field(0.1, gt=0, le=1, allow_inf_nan=False)
    max: float = Field(0.4, gt=0, allow_inf_nan=False)


class AutoLength(_HeldLength):
    """The shortest branch that a loss law, fitted to the line's own losses, puts within ``tolerance`` of the best length.

    ``tolerance`` is of perplexity, as a fraction; lengths are held between ``min`` and ``max`` of this version's steps.
    Until the line has a branch to learn from, the length is a tenth of all steps so far.
    """

    rule: Literal["auto"] = "auto"
    tolerance: float = Field(0.003, gt=0, le=1, allow_inf_nan=False)
    max: float = Field(1.0, gt=0, allow_inf_nan=False)


SpanLength = Annotated[FixedLength | ProportionalLength, Field(discriminator="rule")]
BranchLength = Annotated[FixedLength | ProportionalLength | AutoLength, Field(discriminator="rule")]


class DecaySpec(Spec):
    shape: Literal["1-sqrt", "linear", "cosine", "inverse", "multi_step"] = "1-sqrt"
    floor: Fraction01 = 0.0
    cuts: tuple[float, ...] = ()
    beta2: float | None = Field(None, gt=0, lt=1)
    length: BranchLength = ProportionalLength()
    replay_fraction: Fraction01 = 0.0
    replay_budget: Literal["grown", "kept"] = "grown"

    @model_validator(mode="after")
    def _shape_has_what_it_needs(self) -> Self:
        if self.shape == "inverse" and self.floor == 0:
            raise ValueError("shape inverse needs a floor above 0")
        if self.shape == "multi_step":
            if len(self.cuts) != 2 or not 0 < self.cuts[0] < self.cuts[1] < 1:
                raise ValueError("shape multi_step needs two rising cuts between 0 and 1")
            if self.floor != 0:
                raise ValueError("shape multi_step ends at 0.1 of the peak and takes no floor")
        elif self.cuts:
            raise ValueError("cuts belong to shape multi_step")
        return self


class BranchSpec(DecaySpec):
    """The decay of a branch beside a trunk. Its defaults are what the study in ``docs/study`` found best for half the cost.

    With the rule auto it replays nothing unless it is said: only batches that the trunk reads too tell what a decay gains.
    """

    length: BranchLength = ProportionalLength(fraction=0.085)
    replay_fraction: Fraction01 = 0.75
    replay_budget: Literal["grown", "kept"] = "kept"

    @model_validator(mode="before")
    @classmethod
    def _auto_compares(cls, given: Any) -> Any:
        length = given.get("length") if isinstance(given, dict) else None
        rule = length.get("rule") if isinstance(length, dict) else getattr(length, "rule", None)
        return {"replay_fraction": 0.0} | given if rule == "auto" else given


P = TypeVar("P", bound=Spec)


def _without_auto(paradigm: P, decay: DecaySpec) -> P:
    if decay.length.rule == "auto":
        raise ValueError("the rule auto learns from branches beside a trunk: only path_switching has them")
    return paradigm


class PathSwitchingSpec(Spec):
    name: Literal["path_switching"] = "path_switching"
    decay: BranchSpec = BranchSpec()


class FromScratchSpec(Spec):
    """Every version from initial weights on all data, shuffled, along a ``cosine`` to ``floor`` or warm-up, stable, ``decay``."""

    name: Literal["from_scratch"] = "from_scratch"
    schedule: Literal["cosine", "wsd"] = "cosine"
    floor: Fraction01 = 0.1
    decay: DecaySpec = DecaySpec()  # of ``wsd``; its fraction is one of all steps

    @model_validator(mode="after")
    def _nothing_is_replayed(self) -> Self:
        if self.decay.replay_fraction or self.decay.beta2 is not None:
            raise ValueError("from_scratch reads all data in one run: its decay has no replay and no beta2")
        return _without_auto(self, self.decay)


class ContinualSpec(Spec):
    """Every version from the one before, on the new data: the rate starts over (``reset``, ``rewarm``) or stays ``low``."""

    name: Literal["continual"] = "continual"
    restart: Literal["reset", "rewarm", "low"] = "reset"
    floor: Fraction01 = 0.1
    optimizer_state: Literal["keep", "reset"] = "keep"

    @model_validator(mode="after")
    def _low_is_a_rate(self) -> Self:
        if self.restart == "low" and self.floor == 0:
            raise ValueError("restart low trains at the floor, which must be above 0")
        return self


class WsdSSpec(Spec):
    """One line that decays at the end of every version and goes on from there at the peak rate (arXiv 2410.05192)."""

    name: Literal["wsd_s"] = "wsd_s"
    decay: DecaySpec = DecaySpec()

    @model_validator(mode="after")
    def _every_row_is_read(self) -> Self:
        if self.decay.replay_fraction and self.decay.replay_budget == "kept":
            raise ValueError("wsd_s has no trunk that would read the rows that a kept budget leaves out")
        return _without_auto(self, self.decay)


class MergeSpec(Spec):
    """No decay: a weighted mean of the last trunk checkpoints, ``k`` intervals of the last ``span`` steps (WSM, 2507.17634)."""

    name: Literal["merge"] = "merge"
    k: int = Field(8, ge=1, le=64)
    span: SpanLength = ProportionalLength()
    weights: Literal["1-sqrt", "mean"] = "1-sqrt"


def _named(given: Any) -> Any:
    if isinstance(given, dict) and "name" not in given:
        return given | {"name": "path_switching"}
    return given


ParadigmSpec = Annotated[
    PathSwitchingSpec | FromScratchSpec | ContinualSpec | WsdSSpec | MergeSpec,
    Field(discriminator="name"),
    BeforeValidator(_named),
]


# Made once: to make one takes longer than all that a row of a list takes otherwise.
_PARADIGM: TypeAdapter[ParadigmSpec] = TypeAdapter(ParadigmSpec)


def paradigm_of(plain: dict[str, Any]) -> ParadigmSpec:
    """The paradigm as it is stored. Raises pydantic's ValidationError."""
    return _PARADIGM.validate_python(plain)


class TrainingSpec(Spec):
    """How a line trains. ``workers`` and ``strategy`` may change during its life; the rest decides its bits.

    ``replay_fraction``: of the line's own rows, from the second data version on; a branch has its own.
    """

    sequence_length: int = Field(128, ge=8, le=1 << 20)
    batch_tokens: int = Field(2048, ge=8)
    micro_batch_tokens: int | None = Field(None, ge=8)
    peak_lr: float = Field(2e-3, gt=0, le=MAX_PEAK_LR, allow_inf_nan=False)
    warmup_steps: int = Field(20, ge=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[Fraction01, Fraction01] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0, le=1, allow_inf_nan=False)
    grad_clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    replay_mixture: Literal["equal", "by_size", "recency"] = "equal"
    replay_fraction: Fraction01 = Field(0.15, description="from_scratch, which reads all data: 0")
    epochs: int = Field(1, ge=1, le=1000)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = Field(0, ge=0, lt=1 << 63)
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
    """How much loss (nats per token) a candidate may have over the served version, on the newest and on older slices.

    ``max_backward_transfer``: what older slices may have lost on average since each was new; None: it is not asked.
    """

    max_new_loss_increase: float = Field(0.0, allow_inf_nan=False)
    max_old_loss_increase: float = Field(0.05, allow_inf_nan=False)
    max_backward_transfer: float | None = Field(None, allow_inf_nan=False)


class ModelSpec(Spec):
    name: Name
    dataset: Name
    architecture: ArchitectureSpec = ArchitectureSpec(preset="tiny")
    tokenizer: TokenizerSpec | None = None  # default: train one; with a base: the base's own
    paradigm: ParadigmSpec = PathSwitchingSpec()
    training: TrainingSpec = TrainingSpec()
    gate: GateSpec = GateSpec()
    serving: ServingSpec = DEFAULT_SERVING
    auto_update: bool = True
    auto_release: bool = True

    @model_validator(mode="before")
    @classmethod
    def _from_scratch_has_nothing_to_replay(cls, given: Any) -> Any:
        """Where it is not said, what every version reads anyway is not replayed; the default is for lines that go on."""
        if not isinstance(given, dict):
            return given
        paradigm, training = given.get("paradigm"), given.get("training", {})
        name = paradigm.get("name") if isinstance(paradigm, dict) else getattr(paradigm, "name", None)
        if isinstance(training, TrainingSpec):
            training = training.model_dump(include=training.model_fields_set)
        if name == "from_scratch" and isinstance(training, dict):
            return given | {"training": {"replay_fraction": 0.0} | training}
        return given

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
