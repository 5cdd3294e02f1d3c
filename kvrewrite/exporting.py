"""The steps of a rewritten model as `torch.export` programs; the code is in `kvrewrite.runtime.exported`."""

from kvrewrite.runtime.exported import export_steps, load_steps

__all__ = ["export_steps", "load_steps"]
