"""Which versions of vLLM the plug-in was written against."""

from __future__ import annotations

SUPPORTED = ("0.24", "0.25", "0.26", "0.29", "0.30", "0.31", "0.32")
NAMED = "0.24 to 0.26 (with torch 2.11) and 0.29 to 0.32 (with torch 2.13)"


def why_not(version: str) -> str | None:
    """The reason why the plug-in does not run under a version of vLLM, or None."""
    if ".".join(version.split(".")[:2]) in SUPPORTED:
        return None
    return (
        f"this is vLLM {version}, but directories of kvrewrite run under vLLM {NAMED}, whose interfaces were read and tested. "
        "Install one of these, or serve the directory with `kvrewrite serve`"
    )
