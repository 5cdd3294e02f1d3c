"""The torch.compile backend's name, `import kvrewrite.backend` where the package is not installed: see `kvrewrite.dynamo`."""

from kvrewrite.dynamo.backend import kvrewrite_backend, new_cache

__all__ = ["kvrewrite_backend", "new_cache"]
