"""ON EVERY HOST, by value: which versions of the packages are there.

A host may lack kdb-fast, so this module travels to it as a whole, and needs the standard library only.
"""

from __future__ import annotations

PACKAGES = ("kdb-fast", "numpy", "onnxruntime", "fastembed", "tokenizers")
"""Packages that have a part in a vector, or in how it travels."""


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Version of each package, and of Python without its last number; '' for a package that is not installed."""
    import sys
    from importlib import metadata

    found = {"Python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


def difference(here: dict[str, str], there: dict[str, str]) -> str:
    """Why a host with these versions cannot take part, with what to do; '' if it can."""
    if not there["kdb-fast"]:
        return f"kdb-fast is not installed there (pip install 'kdb-fast[ray]=={here['kdb-fast']}')"
    differing = [name for name, version in here.items() if there.get(name) != version]
    said = ", ".join(f"{name} {there.get(name) or 'is missing'}, here {here[name]}" for name in differing)
    return f"{said} (install the same versions)" if said else ""
