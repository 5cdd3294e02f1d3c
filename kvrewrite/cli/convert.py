"""The command `kvrewrite convert`."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path

import click

from kvrewrite.artifact.local_directory import checkpoint_directory, gguf_file
from kvrewrite.cli.options import AS_JSON, parse_budget, parse_bytes, parse_options
from kvrewrite.cli.shared import Command, find_device, named_steps, print_json, settings_text, stdout_console
from kvrewrite.tools.tables import escaped, memory_table, sites_table

STAGES = 5  # that `convert` reports: building, capturing, finding, inserting, writing


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "--policy", "-p", help="See `kvrewrite policies`. Default: chosen for --memory, or keydiff with 2048 slots."
)
@click.option(
    "--memory",
    "memory_text",
    metavar="SIZE",
    help="What the cache may take (8GiB): finds policy and budget, or the budget.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the model directory.")
@click.option("--policy-weights", type=click.Path(path_type=Path), help="safetensors file of trained policy weights.")
@click.option(
    "--budget", help="Slots per row, layer and kv head after an eviction (1024), or a part of the text (0.25, 25%)."
)
@click.option("--chunk", type=int, help="Tokens of a prompt that are processed together.")
@click.option("--option", "-o", "options", multiple=True, metavar="KEY=VALUE", help="Any other option of the policy.")
@click.option(
    "--prefill", type=click.Choice(["minference"]), help="Sparse attention of prompts (docs/sparse_prefill.md)."
)
@click.option(
    "--patterns",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --prefill: which part of attention each head computes (kvrewrite search-patterns). Default: one pattern for all.",
)
@click.option("--context", "contexts", type=click.IntRange(min=1), multiple=True, help="Context length(s) to estimate.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size to estimate.")
@click.option("--max-length", type=int, help="Where RoPE depends on the length (dynamic NTK): the length to fix it at.")
@click.option(
    "--check",
    type=click.Choice(["full", "sites", "off"]),
    default="full",
    show_default=True,
    help="What is proved by running the rewritten model beside the original: all of it, each attention alone, or nothing.",
)
@click.option("--link", is_flag=True, help="Hard-link the base weights instead of copying them.")
@click.option("--force", is_flag=True, help="Replace an existing model directory.")
@click.option("--dry-run", is_flag=True, help="Print the sites and the memory estimate; write nothing.")
@click.option(
    "--compile",
    "compiled",
    type=click.Choice(["aot"]),
    help="Add the model compiled ahead of time by AOTInductor. Loads the weights and takes minutes.",
)
@click.option("--compile-device", default="cpu", show_default=True, help="With --compile: where it will run.")
@click.option(
    "--compile-batch",
    type=click.IntRange(1, 2),
    default=1,
    show_default=True,
    help="With --compile: 1 row, or 2 for any number from 2 on.",
)
@AS_JSON
def convert(
    model: str,
    policy: str | None,
    memory_text: str | None,
    out: Path | None,
    policy_weights: Path | None,
    budget: str | None,
    chunk: int | None,
    options: tuple[str, ...],
    prefill: str | None,
    patterns: Path | None,
    contexts: tuple[int, ...],
    batch: int,
    max_length: int | None,
    check: str,
    link: bool,
    force: bool,
    dry_run: bool,
    compiled: str | None,
    compile_device: str,
    compile_batch: int,
    as_json: bool,
) -> None:
    """Converts the checkpoint directory MODEL to a model directory whose cache evicts.

    The weights are neither loaded nor changed: they are copied byte for byte (or linked). With --compile they are
    loaded. MODEL may also be a GGUF file, or a directory with one: its weights are loaded and unpacked.

    \b
    Examples:
      kvrewrite convert MODEL --policy keydiff --budget 1024 --out small
      kvrewrite convert MODEL --memory 8GiB --context 131072 --out small
    """
    from kvrewrite import policies
    from kvrewrite.policies import Policy
    from kvrewrite.policies.default import DEFAULT, default_policy

    if out is None and not dry_run:
        raise click.UsageError("give --out DIR, or --dry-run to write nothing")
    if compiled and dry_run:
        raise click.UsageError("--compile writes to --out, so it does not go with --dry-run")
    if not compiled and (compile_device != "cpu" or compile_batch != 1):
        raise click.UsageError("--compile-device and --compile-batch need --compile aot")
    if memory_text is not None and budget is not None:
        raise click.UsageError("--memory finds the budget, so --budget does not go with it")
    if memory_text is not None and policy is None and (options or chunk is not None or policy_weights is not None):
        raise click.UsageError(
            "--memory chooses a policy; --option, --chunk and --policy-weights need one: give --policy"
        )
    memory = None if memory_text is None else parse_bytes(memory_text, "--memory")
    if patterns is not None and prefill is None:
        raise click.UsageError("--patterns needs --prefill minference")
    packed = gguf_file(model)
    directory = checkpoint_directory(model) if packed is None else packed
    given = parse_options(
        policy or DEFAULT, options, budget=None if budget is None else parse_budget(budget), chunk=chunk
    )
    named: str | Policy | None = policy
    if policy is not None:
        policies.make(policy, **given)  # wrong options fail before torch is loaded
    elif memory is None:
        named, said = default_policy(given)
        given = {}
        click.echo(said, err=True)
    from kvrewrite import api
    from kvrewrite.analysis.model_card import proof_text
    from kvrewrite.artifact.gguf import unpacked

    where = find_device(compile_device, "--compile-device") if compiled else compile_device
    started = time.perf_counter()
    with ExitStack() as opened:
        if packed is not None:  # transformers shows its own progress
            click.echo(f"unpacking the weights of {packed}", err=True)
            directory = opened.enter_context(unpacked(packed, None if dry_run else out))
        progress = opened.enter_context(named_steps(STAGES - dry_run))
        done = api.convert(
            directory,
            None if dry_run else out,
            named,
            memory=memory,
            policy_weights=policy_weights,
            max_length=max_length,
            contexts=list(contexts) or None,
            batch=batch,
            check=check,
            link=link or packed is not None,  # the unpacked weights are ours
            force=force,
            progress=progress,
            compile=compiled,
            compile_device=where,
            compile_batch=compile_batch,
            prefill=prefill if patterns is None else patterns,
            **given,
        )
    seconds = time.perf_counter() - started
    if as_json:
        print_json(
            {
                "out": None if done.out is None else str(done.out),
                "dry_run": dry_run,
                "policy": done.program.policy,
                "why": None if done.choice is None else done.choice.why,
                "sites": [s.as_dict() for s in done.program.sites],
                "dtype": done.program.dtype,
                "proof": done.program.proof,
                "weights_bytes": done.weights_bytes,
                "memory": [dataclasses.asdict(p) for p in done.plans],
                "seconds": round(seconds, 3),
            }
        )
        return
    console = stdout_console()
    console.print(sites_table(done.program.sites))
    console.print(memory_table(done.plans))
    for sentence in done.choice.why if done.choice is not None else ():
        console.print(f"chosen: {escaped(sentence)}", soft_wrap=True)
    console.print(f"policy: {escaped(settings_text(done.program.policy))}", soft_wrap=True)
    console.print(f"proved: {escaped(proof_text(done.program.proof))}", soft_wrap=True)
    if done.out is None:
        console.print("dry run: nothing was written")
    else:
        console.print(f"written in {seconds:.1f} s: {escaped(str(done.out))}", soft_wrap=True)
