"""Verbs where a model's experts are rows of a table: what they take, `pack` and `run` of it."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moe_tool.budget.request import parse_memory_option
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import Output
from moe_tool.cli.verb import options_from
from moe_tool.errors import UsageError

if TYPE_CHECKING:
    from moe_tool.cli.pack import PackArguments
    from moe_tool.cli.run import RunArguments
    from moe_tool.models.locate import LocatedModel

_PACK_TAKES = {"model", "bits", "out", "profiles", "revision", "tokenizer", "offline"}
_TAKEN = {
    *("bundle", "memory", "threads", "throttle", "seed"),
    *("stdin", "prompt", "prompt_file", "max_tokens", "context", "temperature", "raw"),
    *("ignore_eos", "data", "tokens", "seq_len", "reference", "offline", "prompt_tokens"),
    *("generate", "depth", "repetitions", "cache", "random", "format"),
}
"""Options that mean something for a lookup bundle, of `run`, `evaluate` and `bench`"""


def is_lookup_folder(folder: Path) -> bool:
    """Return whether a verb is given a lookup bundle."""
    from moe_tool.formats.lookup_bundle import is_lookup_bundle

    return is_lookup_bundle(folder)


def pack_rows(given: "PackArguments", located: "LocatedModel", output: Output) -> None:
    """Write the experts of a MoLE as rows."""
    from moe_tool.lookup.pack_lookup import pack_lookup, parse_row_bits

    _require_only(given, _PACK_TAKES, "a mixture of lookup experts is packed without it")
    report = pack_lookup(
        located, bits=parse_row_bits(given.bits), out=given.out, progress=output.progress
    )
    output.say(
        f"wrote {report.bundle}/: {format_bytes(report.bytes)} (checkpoint: "
        f"{format_bytes(report.checkpoint_bytes)}), of which a table of "
        f"{format_bytes(report.table_bytes)}, {report.form}, {format_bytes(report.row_bytes)} for "
        f"a token; {report.seconds:.1f} s, peak memory {format_bytes(report.peak_rss_bytes)}"
    )
    output.say(
        f"proven by a forward of {report.proof_tokens} tokens through both: "
        f"{report.proof_kl:.3g} nats per token away from the checkpoint"
    )
    output.say(f'next: moe-tool run {report.bundle}/ --prompt "The list"')
    output.result(report)


def run_rows(given: "RunArguments", prompt: str, output: Output) -> None:
    """Generate text from a lookup bundle."""
    from moe_tool.lookup.run_lookup import run_lookup
    from moe_tool.runtime.decoding_config import GenerateOptions
    from moe_tool.store.throttle import parse_throttle

    require_rows_options(given)
    result = run_lookup(
        given.bundle,
        prompt,
        memory=parse_memory_option(given.memory),
        context=given.context,
        threads=given.threads,
        generation=options_from(given, GenerateOptions),
        throttle=None if given.throttle is None else parse_throttle(given.throttle),
        on_text=output.stream,
        progress=output.progress,
    )
    output.stream("\n")
    output.say(
        f"\n{result.prompt_tokens} + {result.generated_tokens} tokens · first after "
        f"{result.seconds_to_first_token:.2f} s · {result.tokens_per_second:.1f} tokens/s · "
        f"{result.rows_read} rows read, {format_bytes(result.row_bytes_read)}, "
        f"{format_bytes(result.row_bytes)} each · peak memory "
        f"{format_bytes(result.peak_rss_bytes)} of {format_bytes(result.memory_budget_bytes)}"
    )
    output.result(result)
    if result.interrupted:
        output.say("interrupted")
        raise typer.Exit(130)


def require_rows_options(given: Any) -> None:
    """Refuse options of `run`, `evaluate` and `bench` that say how experts stay or are missed.

    Raises:
        UsageError: one is given.
    """
    _require_only(given, _TAKEN, "the experts of a lookup bundle are rows that never stay")


def _require_only(given: Any, taken: set[str], reason: str) -> None:
    """Refuse options that would have no effect."""
    for field in fields(given):
        if field.name not in taken and getattr(given, field.name) != field.default:
            option = field.name.replace("_", "-")
            raise UsageError(f"--{option}: {reason}", hint=f"leave --{option} out")
