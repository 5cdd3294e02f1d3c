"""Files that ship with the package."""

from pathlib import Path

__all__ = ["small_model", "small_policies"]


def small_model() -> Path:
    """The folder of the small trained model, for `from_pretrained`: a Llama of 4.5M parameters with its own tokenizer.

    Its README.md says how it was made and what it was measured to do. `kvrewrite.tools.evaluation.tasks` makes what it can read.
    """
    return Path(__file__).parent / "small"


def small_policies() -> dict[str, Path]:
    """Trained policy weights for the small model, by the policy's name; docs/training.md says how they were made."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "small_policies").glob("*.safetensors"))}
