"""`moe-tool run`: a bundle and a prompt in, text out."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_tool.byte_sizes import format_bytes
from moe_tool.cli.console import open_output
from moe_tool.cli.options import (
    MAX_CONTEXT,
    BundleArgument,
    EvictionOption,
    GatesOption,
    JsonOption,
    LossyPrefillOption,
    PolicyOption,
    PrefetchOption,
    ResidencyOption,
    RunMemoryOption,
    SeedOption,
    SparseExpertsOption,
    ThreadsOption,
)
from moe_tool.errors import DataSourceError, NotFoundError, UsageError
from moe_tool.text.text_encoding import UTF8_BOM, conversion_hint

if TYPE_CHECKING:
    from moe_tool.runtime.generation import RunResult


def run(
    bundle: BundleArgument,
    stdin: Annotated[
        str | None,
        typer.Argument(metavar="-", help="A dash reads the prompt from stdin.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="The prompt.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", metavar="FILE", help="A UTF-8 file.", show_default=False),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens to generate at most.")
    ] = 128,
    context: Annotated[
        int,
        typer.Option(
            "--context",
            metavar="N",
            min=1,
            max=MAX_CONTEXT,
            help="Tokens of prompt and text together.",
        ),
    ] = 4096,
    memory: RunMemoryOption = None,
    policy: PolicyOption = None,
    residency: ResidencyOption = None,
    eviction: EvictionOption = None,
    prefetch: PrefetchOption = None,
    sparse_experts: SparseExpertsOption = None,
    gates: GatesOption = True,
    shadow: Annotated[
        int,
        typer.Option(
            "--shadow",
            metavar="N",
            min=0,
            help="Compute every Nth token also exactly and measure what the policy lost in that "
            "step; 0: none.",
        ),
    ] = 0,
    lossy_prefill: LossyPrefillOption = False,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", metavar="T", min=0, help="0 always takes the likeliest token."
        ),
    ] = 0.0,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    record_trace: Annotated[
        Path | None,
        typer.Option(
            "--record-trace",
            metavar="FILE",
            help="Write which experts every layer called, for `simulate`.",
            show_default=False,
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The prompt as it is, without the model's chat template.")
    ] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Generate text from a bundle inside a memory budget."""
    with open_output(as_json=json) as output:
        text = _read_prompt(stdin, prompt, prompt_file)

        from moe_tool.runtime.generation import GenerateOptions, run_prompt
        from moe_tool.runtime.run_options import RunOptions

        result = run_prompt(
            bundle,
            text,
            options=RunOptions(
                memory=memory,
                policy=policy,
                residency=residency,
                eviction=eviction,
                prefetch=prefetch,
                sparse_experts=sparse_experts,
                gates=gates,
                shadow=shadow,
                lossy_prompt=lossy_prefill,
                seed=seed,
                threads=threads,
                context=context,
            ),
            generation=GenerateOptions(
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                raw=raw,
                ignore_eos=ignore_eos,
            ),
            on_text=output.stream,
            trace_path=record_trace,
            progress=output.progress,
        )
        output.stream("\n")
        output.say(_footer(result))
        if record_trace is not None:
            output.say(f"wrote {record_trace}; next: moe-tool simulate {record_trace}")
        output.result(asdict(result))
        if result.interrupted:
            output.say("interrupted")
            raise typer.Exit(130)


def _footer(result: "RunResult") -> str:
    parts = [
        f"{result.prompt_tokens} + {result.generated_tokens} tokens"
        + (", where the context ends" if result.stop_reason == "context" else ""),
        f"first after {result.seconds_to_first_token:.2f} s",
        f"{result.tokens_per_second:.1f} tokens/s",
        f"hit rate {result.hit_rate:.1%}",
        f"{format_bytes(result.bytes_read_per_token)} read per token",
        f"stalled {result.stall_seconds:.2f} s",
        f"{result.substitutions} substitutions",
        f"peak memory {format_bytes(result.peak_rss_bytes)} "
        f"of {format_bytes(result.memory_budget_bytes)}",
    ]
    if result.prefetches:
        used = f"{result.prefetch_hits} used, {format_bytes(result.prefetched_bytes)}"
        parts.insert(-1, f"{result.prefetches} prefetches ({used})")
    if result.sparse_experts is not None:
        parts.insert(-1, _sparsity(result))
    if result.lowered:
        parts.insert(-1, f"{result.lowered} by replicas")
    if result.drops:
        spared = format_bytes(result.spared_bytes_per_token)
        parts.insert(-1, f"{result.drops} drops ({spared} per token not read for them)")
    changed = result.prompt_substitutions + result.prompt_lowered + result.prompt_drops
    if changed:
        parts.insert(-1, _of_prompt(result))
    if result.expected_kl:
        parts.insert(-1, _quality(result))
    return "\n" + " · ".join(parts)


def _sparsity(result: "RunResult") -> str:
    whole = result.whole_bytes_per_token
    read = "" if not whole else f", {result.bytes_read_per_token / whole:.0%} of whole misses read"
    return f"{result.sparsity:.1%} of channels left out{read}"


def _of_prompt(result: "RunResult") -> str:
    """What a lossy prefill answered otherwise."""
    text = (
        f"in the prompt {result.prompt_substitutions} substitutions, {result.prompt_lowered} by "
        f"replicas, {result.prompt_drops} drops"
    )
    if result.prompt_expected_kl is not None:
        text += f", expected KL {result.prompt_expected_kl:.4f} per token"
    return text


def _quality(result: "RunResult") -> str:
    """What the answers are expected to have cost, beside what was measured of it."""
    parts = [f"expected KL {result.expected_kl:.4f} per token"]
    if result.expected_kl_limit is not None:
        parts[0] += f" of {result.expected_kl_limit:g}"
    if result.retreated_tokens:
        parts.append(f"{result.retreated_tokens} tokens answered exactly to keep it")
    if result.shadow_kl is not None:
        parts.append(
            f"measured {result.shadow_kl:.4f} a step on {result.shadow_tokens} of them, where "
            f"{result.shadow_expected_kl or 0.0:.4f} was expected ({result.shadow_seconds:.1f} s)"
        )
    return ", ".join(parts)


def _read_prompt(stdin: str | None, prompt: str | None, prompt_file: Path | None) -> str:
    if stdin not in (None, "-"):
        raise UsageError(
            f"unexpected argument '{stdin}'",
            hint=f"a prompt goes after --prompt: --prompt '{stdin}'",
        )
    if sum(given is not None for given in (stdin, prompt, prompt_file)) != 1:
        raise UsageError(
            "one prompt is needed", hint='--prompt "The list", --prompt-file FILE or - for stdin'
        )
    if prompt is not None:
        return prompt
    if prompt_file == Path("-"):
        prompt_file = None
    where = "stdin" if prompt_file is None else str(prompt_file)
    try:
        data = sys.stdin.buffer.read() if prompt_file is None else prompt_file.read_bytes()
        return data.removeprefix(UTF8_BOM).decode("utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(
            f"there is no prompt file {where}", hint='--prompt "TEXT" takes the text itself'
        ) from error
    except UnicodeDecodeError as error:
        raise DataSourceError(
            f"the prompt in {where} is not UTF-8 text: {error}",
            hint=conversion_hint(prompt_file, beginning=data[:4]),
        ) from error
