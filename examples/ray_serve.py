"""Replicas of a converted model on Ray Serve, with OpenAI's API (docs/batching.md):

    serve run examples.ray_serve:application model=DIR replicas=2 gpus_per_replica=1

Each replica has the application of `kvrewrite serve`, and so answers many requests at once. Ray Serve chooses the replica, and
replaces one that can't serve any more. The same words are arguments of the application in a Serve configuration (`serve deploy`).
"""

from pathlib import Path

import kvrewrite
from kvrewrite.artifact.companions import read_tokenizer
from kvrewrite.artifact.directory import read_manifest
from kvrewrite.cli.options import parse_bytes
from kvrewrite.errors import OptionError

try:
    from pydantic import BaseModel, Field
    from ray import serve
    from starlette.applications import Starlette

    from kvrewrite.serving import Capacity, Engine, free_share, make_app
except ImportError as error:
    raise SystemExit(f"this example needs Ray ({error}): pip install 'ray[serve]' 'kvrewrite[serve]'") from error


# Ray Serve reads the type of `application`'s argument, so annotations are not strings in this file.
class Settings(BaseModel, extra="forbid"):
    """Arguments of the application. model: a converted directory, on every node; name: what clients call it. memory: for the
    pages of a replica, such as 8GiB; default: 80% of what is free on its GPU. requests: those that a replica has at once."""

    model: str
    name: str | None = None
    replicas: int = Field(1, ge=1)
    gpus_per_replica: float = Field(0, ge=0, le=1)
    cpus_per_replica: float = Field(1, ge=0)
    memory: str | None = None
    max_new_tokens: int = Field(1024, ge=1)
    requests: int = Field(64, ge=1)


def load_app(settings: Settings) -> Starlette:
    """The application of one replica, with its engine in `state.engine`."""
    gpu = settings.gpus_per_replica > 0
    model = kvrewrite.load(settings.model, device="cuda" if gpu else "cpu")
    if gpu:
        model.compile()
    memory = None if settings.memory is None else parse_bytes(settings.memory, "memory")
    engine = Engine(
        model,
        read_tokenizer(settings.model),
        max_new_tokens=settings.max_new_tokens,
        waiting=settings.requests,
        capacity=Capacity(max_requests=settings.requests, memory=memory or free_share(model.device)),
    )
    if gpu:
        engine.warm_up()
    app = make_app(engine, settings.name or Path(settings.model).name)
    app.state.engine = engine
    return app


def application(settings: Settings) -> serve.Application:
    """The application of Ray Serve. Raises ArtifactError or OptionError for settings that no replica could have."""
    settings = settings.model_copy(update={"model": str(Path(settings.model).resolve())})
    read_manifest(settings.model)
    if settings.memory is not None:
        parse_bytes(settings.memory, "memory")
    elif 0 < settings.gpus_per_replica < 1:
        raise OptionError("replicas that share a GPU need memory, such as memory=8GiB")

    def make() -> Starlette:
        return load_app(settings)

    @serve.deployment(
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.requests,  # of a replica; Ray Serve keeps the others
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
    )
    @serve.ingress(make)
    class Replica:
        def check_health(self) -> None:
            """Ray Serve asks for this, and replaces a replica where it raises."""
            if not self.app.state.engine.alive:
                raise RuntimeError("the thread that runs the model has ended")

    return Replica.bind()
