"""The command line: each command is thin over the Python API.

Machine output (--json) and generated text go to stdout; progress, tables for people and errors go to stderr, except the
tables that a command is asked for. Exit status: 0 fine, 1 refused or failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvrewrite import __version__
from kvrewrite.errors import ArtifactError, KVRewriteError, OptionError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvrewrite.analysis.memory import MemoryPlan
    from kvrewrite.ir.site import AttentionSite
    from kvrewrite.policies import Policy

STAGES = 5  # what `convert` reports: building, capturing, finding, inserting, writing


# ------------------------------------------------------------------------------------------------------------- errors
class Command(click.Command):
    """A command whose errors are one message and an exit status, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"copyreg|torch\..*")
        try:
            return super().invoke(ctx)
        except KVRewriteError as error:
            self._fail(ctx, error, str(error))
        except KeyboardInterrupt:
            click.echo("interrupted; nothing half-written was left", err=True)
            ctx.exit(130)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            self._fail(ctx, error, str(error))

    @staticmethod
    def _fail(ctx: click.Context, error: Exception, message: str) -> None:
        if ctx.params.get("as_json"):
            click.echo(json.dumps({"error": message, "type": type(error).__name__}))
        click.echo(f"error: {message}", err=True)
        ctx.exit(1)


class Group(click.Group):
    """Commands that report errors as `Command` does."""

    command_class = Command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvrewrite")
def main() -> None:
    """Puts KV-cache eviction into decoder LLMs."""


# ------------------------------------------------------------------------------------------------------------ helpers
def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _out() -> Console:
    """stdout; wide when it is not a terminal, so that tables in files and pipes are not cut."""
    import sys

    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def _checkpoint_directory(model: str) -> Path:
    """MODEL as a directory; says how to download what looks like a hub name."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise ArtifactError(f"{model} is a file; expected the checkpoint directory that holds config.json and weights")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        name = path.name
        raise ArtifactError(
            f"{model} is not a local directory, and kvrewrite downloads nothing. If it is a name on the Hugging Face "
            f"Hub, download it first:\n  hf download {model} --local-dir {name}\nand then give the directory {name}"
        )
    raise ArtifactError(f"{model} does not exist; expected a local checkpoint directory (config.json and safetensors)")


def parse_value(text: str, hint: str) -> Any:
    """`text` as one of the types in an annotation such as "int | None"; ValueError where it is none."""
    kinds = [k.strip() for k in hint.split("|")]
    if "None" in kinds and text.lower() in ("none", "null"):
        return None
    for kind in kinds:
        if kind == "bool":
            if text.lower() in ("true", "yes", "on", "1"):
                return True
            if text.lower() in ("false", "no", "off", "0"):
                return False
            raise ValueError("true or false")
        if kind == "int" and re.fullmatch(r"[+-]?\d[\d_]*", text):
            return int(text)
        if kind == "float":
            try:
                return float(text)
            except ValueError:
                continue
        if kind == "str":
            return text
    raise ValueError(hint.replace("int", "an integer").replace("float", "a number").replace(" | ", " or "))


def parse_options(policy: str, pairs: Iterable[str], **given: Any) -> dict[str, Any]:
    """`key=value` pairs as the policy's fields want them. given: options with a flag of their own, None if unset."""
    from kvrewrite.policies import ALIASES, POLICIES
    from kvrewrite.policies.base import annotation

    policy = ALIASES.get(policy, policy)
    hints = {f.name: annotation(f) for f in dataclasses.fields(POLICIES[policy])} if policy in POLICIES else {}
    # An unknown option goes through as it is: the policy names it and its likely spelling.
    return parse_pairs(policy, pairs, hints, {k: v for k, v in given.items() if v is not None})


def parse_pairs(
    policy: str, pairs: Iterable[str], hints: Mapping[str, str], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`key=value` pairs as values of the types in `hints`; a key without a hint keeps its text. given: what is set already."""
    options = dict(given or {})
    for pair in pairs:
        key, sign, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or not key:
            raise click.BadParameter(f"{pair!r} is not of the form key=value", param_hint="--option")
        if key in options:
            raise click.BadParameter(f"{key} is given twice", param_hint="--option")
        try:
            options[key] = parse_value(text.strip(), hints[key]) if key in hints else text
        except ValueError as error:
            raise OptionError(f"{policy}: {key} is {text!r}, expected {error}") from error
    return options


@contextmanager
def _steps(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar of named steps on stderr."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=_err(), transient=True) as progress:
        task = progress.add_task("starting", total=total + 1)

        def step(name: str) -> None:
            progress.update(task, advance=1, description=name)

        yield step


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr that is told (what, done, of)."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=_err(), transient=True) as progress:
        task = progress.add_task("starting", total=1)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=max(1, total))

        yield report


def _column(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def sites_table(sites: list[AttentionSite], brief: bool = False) -> Table:
    """Every attention site, a row each. brief: without what no site has, and without what was inserted."""
    from rich.table import Table

    def flag(value: bool) -> str:
        return "yes" if value else "-"

    rows = []
    for s in sites:
        rows.append(
            {
                "layer": str(s.layer),
                "module": _column(s.module or "(top)"),
                "heads": str(s.heads),
                "kv heads": str(s.kv_heads),
                "head dim": str(s.head_dim) if s.head_dim == s.v_head_dim else f"{s.head_dim}, v {s.v_head_dim}",
                "latent": f"{s.latent} + {s.latent_rotary}{' cached' * s.latent_cached}" if s.latent else "-",
                "mask": f"{s.mask} {s.window or s.chunk}" if s.window or s.chunk else s.mask,
                "scale": f"{s.scale:.5g}",
                "softcap": f"{s.softcap:g}" if s.softcap else "-",
                "sinks": flag(s.sinks),
                "ALiBi": flag(s.alibi),
                "RoPE": flag(s.rope),
                "source": s.source,
                "shares k, v with": "-" if s.shares_kv_with is None else f"layer {s.shares_kv_with}",
                "inserted": ", ".join(s.inserted) or "-",
            }
        )
    optional = {"latent", "shares k, v with", "inserted"} | ({"softcap", "sinks", "ALiBi"} if brief else set())
    hidden = {name for name in optional if all(row[name] == "-" for row in rows)} | ({"inserted"} if brief else set())
    table = Table(title=f"{len(sites)} attention sites", title_justify="left")
    names = [name for name in (rows[0] if rows else {}) if name not in hidden]
    for name in names:
        numeric = name in ("layer", "heads", "kv heads", "head dim")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name not in ("module", "inserted"))
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def memory_table(plans: list[MemoryPlan]) -> Table:
    """Estimated cache bytes by context length."""
    from rich.table import Table

    from kvrewrite.analysis.memory import human

    table = Table(title=f"cache memory, estimated, batch {plans[0].batch}", title_justify="left")
    for name in ("context", "full cache", "evicted", "peak in prefill", "saved"):
        table.add_column(name, justify="right")
    for p in plans:
        saved = f"{1 - p.evicted / p.full:.1%}" if p.full > p.evicted else "-"
        table.add_row(f"{p.context:,}", human(p.full), human(p.evicted), human(p.peak), saved)
    if plans[0].carried:
        table.caption = f"of each {human(plans[0].carried)} for what layers without attention carry, at any length"
        table.caption_justify = "left"
    return table


def _settings(policy: dict[str, Any]) -> str:
    return f"{policy['name']} (" + ", ".join(f"{k}={v}" for k, v in policy["options"].items()) + ")"


AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
TRUST = click.option(
    "--trust-compiled", is_flag=True,
    help="Load the steps that DIRECTORY has compiled (--compile aot): native code, so only from whom you trust.",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- commands
@main.command()
@click.argument("model")
@click.option("--policy", "-p", default="streaming_llm", show_default=True, help="See `kvrewrite policies`.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the model directory.")
@click.option("--policy-weights", type=click.Path(path_type=Path), help="safetensors file of trained policy weights.")
@click.option(
    "--budget", help="Slots per row, layer and kv head after an eviction (1024), or a part of the text (0.25, 25%)."
)
@click.option("--chunk", type=int, help="Tokens of a prompt that are processed together.")
@click.option("--option", "-o", "options", multiple=True, metavar="KEY=VALUE", help="Any other option of the policy.")
@click.option("--context", "contexts", type=click.IntRange(min=1), multiple=True, help="Context length(s) to estimate.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size to estimate.")
@click.option("--max-length", type=int, help="Where RoPE depends on the length (dynamic NTK): the length to fix it at.")
@click.option(
    "--check", type=click.Choice(["full", "sites", "off"]), default="full", show_default=True,
    help="What is proved by running the rewritten graph beside the captured one: all of it, each attention alone, nothing.",
)  # fmt: skip
@click.option("--link", is_flag=True, help="Hard-link the base weights instead of copying them.")
@click.option("--force", is_flag=True, help="Replace an existing model directory.")
@click.option("--dry-run", is_flag=True, help="Print the sites and the memory estimate; write nothing.")
@click.option(
    "--compile", "compiled", type=click.Choice(["aot"]),
    help="Add the model compiled ahead of time by AOTInductor. Loads the weights and takes minutes.",
)  # fmt: skip
@click.option("--compile-device", default="cpu", show_default=True, help="With --compile: where it will run.")
@click.option(
    "--compile-batch", type=click.IntRange(1, 2), default=1, show_default=True,
    help="With --compile: 1 row, or 2 for any number from 2 on.",
)  # fmt: skip
@AS_JSON
def convert(
    model: str, policy: str, out: Path | None, policy_weights: Path | None, budget: str | None, chunk: int | None,
    options: tuple[str, ...], contexts: tuple[int, ...], batch: int, max_length: int | None, check: str, link: bool,
    force: bool, dry_run: bool, compiled: str | None, compile_device: str, compile_batch: int, as_json: bool,
) -> None:  # fmt: skip
    """Converts the checkpoint directory MODEL to a model directory whose cache evicts.

    The weights are neither loaded nor changed: they are copied byte for byte (or linked). With --compile they are loaded.
    """
    from kvrewrite import policies
    from kvrewrite.cli.evaluate import parse_budget

    if out is None and not dry_run:
        raise click.UsageError("give --out DIR, or --dry-run to write nothing")
    if compiled and dry_run:
        raise click.UsageError("--compile writes to --out, so it does not go with --dry-run")
    if not compiled and (compile_device != "cpu" or compile_batch != 1):
        raise click.UsageError("--compile-device and --compile-batch need --compile aot")
    directory = _checkpoint_directory(model)
    given = parse_options(policy, options, budget=None if budget is None else parse_budget(budget), chunk=chunk)
    policies.make(policy, **given)  # wrong options are said before torch is loaded
    from kvrewrite import api
    from kvrewrite.analysis.model_card import proof_text

    where = _device(compile_device, "--compile-device") if compiled else compile_device
    started = time.perf_counter()
    with _steps(STAGES - dry_run) as progress:
        done = api.convert(
            directory, None if dry_run else out, policy, policy_weights=policy_weights, max_length=max_length,
            contexts=list(contexts) or None, batch=batch, check=check, link=link, force=force, progress=progress,
            compile=compiled, compile_device=where, compile_batch=compile_batch, **given,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    if as_json:
        _print_json(
            {
                "out": None if done.out is None else str(done.out),
                "dry_run": dry_run,
                "policy": done.program.policy,
                "sites": [s.as_dict() for s in done.program.sites],
                "dtype": done.program.dtype,
                "proof": done.program.proof,
                "weights_bytes": done.weights_bytes,
                "memory": [dataclasses.asdict(p) for p in done.plans],
                "seconds": round(seconds, 3),
            }
        )
        return
    console = _out()
    console.print(sites_table(done.program.sites))
    console.print(memory_table(done.plans))
    console.print(f"policy: {_column(_settings(done.program.policy))}", soft_wrap=True)
    console.print(f"proved: {_column(proof_text(done.program.proof))}", soft_wrap=True)
    if done.out is None:
        console.print("dry run: nothing was written")
    else:
        console.print(f"written in {seconds:.1f} s: {_column(str(done.out))}", soft_wrap=True)


@main.command()
@click.argument("directory")
@click.option("--prompt", help="The prompt.")
@click.option("--prompt-file", type=click.Path(allow_dash=True), help="A file with the prompt; - reads stdin.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--sample", is_flag=True, help="Sample instead of taking the likeliest token.")
@click.option("--temperature", type=float, help="With --sample.")
@click.option("--top-p", type=float, help="With --sample.")
@click.option("--seed", type=int, default=0, show_default=True, help="With --sample.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--chat", is_flag=True, help="Put the prompt into the tokenizer's chat template.")
@TRUST
def generate(
    directory: str, prompt: str | None, prompt_file: str | None, max_new_tokens: int, sample: bool,
    temperature: float | None, top_p: float | None, seed: int, device: str, chat: bool, trust_compiled: bool,
) -> None:  # fmt: skip
    """Generates text with the converted model in DIRECTORY; text on stdout, memory on stderr."""
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give one of --prompt and --prompt-file")
    if not sample and (temperature is not None or top_p is not None):
        raise click.UsageError("--temperature and --top-p need --sample")
    if prompt_file is not None:
        with click.open_file(prompt_file, encoding="utf-8") as file:
            prompt = file.read()
    from kvrewrite.artifact import directory as artifact

    artifact.read_manifest(directory)
    import torch
    from transformers import TextStreamer

    from kvrewrite import api
    from kvrewrite.artifact.companions import read_tokenizer

    where = _device(device)
    tokenizer = read_tokenizer(directory)
    if chat:
        if not tokenizer.chat_template:
            raise OptionError("--chat: this model's tokenizer has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        tokens = tokenizer(prompt, return_tensors="pt")
    ids = tokens["input_ids"]
    if ids.shape[1] == 0:
        raise OptionError("the prompt has no tokens")
    model: Any = api.load(directory, device=where, trust_compiled=trust_compiled)
    cache = model.new_cache(1, max_length=ids.shape[1] + max_new_tokens)
    chosen = {"temperature": temperature, "top_p": top_p}
    settings = {k: v for k, v in chosen.items() if v is not None}
    torch.manual_seed(seed)
    started = time.perf_counter()
    out = model.generate(
        ids.to(where),
        attention_mask=torch.ones_like(ids).to(where),
        cache=cache,
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **settings,
    )
    seconds = time.perf_counter() - started
    made = out.shape[1] - ids.shape[1]
    click.echo(memory_line(model, cache, int(ids.shape[1]), int(made), seconds), err=True)


def _device(name: str, option: str = "--device") -> Any:
    """The device called `name`, if it is here; option: what it was given by."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"{option} {name}: {str(error).splitlines()[0]}") from error
    return device


def memory_line(model: Any, cache: Any, prompt: int, made: int, seconds: float) -> str:
    """What a generation's cache held, beside what a full cache would have."""
    from kvrewrite.analysis.memory import carried_bytes, human, plan_memory

    memory = cache.memory()
    seen, carried = max(cache.seen), carried_bytes(model.program.layout)
    full = plan_memory(model.sites, model.policy, model.dtype.itemsize, seen, cache.batch_size, carried).full
    return (
        f"{prompt} prompt + {made} new tokens in {seconds:.1f} s; cache: {human(memory.live)} live, "
        f"{human(memory.leased)} leased; a full cache of {seen} tokens: {human(full)}"
    )


@main.command()
@click.argument("directory")
@click.option(
    "--tokens", type=click.IntRange(min=2), default=48, show_default=True, help="Length of the compared text."
)
@click.option("--no-hashes", is_flag=True, help="Do not hash the files.")
@click.option("--device", default="cpu", show_default=True)
@AS_JSON
def verify(directory: str, tokens: int, no_hashes: bool, device: str, as_json: bool) -> None:
    """Checks a converted model: file hashes, and logits against the unmodified model in the same directory."""
    from kvrewrite.artifact import directory as artifact

    artifact.read_manifest(directory)
    from transformers.utils import logging

    from kvrewrite.verification import verify as run

    logging.disable_progress_bar()  # there is one bar already
    where = _device(device)
    with _bar() as progress:
        report = run(directory, tokens=tokens, hashes=not no_hashes, device=where, progress=progress)
    if as_json:
        _print_json(report.as_dict())
    else:
        from rich.table import Table

        table = Table(title=f"{_column(report.what)} ({report.dtype}, {report.sites} sites)", title_justify="left")
        for name in ("check", "result", "max difference", "tolerance", "detail"):
            table.add_column(name, overflow="fold")
        results: dict[bool | None, str] = {
            True: "[green]ok[/]",
            False: "[red]FAILED[/]",
            None: "[yellow]not checked[/]",
        }
        for c in report.checks:
            numbers = ["-" if n is None else f"{n:.2e}" for n in (c.difference, c.tolerance)]
            table.add_row(c.name, results[c.ok], *numbers, _column(c.detail))
        _out().print(table)
        click.echo(f"{'ok' if report.ok else 'FAILED'} in {report.seconds:.1f} s")
    if not report.ok:
        failed = ", ".join(c.name for c in report.checks if c.ok is False)
        click.echo(f"error: verification failed: {failed}", err=True)
        raise click.exceptions.Exit(1)


def _policy_data(policy: type[Policy]) -> dict[str, Any]:
    from kvrewrite.policies.base import annotation

    options = {f.name: {"type": annotation(f), "default": f.default} for f in dataclasses.fields(policy)}
    return {
        "name": policy.name,
        "summary": policy.summary,
        "source": policy.source,
        "needs_weights": policy.needs_weights,
        "options": options,
    }


@main.command()
@click.argument("name", required=False)
@AS_JSON
def policies(name: str | None, as_json: bool) -> None:
    """Lists the eviction policies, or describes one."""
    import inspect as inspection

    from rich.table import Table

    from kvrewrite.policies import ALIASES, POLICIES, Policy, make

    name = ALIASES.get(name, name) if name else None
    if name is not None and name not in POLICIES:
        make(name)  # raises, with the likely spelling
    chosen = [POLICIES[name]] if name else list(POLICIES.values())
    data = [_policy_data(p) for p in chosen]
    if as_json:
        _print_json(data[0] if name else data)
        return
    console = _out()
    if name is None:
        table = Table()
        for title in ("policy", "what it keeps", "source", "trained weights", "options"):
            table.add_column(title, overflow="fold")
        shared = {f.name: f.default for f in dataclasses.fields(Policy)}
        for d in data:
            own = {k: v["default"] for k, v in d["options"].items() if k not in shared or v["default"] != shared[k]}
            options = ", ".join(f"{k}={v}" for k, v in own.items())
            table.add_row(
                d["name"], _column(d["summary"]), d["source"], "needed" if d["needs_weights"] else "-", options
            )
        console.print(table)
        listed = ", ".join(f"{k}={v}" for k, v in shared.items())
        console.print(f"Options that every policy has, with their defaults unless the table says otherwise: {listed}")
        return
    console.print(inspection.cleandoc(chosen[0].__doc__ or ""), soft_wrap=True, markup=False)
    table = Table()
    for title in ("option", "type", "default"):
        table.add_column(title)
    for option, value in data[0]["options"].items():
        table.add_row(option, value["type"], str(value["default"]))
    console.print(table)


@main.command("import-weights")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The safetensors file to write.")
@click.option("--policy", "-p", help="Whose format SOURCE has, as its authors publish it; checked then.")
@click.option("--force", is_flag=True, help="Overwrite it.")
@AS_JSON
def import_weights(source: Path, out: Path, policy: str | None, force: bool, as_json: bool) -> None:
    """Turns published trained heads into safetensors for --policy-weights. Nothing in a pickle is run.

    With --policy: locret, locret_q (a .bin file), kvzap (model.safetensors or its directory), fast_kvzip (a .pt file), trim_kv
    (trimkv_weights.pth or its directory), duo_attention (full_attention_heads.tsv or its directory). Without: any torch
    pickle of tensors, under the names that it has.
    """
    metadata: dict[str, str] = {}
    if policy is None:
        from kvrewrite.policies.weights import import_pickle

        tensors = import_pickle(source, out, force=force)
    else:
        from kvrewrite.policies.published import import_published

        tensors, metadata = import_published(source, out, policy, force=force)
    if as_json:
        shapes = {n: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in tensors.items()}
        _print_json({"out": str(out), "tensors": shapes, **({"metadata": metadata} if metadata else {})})
    else:
        if metadata:
            click.echo(", ".join(f"{k} {v}" for k, v in metadata.items()))
        click.echo(f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} values: {out}")


@main.command()
@click.option("--out", type=click.Path(path_type=Path), help="Keep the models in this directory.")
@click.option("--force", is_flag=True, help="Replace an earlier demo in --out.")
def demo(out: Path | None, force: bool) -> None:
    """Converts the small model that ships with kvrewrite and compares policies on it: offline, on a CPU, in a minute."""
    from kvrewrite.tools.demo import run

    run(out, force=force)


from kvrewrite.cli.evaluate import register  # noqa: E402

register(main)

from kvrewrite.cli.bench import register as register_bench  # noqa: E402

register_bench(main)

from kvrewrite.cli.train import register as register_train  # noqa: E402

register_train(main)

from kvrewrite.cli.serve import register as register_serve  # noqa: E402

register_serve(main)

from kvrewrite.cli.inspect import register as register_inspect  # noqa: E402

register_inspect(main)

if __name__ == "__main__":
    main()
