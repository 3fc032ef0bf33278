"""A database that fails at random calls: before it has done what was asked, or after, and only says that it has failed."""

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
    """Fails ``rate`` of statements and of commits: half of those before they are done, half of those after."""

    seed: int
    rate: float = RATE
    on: bool = False
    counts: FaultCounts = field(default_factory=FaultCounts)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._lock = threading.Lock()

    def inject(self, database: Database) -> None:
        """Into a database from whose engine nothing has connected yet."""
        dialect: Any = database.engine.dialect
        failure = dialect.loaded_dbapi.OperationalError
        commit = dialect.do_commit

        def do_commit(connection: Any) -> None:
            self._call(lambda: commit(connection), failure, is_commit=True)

        dialect.do_commit = do_commit

        def do_execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
            self._call(lambda: cursor.execute(statement, parameters), failure)
            return True  # it is done: the dialect need not

        def do_executemany(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
            self._call(lambda: cursor.executemany(statement, parameters), failure)
            return True

        event.listen(database.engine, "do_execute", do_execute)
        event.listen(database.engine, "do_executemany", do_executemany)

    def _call(self, act: Callable[[], object], failure: type[Exception], *, is_commit: bool = False) -> None:
        before, after = self._drawn(is_commit=is_commit)
        if before:
            raise failure("chaos: it was not done")
        act()
        if after:
            raise failure("chaos: it was done, and its answer is lost")

    def _drawn(self, *, is_commit: bool) -> tuple[bool, bool]:
        """Whether this call fails before it is done, and after."""
        with self._lock:
            if not self.on:
                return False, False
            fails = self._chance.random() < self.rate
            before = fails and self._chance.random() < 0.5
            after = fails and not before
            self.counts.add(FaultCounts(1, before, after, after and is_commit))
            return before, after
