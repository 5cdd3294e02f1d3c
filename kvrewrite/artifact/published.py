"""Turns published trained heads into policy weights: `kvrewrite import-weights FILE --policy NAME`.

Each policy reads the format of its authors' public code (`read_published`, at the commit that the policy names). Nothing in
a file is run: pickles are read with `weights_only=True`. A file of another format, an incomplete one, or one that
contradicts itself is refused with what was found and what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvrewrite.artifact.checkpoint import lfs_message, text_is_lfs
from kvrewrite.artifact.policy_weights import check_destination, flatten, read_pickle, save_policy_weights
from kvrewrite.errors import OptionError, PolicyWeightsError
from kvrewrite.policies import ALIASES, POLICIES, Policy
from kvrewrite.policies.published import Published


def import_published(
    path: str | Path, out: str | Path, policy: str, *, force: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Turns a published file (or its directory) into a safetensors file for `policy`; returns tensors and metadata.

    Raises OptionError for policies without such files, PolicyWeightsError if the file does not fit.
    """
    known = [name for name, cls in POLICIES.items() if cls.published]
    policy = ALIASES.get(policy, policy)
    if policy not in known:
        raise OptionError(f"--policy {policy}: no trained heads are known for it; expected one of {', '.join(known)}")
    out = Path(out)
    check_destination(out, force)
    tensors, metadata = POLICIES[policy].read_published(PublishedFile(_file(Path(path), POLICIES[policy])))
    metadata = {"policy": policy, **metadata}
    save_policy_weights(out, tensors, metadata)
    return tensors, metadata


def _file(path: Path, policy: type[Policy]) -> Path:
    """The file itself if a directory is given."""
    if not path.is_dir():
        if not path.is_file():
            raise PolicyWeightsError(f"{path} does not exist; expected {policy.published}")
        return path
    found = [path / n for n in policy.published_as if (path / n).is_file()]
    if not found:
        has = f"has no {' or '.join(policy.published_as)}" if policy.published_as else "is a directory"
        raise PolicyWeightsError(f"{path} {has}; expected {policy.published}")
    return found[0]


class PublishedFile(Published):
    """A file on disk."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a safetensors file or a pickle, under dotted names."""
        if self.path.suffix != ".safetensors":
            return flatten(self.path, read_pickle(self.path))
        self._refuse_pointer()
        try:
            return load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise PolicyWeightsError(f"{self.path} is not a whole safetensors file ({error}); copy it again") from error

    def state_dicts(self, key: str, what: str, data_types: Sequence[Any] = ()) -> list[dict[str, Tensor]]:
        """The state_dicts in the list that a pickled dict has under `key`."""
        content = read_pickle(self.path, data_types)
        found = content.get(key) if isinstance(content, Mapping) else None
        if not isinstance(found, (list, tuple)) or not found or not all(isinstance(f, Mapping) for f in found):
            raise self.error(f'expected a dict with a list of {what} under "{key}"')
        return [flatten(self.path, part) for part in found]

    def text(self) -> str:
        """A text file's content."""
        self._refuse_pointer()
        try:
            return self.path.read_text(encoding="utf-8")
        except ValueError as error:
            raise self.error(f"not a text: {error}") from error

    def config(self) -> dict[str, Any]:
        """The config.json beside the file; empty if there is none."""
        config = self.path.parent / "config.json"
        if not config.is_file():
            return {}
        try:
            found = json.loads(config.read_text())
        except (OSError, ValueError) as error:
            raise PolicyWeightsError(f"{config} is not JSON ({error}); copy it again") from error
        if not isinstance(found, dict):
            raise PolicyWeightsError(f"{config} holds a {type(found).__name__}, expected a JSON object")
        return found

    def _refuse_pointer(self) -> None:
        if text_is_lfs(self.path):
            raise PolicyWeightsError(lfs_message(self.path))
