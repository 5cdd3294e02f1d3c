"""Errors that users meet. Each message says what was got, what was expected and what to do."""

from __future__ import annotations


class KVRewriteError(Exception):
    """Base of every error that kvrewrite raises on purpose."""


class CaptureError(KVRewriteError):
    """The model could not be turned into a graph."""


class UnsupportedModelError(KVRewriteError):
    """The model was captured, but it cannot be rewritten honestly; names the layer and the reason."""


class OptionError(KVRewriteError, ValueError):
    """An unknown policy or an option that makes no sense."""


class PolicyWeightsError(KVRewriteError):
    """Policy weights that are missing, extra, of the wrong shape or dtype, or for another base model."""


class ArtifactError(KVRewriteError):
    """A model directory that is missing, damaged, unsafe or of a newer format."""


class CacheError(KVRewriteError, ValueError):
    """A cache that does not belong to this call (other model, other batch size), or that is full."""


class PoolFull(CacheError):
    """A pool of pages with a limit has too few for the next step, which did not begin: nothing has changed."""


class InputError(KVRewriteError, ValueError):
    """Token ids, masks or positions that the model cannot take."""


class ArgumentError(InputError, TypeError):
    """An argument that `forward` does not know: it might change the result, so it is not ignored."""


class TrainingError(KVRewriteError):
    """Training data that can't be used, or a run that went wrong."""
