"""Training of retaining heads and Attention-Gates; not imported by `import kvrewrite`.

`train` is what `kvrewrite train` calls. data: texts from files; trainer: transformers' Trainer around a `Task`; locret and
gate: the tasks.
"""

from kvrewrite.tools.training.train import train
from kvrewrite.tools.training.trainer import FitOptions, Task, fit

__all__ = ["FitOptions", "Task", "fit", "train"]
