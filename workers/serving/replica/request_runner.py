"""Runs one request on one loaded model, and counts its outcome."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace

from service.core.traffic import Traffic
from workers.serving.engine.port import EngineError, QueueFull, SequenceFailed, SequenceRequest
from workers.serving.generation import (
    AnswerItem,
    Finished,
    Generation,
    RejectionError,
    Started,
    Token,
    overloaded,
)
from workers.serving.replica.best_of import choose_best
from workers.serving.replica.model_pool import LoadedModel, ModelPool
from workers.serving.replica.output_queue import OutputQueue
from workers.serving.replica.prompting import plan_sequences

logger = logging.getLogger(__name__)

# A stream sends one batch per interval, which grows with the number of streams: each batch costs about 1 ms
# in every process that it crosses.
BATCH_SECONDS_PER_STREAM = 0.02
MAX_BATCH_SECONDS = 0.2

FAILURE = Traffic(requests=1, failures=1)


class EngineFailed(Exception):
    """The engine could not finish a request."""


class RequestRunner:
    """Runs requests on loaded models. All methods raise RejectionError and EngineFailed."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool
        self._num_streams = 0

    async def run(self, model: LoadedModel, request: Generation) -> AsyncGenerator[list[AnswerItem], None]:
        """Yield batches as they are ready if the request streams, else the whole answer as one batch."""
        self._num_streams += request.stream
        try:
            async with aclosing(self.decode(model, request)) as batches:
                if request.stream:
                    async for batch in batches:
                        yield batch
                else:
                    answer = [item async for batch in batches for item in batch]
                    yield answer if request.best_of is None else choose_best(answer, request)
        finally:
            self._num_streams -= request.stream

    async def decode(self, model: LoadedModel, request: Generation) -> AsyncGenerator[list[AnswerItem], None]:
        """Yield the engine's output for all candidates in batches. The first batch begins with ``Started``."""
        loop = asyncio.get_running_loop()
        with ExitStack() as stack:
            try:
                model.engine.check_room()
                sequences, num_prompt_tokens = await asyncio.to_thread(plan_sequences, request, model.engine)
                output = stack.enter_context(_submitted(model, sequences, whole=not request.stream))
            except RejectionError:
                raise
            except QueueFull as error:
                self._pool.count(model, Traffic(refused=1))
                raise overloaded(f"The model is busy: {error}", error.retry_seconds) from error
            except Exception as error:  # e.g. from a chat template, which comes with the version
                if not isinstance(error, EngineError):
                    logger.exception("version %d could not start a request", model.version.number)
                self._pool.count(model, FAILURE)
                raise EngineFailed(str(error) or type(error).__name__) from error
            counted = False
            try:
                batch: list[AnswerItem] = [Started(model.version.number, num_prompt_tokens)]
                unfinished, num_tokens, not_before = len(sequences), 0, 0.0
                while unfinished:
                    for event in await output.get(not_before):
                        if isinstance(event, SequenceFailed):
                            counted = True
                            self._pool.count(model, FAILURE)
                            raise EngineFailed(event.message)
                        if isinstance(event, Finished):
                            unfinished -= 1
                            num_tokens += event.num_tokens
                        batch.append(event)
                    if not unfinished:
                        counted = True
                        traffic = Traffic(
                            requests=1,
                            prompt_tokens=num_prompt_tokens,
                            output_tokens=num_tokens,
                            first_token=output.first_token,
                            per_token=output.per_token,
                        )
                        self._pool.count(model, traffic)
                    yield batch
                    batch = []
                    pause = min(BATCH_SECONDS_PER_STREAM * self._num_streams, MAX_BATCH_SECONDS)
                    not_before = loop.time() + pause
            finally:
                if not counted:
                    self._pool.count(model, Traffic(departed=1))

    async def score(self, model: LoadedModel, request: Generation) -> Traffic:
        """Return the loss on the request's prompts in nats and its number of tokens, without counting them."""
        sampling = replace(request.sampling, max_tokens=0, echo=True, num_logprobs=0, stop=())
        sequences, _ = await asyncio.to_thread(
            plan_sequences, replace(request, sampling=sampling, n=1, best_of=None), model.engine
        )
        with ExitStack() as stack:
            try:
                output = stack.enter_context(_submitted(model, sequences, whole=True))
            except (QueueFull, EngineError) as error:
                raise EngineFailed(str(error)) from error
            num_tokens, loss = 0, 0.0
            for event in await output.get(0.0):
                if isinstance(event, SequenceFailed):
                    self._pool.count(model, FAILURE)
                    raise EngineFailed(event.message)
                if isinstance(event, Token) and event.logprob is not None:
                    num_tokens += 1
                    loss -= event.logprob
            return Traffic(scored_tokens=num_tokens, scored_loss=loss)


@contextmanager
def _submitted(
    model: LoadedModel, sequences: Sequence[SequenceRequest], *, whole: bool
) -> Iterator[OutputQueue]:
    """Decode the sequences until the block ends. Raises QueueFull and EngineError."""
    output = OutputQueue(len(sequences), whole=whole)
    cancel = model.engine.submit(sequences, output.put)
    model.on_lost.add(output.fail)
    try:
        yield output
    finally:
        model.on_lost.discard(output.fail)
        cancel()
