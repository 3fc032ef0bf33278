"""``pytest --database-faults 0.01``: runs ordinary tests while the product's database calls fail at random.

Only the databases opened by the API and the orchestrators fail, not those that tests use for set-up and checks. Tests
must pass unchanged because both retry: the orchestrator on its next tick, the client with the same idempotency key. Only
tests with a fixture that contains an API or an orchestrator run. A test that cannot pass under faults is marked
``@pytest.mark.no_database_faults("why")``.
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

# Fixtures that contain an API or an orchestrator.
PRODUCT_FIXTURES = frozenset({"harness", "plane", "postgres_plane", "each_plane", "new_plane", "workers"})
MARK = "no_database_faults"


class FaultMode:
    """The pytest plugin behind ``--database-faults``."""

    def __init__(self, faults: Faults, report: Path | None) -> None:
        self._faults = faults
        self._report = report
        self._patch = pytest.MonkeyPatch()
        self._opened: list[Database] = []
        self._selected = self._unaffected = 0
        self._excluded: Counter[str] = Counter()

    def pytest_sessionstart(self) -> None:
        """Inject faults into the orchestrator and the API, and make HTTP clients retry."""
        post_init, tick = Orchestrator.__post_init__, Orchestrator.tick

        def with_faults(orchestrator: Orchestrator) -> None:
            if type(orchestrator.database) is Database:  # keep a test's own subclass
                orchestrator.database = self._open(orchestrator.database.url)
                self._opened.append(orchestrator.database)
            post_init(orchestrator)

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

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        selected, deselected = [], []
        for item in items:
            mark = item.get_closest_marker(MARK)
            if PRODUCT_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
                self._unaffected += 1
            elif mark is not None:
                self._excluded[mark.args[0]] += 1
            else:
                selected.append(item)
                continue
            deselected.append(item)
        self._selected = len(selected)
        items[:] = selected
        config.hook.pytest_deselected(items=deselected)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> object:
        try:
            return (yield)
        finally:
            # Not only this test's: an orchestrator may serve several tests and connect again.
            for database in self._opened:
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
        line(
            f"{self._selected:>9,} tests under faults, {self._unaffected:,} without an API or an orchestrator"
        )
        line(f"{self._excluded.total():>9,} excluded by a marker")
        for reason, count in self._excluded.most_common():
            line(f"{count:>13,} {reason}")
        line(f"{counts.calls:>9,} calls")
        line(f"{counts.before:>9,} failed before they executed")
        line(f"{counts.after:>9,} executed but reported a failure, {counts.after_commit:,} of them commits")
        if not (counts.before and counts.after):
            line("no call failed, so the run tested nothing")

    def _open(self, url: str) -> Database:
        database = Database(url)
        self._faults.inject(database)
        return database
