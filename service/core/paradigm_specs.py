"""Specs of paradigms, decays and branch lengths: what a user chooses for a model line."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from service.core.spec import Spec

Fraction01 = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


# --- branch lengths -----------------------------------------------------------------------------------------


class FixedLength(Spec):
    """Branch length as a fraction of this version's own steps: the paper's rule."""

    rule: Literal["fixed"] = "fixed"
    fraction: float = Field(0.6, gt=0, le=1, allow_inf_nan=False)


class _BoundedLength(Spec):
    """A length between ``min`` and ``max`` times this version's own steps."""

    min: float = Field(0.05, ge=0, allow_inf_nan=False)
    max: float = Field(gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError("min must not exceed max")
        return self


class ProportionalLength(_BoundedLength):
    """Branch length as a fraction of all steps so far, bounded by ``min`` and ``max``."""

    rule: Literal["proportional"] = "proportional"
    fraction: float = Field(0.1, gt=0, le=1, allow_inf_nan=False)
    max: float = Field(0.4, gt=0, allow_inf_nan=False)


class AutoLength(_BoundedLength):
    """The shortest branch whose predicted perplexity is within ``tolerance`` of the best length's.

    A loss law, fitted to the line's own losses, makes the prediction. ``tolerance`` is a fraction of the
    perplexity; lengths lie between ``min`` and ``max`` times this version's own steps. Until the line has a
    branch to learn from, the length is a tenth of all steps so far.
    """

    rule: Literal["auto"] = "auto"
    tolerance: float = Field(0.003, gt=0, le=1, allow_inf_nan=False)
    max: float = Field(1.0, gt=0, allow_inf_nan=False)


SpanLength = Annotated[FixedLength | ProportionalLength, Field(discriminator="rule")]
BranchLength = Annotated[FixedLength | ProportionalLength | AutoLength, Field(discriminator="rule")]


# --- decays -------------------------------------------------------------------------------------------------


class Decay(Spec):
    """How the rate falls from the peak, and how many older rows are replayed during the decay.

    ``floor`` is a fraction of the peak rate. ``cuts``, for multi_step only, are the fractions of the decay at
    which the rate drops. ``beta2`` replaces the optimizer's second beta. ``replay_fraction`` is the share of
    replayed rows. With the budget "grown" the decay reads every new row and takes extra steps for the replayed
    ones. With "kept" they replace new rows, which are left to the trunk.
    """

    shape: Literal["1-sqrt", "linear", "cosine", "inverse", "multi_step"] = "1-sqrt"
    floor: Fraction01 = 0.0
    cuts: tuple[float, ...] = ()
    beta2: float | None = Field(None, gt=0, lt=1)
    replay_fraction: Fraction01 = 0.0
    replay_budget: Literal["grown", "kept"] = "grown"

    @model_validator(mode="after")
    def _shape_fits_floor_and_cuts(self) -> Self:
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


class DecaySpec(Decay):
    """A decay and the rule for its length."""

    length: BranchLength = ProportionalLength()


class BranchSpec(DecaySpec):
    """The decay of a branch off the trunk, with the defaults that ``docs/study`` found best at half the cost.

    Under the rule auto the default is no replay, because only batches that the trunk reads too show what a
    decay gains.
    """

    length: BranchLength = ProportionalLength(fraction=0.085)
    replay_fraction: Fraction01 = 0.75
    replay_budget: Literal["grown", "kept"] = "kept"

    @model_validator(mode="before")
    @classmethod
    def _auto_replays_nothing_by_default(cls, document: Any) -> Any:
        length = document.get("length") if isinstance(document, dict) else None
        rule = length.get("rule") if isinstance(length, dict) else getattr(length, "rule", None)
        return {"replay_fraction": 0.0} | document if rule == "auto" else document


# --- paradigms ----------------------------------------------------------------------------------------------

P = TypeVar("P", bound=Spec)


def _without_auto(paradigm: P, decay: DecaySpec) -> P:
    if decay.length.rule == "auto":
        raise ValueError("the rule auto learns from branches off a trunk: only path_switching has them")
    return paradigm


class PathSwitchingSpec(Spec):
    """A trunk that stays at the peak rate, and for every version a branch that decays (arXiv 2410.04103)."""

    name: Literal["path_switching"] = "path_switching"
    decay: BranchSpec = BranchSpec()


class FromScratchSpec(Spec):
    """Every version from initial weights, on all data, shuffled.

    The schedule is a ``cosine`` to ``floor``, or ``wsd``: warm-up, stable, ``decay``. The length of the decay
    counts in all steps of the run.
    """

    name: Literal["from_scratch"] = "from_scratch"
    schedule: Literal["cosine", "wsd"] = "cosine"
    floor: Fraction01 = 0.1
    decay: DecaySpec = DecaySpec()

    @model_validator(mode="after")
    def _nothing_is_replayed(self) -> Self:
        if self.decay.replay_fraction or self.decay.beta2 is not None:
            raise ValueError("from_scratch reads all data in one run: its decay has no replay and no beta2")
        return _without_auto(self, self.decay)


class ContinualSpec(Spec):
    """Every version from the one before, on the new data alone.

    The rate starts at the peak again (``reset``), rises to it first (``rewarm``) or stays at the floor
    (``low``).
    """

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
    """One line that decays for every version and then continues at the peak rate (arXiv 2410.05192)."""

    name: Literal["wsd_s"] = "wsd_s"
    decay: DecaySpec = DecaySpec()

    @model_validator(mode="after")
    def _every_row_is_read(self) -> Self:
        if self.decay.replay_fraction and self.decay.replay_budget == "kept":
            raise ValueError("wsd_s has no trunk to read the rows that a kept budget leaves out")
        return _without_auto(self, self.decay)


class MergeSpec(Spec):
    """A weighted mean of trunk checkpoints in place of a decay (WSM, arXiv 2507.17634).

    The checkpoints divide the last ``span`` steps of the trunk into ``k`` intervals.
    """

    name: Literal["merge"] = "merge"
    k: int = Field(8, ge=1, le=64)
    span: SpanLength = ProportionalLength()
    weights: Literal["1-sqrt", "mean"] = "1-sqrt"


def _name_the_default(document: Any) -> Any:
    if isinstance(document, dict) and "name" not in document:
        return document | {"name": "path_switching"}
    return document


ParadigmSpec = Annotated[
    PathSwitchingSpec | FromScratchSpec | ContinualSpec | WsdSSpec | MergeSpec,
    Field(discriminator="name"),
    BeforeValidator(_name_the_default),
]


# Built once: building the adapter costs more than everything else that a row of a list needs.
_PARADIGM: TypeAdapter[ParadigmSpec] = TypeAdapter(ParadigmSpec)


def paradigm_of(document: dict[str, Any]) -> ParadigmSpec:
    """The paradigm from its stored JSON. Raises pydantic's ValidationError."""
    return _PARADIGM.validate_python(document)
