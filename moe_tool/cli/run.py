"""`moe-tool run`: generate text from a bundle."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from moe_tool.cli.console import Output
from moe_tool.cli.lookup import is_lookup_folder, run_rows
from moe_tool.cli.options import (
    MAX_CONTEXT,
    ActivationsOption,
    BundleArgument,
    EvictionOption,
    GatesOption,
    LossyPrefillOption,
    PolicyOption,
    PrefetchOption,
    ResidencyOption,
    RowsOption,
    RunMemoryOption,
    SeedOption,
    SparseExpertsOption,
    ThreadsOption,
    ThrottleOption,
)
from moe_tool.cli.verb import options_from, verb
from moe_tool.errors import DataSourceError, NotFoundError, UsageError
from moe_tool.text.text_encoding import UTF8_BOM, conversion_hint


@dataclass(frozen=True, slots=True, kw_only=True)
class RunArguments:
    bundle: BundleArgument
    stdin: Annotated[
        str | None, typer.Argument(metavar="-", help="A dash reads the prompt from stdin.")
    ] = None
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt.")] = None
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A UTF-8 file.")] = None
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens to generate at most.")
    ] = 128
    context: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=MAX_CONTEXT, help="Tokens of prompt and text together."
        ),
    ] = 4096
    memory: RunMemoryOption = None
    policy: PolicyOption = None
    residency: ResidencyOption = None
    eviction: EvictionOption = None
    prefetch: PrefetchOption = None
    rows: RowsOption = None
    sparse_experts: SparseExpertsOption = None
    activations: ActivationsOption = "float32"
    throttle: ThrottleOption = None
    gates: GatesOption = True
    shadow: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Measure the policy's loss in every Nth token, which becomes exact; 0: none. "
            "By default as often as the text needs it where a loss is to be kept, else never.",
        ),
    ] = None
    lossy_prefill: LossyPrefillOption = False
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T", min=0, help="Sampling temperature; 0 always takes the likeliest token."
        ),
    ] = 0.0
    seed: SeedOption = 0
    threads: ThreadsOption = None
    record_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the experts that every layer called, for `simulate`."
        ),
    ] = None
    raw: Annotated[
        bool, typer.Option("--raw", help="Use the prompt without the model's chat template.")
    ] = False
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue after the end-of-text token.")
    ] = False


@verb
def run(given: RunArguments, output: Output) -> None:
    """Generate text from a bundle inside a memory budget."""
    text = _read_prompt(given.stdin, given.prompt, given.prompt_file)
    if is_lookup_folder(given.bundle):
        run_rows(given, text, output)
        return

    from moe_tool.reports.run_lines import run_line
    from moe_tool.runtime.decoding_config import GenerateOptions
    from moe_tool.runtime.generation import run_prompt
    from moe_tool.runtime.run_options import run_options

    options = run_options(
        memory=given.memory,
        policy=given.policy,
        eviction=given.eviction,
        residency=given.residency,
        prefetch=given.prefetch,
        rows=given.rows,
        sparse_experts=given.sparse_experts,
        activations=given.activations,
        throttle=given.throttle,
        gates=given.gates,
        shadow=given.shadow,
        lossy_prompt=given.lossy_prefill,
        seed=given.seed,
        threads=given.threads,
        context=given.context,
    )
    result = run_prompt(
        given.bundle,
        text,
        options=options,
        generation=options_from(given, GenerateOptions),
        on_text=output.stream,
        trace_path=given.record_trace,
        progress=output.progress,
    )
    output.stream("\n")
    output.say("\n" + run_line(result))
    if given.record_trace is not None:
        output.say(f"wrote {given.record_trace}; next: moe-tool simulate {given.record_trace}")
    output.result(result)
    if result.interrupted:
        output.say("interrupted")
        raise typer.Exit(130)


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
