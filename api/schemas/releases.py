"""Releases: what was served, and what is asked to be."""

from typing import Annotated, Literal

from pydantic import Field

from api.schemas.common import Document, Request, Text, Time
from service.core.serving import Residence
from service.core.serving_specs import RolloutSpec, ServingSpec
from service.core.states import ReleaseState


class NewRelease(Request):
    """``previous`` is what was served before that which is served now. Without a ``rollout``: the model's own, and none for a
    version that was served before.
    """

    version: Annotated[int, Field(ge=1, lt=1 << 31)] | Literal["previous"]
    reason: Text | None = None
    rollout: RolloutSpec | None = None


class Counted(Document):
    """What a version answered while another was tried; seconds are medians, ``loss`` is in nats per token on prompts."""

    requests: int
    failures: int
    first_token_seconds: float | None
    token_seconds: float | None
    loss: float | None


class Trial(Document):
    """What a canary or a shadow was judged by: the version that was tried, and the one that was served meanwhile."""

    seconds: float
    tried: Counted
    served: Counted


class Release(Document):
    """One line of the history. ``error`` says why it could not be loaded or did not stand its trial."""

    id: str
    model: str
    version: int
    state: ReleaseState
    by: str
    reason: str | None
    error: str | None
    rollout: RolloutSpec | None
    trial: Trial | None
    requested_at: Time
    begun_at: Time | None
    tried_at: Time | None
    promoted_at: Time | None
    released_at: Time | None
    retired_at: Time | None


class ReplicaVersion(Document):
    """A version that a replica holds, is loading, or could not load; what it has answered there since it was loaded."""

    version: int
    state: Residence
    error: str | None
    requests: int
    failures: int
    prompt_tokens: int
    output_tokens: int


class Replica(Document):
    """``version``: what it answers with where none is named; None: it does not answer."""

    replica: str
    version: int | None
    versions: list[ReplicaVersion]


class Serving(Document):
    """What a model should answer with, and what its replicas said last. ``pending``: a version that is on its way.

    ``in_step``: every replica answers with what it should. False also while nothing has been observed.
    """

    model: str
    spec: ServingSpec
    version: int | None
    pending: int | None
    in_step: bool
    observed_at: Time | None
    replicas: list[Replica]
