"""What one replica answers: requests, each by one of the versions that it holds.

A version that is being tried answers its share; what it fails before anything of the answer has been passed on, the served
version answers instead. Copies of requests for a version in the shadow are answered on the side.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from prometheus_client import Metric

from service.core.serving import ReplicaReport, ServedTarget
from service.core.traffic import Traffic
from workers.serving.best_of import choose_best
from workers.serving.engine.port import EngineError, EngineLoader, QueueFull, SequenceFailed
from workers.serving.generation import (
    Answer,
    Finished,
    Generation,
    RequestRefused,
    Started,
    Token,
    failed,
    overloaded,
)
from workers.serving.metrics import replica_metrics
from workers.serving.outbox import Outbox
from workers.serving.prompting import plan_sequences
from workers.serving.residency import RETRY_SECONDS, Residency, Resident

logger = logging.getLogger(__name__)

ITEM_SECONDS = 0.02  # a batch of a stream every so often, of all streams of a replica: each costs every process on its way
MAX_PAUSE_SECONDS = 0.2
RECOVERY_SECONDS = 30.0  # how long requests wait for a version whose engine is being replaced
MAX_SHADOWS = 4  # copies that are answered at once; those that come meanwhile are not copied


class EngineFailed(Exception):
    """The engine could not finish a request."""


class Replica:
    """Answers for one model line. ``open_export`` verifies and gives the folder of a key."""

    def __init__(
        self,
        replica: str,
        open_export: Callable[[str], Path],
        loader: EngineLoader,
        *,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._residency = Residency(replica, open_export, loader, retry_seconds=retry_seconds)
        self._num_streams = 0
        self._shadows: set[asyncio.Task[None]] = set()

    def set_target(self, target: ServedTarget) -> None:
        self._residency.set_target(target)

    def wait_until_settled(self, timeout_seconds: float | None = None) -> bool:
        """Wait until everything wanted is loaded or has failed once. False when the time is over."""
        return self._residency.wait_until_settled(timeout_seconds)

    def report(self) -> ReplicaReport:
        return self._residency.report()

    def wait_until_answering(self) -> None:
        """Wait until the served version is loaded or has failed once."""
        self._residency.wait_until_answering()

    def metrics(self) -> list[Metric]:
        target = self._residency.target
        model = "" if target is None else target.model
        return replica_metrics(model, self._residency.report(), self._residency.residents())

    @property
    def proven(self) -> bool:
        """Whether the line has answered before."""
        target = self._residency.target
        return target is not None and target.proven

    def healthy(self) -> bool:
        return self._residency.healthy()

    def close(self) -> None:
        """Stop loading and answering; requests in flight fail. Returns without waiting."""
        self._residency.close()

    async def generate(self, request: Generation) -> AsyncGenerator[list[Answer], None]:
        """Answer one request with one version, in batches of whatever is ready; all at once unless it streams.

        What fails before anything has been passed on is answered by the served version where another was tried, or where the
        engine that was asked has been given up, as soon as there is one.
        """
        try:
            resident = await self._take(request)
            for last in (False, True):
                passed_on = False
                try:
                    async with aclosing(self._answer(resident, request)) as batches:
                        async for batch in batches:
                            passed_on = True
                            yield batch
                    return
                except RequestRefused as refusal:
                    # Too busy or too long for what is tried: that says nothing of the version that is served.
                    if last or request.version is not None or not self._is_tried(resident):
                        raise
                    logger.info("version %d refused a request: %s", resident.version.number, refusal)
                except EngineFailed as error:
                    tried = self._is_tried(resident)
                    lost = self._residency.give_up_if_ill(resident)
                    if passed_on or last or request.version is not None or not (tried or lost):
                        raise failed(str(error)) from error
                    logger.warning("version %d failed a request: %s", resident.version.number, error)
                finally:
                    self._residency.give_back(resident)
                resident = await self._take_served()
        except RequestRefused as refusal:
            yield [refusal.refused]

    async def _take(self, request: Generation) -> Resident:
        """Who is to answer; where that is the served version, as ``_take_served``. To be given back. Raises RequestRefused."""
        try:
            return self._residency.take(request.version, request.affinity)
        except RequestRefused:
            if request.version is not None or not self._residency.recovers:
                raise
        # Not drawn again: after some draws everybody would be with the version on trial.
        return await self._take_served()

    async def _take_served(self) -> Resident:
        """Waits for a served version that is loaded in the place of a lost one. To be given back. Raises RequestRefused."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while True:
            try:
                return self._residency.take_served()
            except RequestRefused:
                if not self._residency.recovers or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.05)

    def _is_tried(self, resident: Resident) -> bool:
        target = self._residency.target
        return target is not None and target.trial is not None and target.trial.version == resident.version

    async def _answer(self, resident: Resident, request: Generation) -> AsyncGenerator[list[Answer], None]:
        """Raises RequestRefused and EngineFailed; counts what came of it."""
        self._num_streams += request.stream
        try:
            if request.version is None and not self._is_tried(resident):
                self._shadow(request)
            if request.stream:
                async with aclosing(self._decode(resident, request)) as batches:
                    async for batch in batches:
                        yield batch
            else:
                async with aclosing(self._decode(resident, request)) as batches:
                    answer = [item async for batch in batches for item in batch]
                yield answer if request.best_of is None else choose_best(answer, request)
        finally:
            self._num_streams -= request.stream

    async def _decode(self, resident: Resident, request: Generation) -> AsyncGenerator[list[Answer], None]:
        """Batches of what the engine emits, the first beginning with ``Started``. Raises as ``_answer``."""
        engine, loop = resident.engine, asyncio.get_running_loop()
        try:
            engine.check_room()
            sequences, num_prompt_tokens = await asyncio.to_thread(plan_sequences, request, engine)
            outbox = Outbox(len(sequences), whole=not request.stream)
            # An engine that was given up meanwhile refuses.
            cancel = engine.submit(sequences, outbox.put)
        except RequestRefused:
            raise
        except QueueFull as error:
            self._residency.count(resident, Traffic(refused=1))
            raise overloaded(f"The model is busy: {error}", error.retry_seconds) from error
        except Exception as error:  # e.g. of a chat template, which the version brings with it
            if not isinstance(error, EngineError):
                logger.exception("version %d could not take a request", resident.version.number)
            self._residency.count(resident, Traffic(requests=1, failures=1))
            raise EngineFailed(str(error) or type(error).__name__) from error
        resident.given_up.add(outbox.fail)
        counted = False
        try:
            batch: list[Answer] = [Started(resident.version.number, num_prompt_tokens)]
            unfinished, num_tokens, not_before = len(sequences), 0, 0.0
            while unfinished:
                for event in await outbox.fetch(not_before):
                    if isinstance(event, SequenceFailed):
                        counted = True
                        self._residency.count(resident, Traffic(requests=1, failures=1))
                        raise EngineFailed(event.message)
                    if isinstance(event, Finished):
                        unfinished -= 1
                        num_tokens += event.num_tokens
                    batch.append(event)
                if not unfinished:
                    counted = True
                    done = Traffic(1, 0, num_prompt_tokens, num_tokens, outbox.first_token, outbox.per_token)
                    self._residency.count(resident, done)
                yield batch
                batch = []
                not_before = loop.time() + min(ITEM_SECONDS * self._num_streams, MAX_PAUSE_SECONDS)
        finally:
            if not counted:
                self._residency.count(resident, Traffic(departed=1))
            resident.given_up.discard(outbox.fail)
            cancel()

    # --- versions in the shadow --------------------------------------------------------------------------------------

    def _shadow(self, request: Generation) -> None:
        """Copy a request for the version that is tried, and for the scores, on the side."""
        target = self._residency.target
        trial = None if target is None else target.trial
        if trial is None or random.random() >= trial.shadowed or len(self._shadows) >= MAX_SHADOWS:
            return
        task = asyncio.create_task(
            self._answer_in_the_shadow(request, answers=not trial.share, scored=trial.scored)
        )
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _answer_in_the_shadow(self, request: Generation, *, answers: bool, scored: bool) -> None:
        tried = self._residency.take_tried()
        if tried is None:
            return
        try:
            served = self._residency.take_served()
            try:
                if answers:
                    async for _ in self._decode(tried, replace(request, stream=False)):
                        pass
                if scored:
                    scores = [await self._score(resident, request) for resident in (served, tried)]
                    # Of both or of neither: their means are compared.
                    for resident, traffic in zip((served, tried), scores, strict=True):
                        self._residency.count(resident, traffic)
            finally:
                self._residency.give_back(served)
        except (RequestRefused, EngineFailed) as error:
            logger.info("a request in the shadow came to nothing: %s", error)
        except Exception:  # e.g. of a chat template
            logger.exception("a request in the shadow could not be taken")
        finally:
            self._residency.give_back(tried)

    async def _score(self, resident: Resident, request: Generation) -> Traffic:
        """The loss on the request's prompts, in nats, and how many tokens it is of. Raises as ``_answer``."""
        sampling = replace(request.sampling, max_tokens=0, echo=True, num_logprobs=0, stop=())
        sequences, _ = await asyncio.to_thread(
            plan_sequences, replace(request, sampling=sampling, n=1, best_of=None), resident.engine
        )
        outbox = Outbox(len(sequences), whole=True)
        try:
            cancel = resident.engine.submit(sequences, outbox.put)
        except (QueueFull, EngineError) as error:
            raise EngineFailed(str(error)) from error
        resident.given_up.add(outbox.fail)
        try:
            num_tokens, loss = 0, 0.0
            for event in await outbox.fetch(0.0):
                if isinstance(event, SequenceFailed):
                    self._residency.count(resident, Traffic(requests=1, failures=1))
                    raise EngineFailed(event.message)
                if isinstance(event, Token) and event.logprob is not None:
                    num_tokens += 1
                    loss -= event.logprob
            return Traffic(scored_tokens=num_tokens, scored_loss=loss)
        finally:
            resident.given_up.discard(outbox.fail)
            cancel()
