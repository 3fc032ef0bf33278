"""``pytest --database-faults 0.01``: the tests as they are, while calls of the product to its databases fail.

Faults go into the databases that the API's application and the orchestrators open, not into those by which tests arrange
and look. Tests must pass unchanged, as both come again: the orchestrator with its next tick, the client with the same
key. So only tests with a fixture that has such a product in it are run. What cannot hold under faults by its nature says so
with ``@pytest.mark.no_database_faults("why")``.
"""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

import api.main
from service.orchestrator.loop import Orchestrator
from service.store.database import Database
from tests.support.database_faults import Faults
from tests.support.patient_http import patient

# Fixtures with an API or an orchestrator in them.
PRODUCTS = frozenset({"house", "plane", "postgres_plane", "each_plane", "new_plane", "workers"})
MARK = "no_database_faults"


class FaultMode:
    """The plugin that the option registers."""

    def __init__(self, faults: Faults, report: Path | None) -> None:
        self._faults = faults
        self._report = report
        self._patch = pytest.MonkeyPatch()
        self._opened: list[Database] = []
        self._selected = self._others = 0
        self._excluded: Counter[str] = Counter()

    def pytest_sessionstart(self) -> None:
        """Put the faults into the product's two doors, and patience into the third: what speaks HTTP."""
        own, tick = Orchestrator.__post_init__, Orchestrator.tick

        def with_faults(orchestrator: Orchestrator) -> None:
            if type(orchestrator.database) is Database:  # a test's own kind of database stays
                orchestrator.database = self._open(orchestrator.database.url)
                self._opened.append(orchestrator.database)
            own(orchestrator)

        def tick_again(orchestrator: Orchestrator) -> bool:
            moved = False
            while True:
                failed = self._faults.counts.failed
                moved |= tick(orchestrator)
                if self._faults.counts.failed == failed:
                    return moved

        self._patch.setattr(Orchestrator, "__post_init__", with_faults)
        self._patch.setattr(Orchestrator, "tick", tick_again)
        self._patch.setattr(api.main, "Database", self._open)
        self._patch.setattr(
            httpx.HTTPTransport, "handle_request", patient(httpx.HTTPTransport.handle_request)
        )
        self._faults.on = True

    @pytest.hookimpl(trylast=True)  # -m and -k have chosen already
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen, left_out = [], []
        for item in items:
            mark = item.get_closest_marker(MARK)
            if PRODUCTS.isdisjoint(getattr(item, "fixturenames", ())):
                self._others += 1
            elif mark is not None:
                self._excluded[mark.args[0]] += 1
            else:
                chosen.append(item)
                continue
            left_out.append(item)
        self._selected = len(chosen)
        items[:] = chosen
        config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> object:
        try:
            return (yield)
        finally:
            for (
                database
            ) in self._opened:  # of all tests: an orchestrator may be several tests' and connect anew
                database.close()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._patch.undo()
        counts = self._faults.counts
        if not (counts.before and counts.after):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self._report is not None:
            figures = asdict(counts) | {"tests": self._selected, "excluded": self._excluded.total()}
            self._report.write_text(json.dumps(figures))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        faults, counts, line = self._faults, self._faults.counts, terminalreporter.write_line
        terminalreporter.section(f"{faults.rate:.2%} of database calls fail, seed {faults.seed}")
        line(f"{self._selected:>9,} tests under faults, {self._others:,} without an API or an orchestrator")
        line(f"{self._excluded.total():>9,} excluded by a mark")
        for reason, count in self._excluded.most_common():
            line(f"{count:>13,} {reason}")
        line(f"{counts.calls:>9,} calls")
        line(f"{counts.before:>9,} failed before they were done")
        line(f"{counts.after:>9,} done but reported failed, {counts.after_commit:,} of them commits")
        if not (counts.before and counts.after):
            line("no call failed: nothing was tested")

    def _open(self, url: str) -> Database:
        database = Database(url)
        self._faults.inject(database)
        return database
