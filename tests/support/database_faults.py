"""Random database faults: a call fails before it has an effect, or it succeeds but reports a failure."""

import random
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import event

from service.store.database import Database

RATE = 0.01


@dataclass
class FaultCounts:
    calls: int = 0
    before: int = 0
    after: int = 0
    after_commit: int = 0

    @property
    def failed(self) -> int:
        return self.before + self.after

    def add(self, other: "FaultCounts") -> None:
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class Faults:
    """Fails a share ``rate`` of all statements and commits: half of them before they execute, half after."""

    seed: int
    rate: float = RATE
    on: bool = False
    counts: FaultCounts = field(default_factory=FaultCounts)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()

    def inject(self, database: Database) -> None:
        """Inject faults into a database. Its engine must not have connected yet."""
        dialect: Any = database.engine.dialect
        failure = dialect.loaded_dbapi.OperationalError
        commit = dialect.do_commit

        def do_commit(connection: Any) -> None:
            self._call(lambda: commit(connection), failure, is_commit=True)

        dialect.do_commit = do_commit

        def do_execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
            self._call(lambda: cursor.execute(statement, parameters), failure)
            return True  # tells SQLAlchemy that the statement has been executed

        def do_executemany(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
            self._call(lambda: cursor.executemany(statement, parameters), failure)
            return True

        event.listen(database.engine, "do_execute", do_execute)
        event.listen(database.engine, "do_executemany", do_executemany)

    def _call(
        self, execute: Callable[[], object], failure: type[Exception], *, is_commit: bool = False
    ) -> None:
        before, after = self._draw(is_commit=is_commit)
        if before:
            raise failure("chaos: failed before it was executed")
        execute()
        if after:
            raise failure("chaos: executed, but the reply was lost")

    def _draw(self, *, is_commit: bool) -> tuple[bool, bool]:
        """Whether this call fails before it executes, and whether it fails after."""
        with self._lock:
            if not self.on:
                return False, False
            fails = self._random.random() < self.rate
            before = fails and self._random.random() < 0.5
            after = fails and not before
            self.counts.add(FaultCounts(1, before, after, after and is_commit))
            return before, after
