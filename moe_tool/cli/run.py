"""`moe-tool run`: generate text from a bundle."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_tool.cli.console import Output, open_output
from moe_tool.cli.options import (
    MAX_CONTEXT,
    ActivationsOption,
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
    from moe_tool.runtime.decoding_config import GenerateOptions
    from moe_tool.runtime.run_options import RunOptions

StdinArgument = Annotated[
    str | None,
    typer.Argument(metavar="-", help="A dash reads the prompt from stdin.", show_default=False),
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt.", show_default=False)
]
PromptFileOption = Annotated[
    Path | None,
    typer.Option("--prompt-file", metavar="FILE", help="A UTF-8 file.", show_default=False),
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens to generate at most.")
]
ContextOption = Annotated[
    int,
    typer.Option(
        "--context",
        metavar="N",
        min=1,
        max=MAX_CONTEXT,
        help="Tokens of prompt and text together.",
    ),
]
ShadowOption = Annotated[
    int,
    typer.Option(
        "--shadow",
        metavar="N",
        min=0,
        help="Compute every Nth token also exactly and measure the policy's loss in that step; 0: "
        "none.",
    ),
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature",
        metavar="T",
        min=0,
        help="Sampling temperature; 0 always takes the likeliest token.",
    ),
]
RecordTraceOption = Annotated[
    Path | None,
    typer.Option(
        "--record-trace",
        metavar="FILE",
        help="Write the experts that every layer called, for `simulate`.",
        show_default=False,
    ),
]
RawOption = Annotated[
    bool, typer.Option("--raw", help="Use the prompt without the model's chat template.")
]
IgnoreEosOption = Annotated[
    bool, typer.Option("--ignore-eos", help="Continue after the end-of-text token.")
]


def run(
    bundle: BundleArgument,
    stdin: StdinArgument = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    max_tokens: MaxTokensOption = 128,
    context: ContextOption = 4096,
    memory: RunMemoryOption = None,
    policy: PolicyOption = None,
    residency: ResidencyOption = None,
    eviction: EvictionOption = None,
    prefetch: PrefetchOption = None,
    sparse_experts: SparseExpertsOption = None,
    activations: ActivationsOption = "float32",
    gates: GatesOption = True,
    shadow: ShadowOption = 0,
    lossy_prefill: LossyPrefillOption = False,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    record_trace: RecordTraceOption = None,
    raw: RawOption = False,
    ignore_eos: IgnoreEosOption = False,
    json: JsonOption = False,
) -> None:
    """Generate text from a bundle inside a memory budget."""
    with open_output(as_json=json) as output:
        text = _read_prompt(stdin, prompt, prompt_file)

        from moe_tool.runtime.decoding_config import GenerateOptions
        from moe_tool.runtime.run_options import run_options

        options = run_options(
            memory=memory,
            policy=policy,
            eviction=eviction,
            residency=residency,
            prefetch=prefetch,
            sparse_experts=sparse_experts,
            activations=activations,
            gates=gates,
            shadow=shadow,
            lossy_prompt=lossy_prefill,
            seed=seed,
            threads=threads,
            context=context,
        )
        generation = GenerateOptions(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            raw=raw,
            ignore_eos=ignore_eos,
        )
        _run(bundle, text, options, generation, trace=record_trace, output=output)


def _run(
    bundle: Path,
    text: str,
    options: "RunOptions",
    generation: "GenerateOptions",
    *,
    trace: Path | None,
    output: Output,
) -> None:
    """Generate text and print it with its costs."""
    from moe_tool.reports.run_lines import run_line
    from moe_tool.runtime.generation import run_prompt

    result = run_prompt(
        bundle,
        text,
        options=options,
        generation=generation,
        on_text=output.stream,
        trace_path=trace,
        progress=output.progress,
    )
    output.stream("\n")
    output.say("\n" + run_line(result))
    if trace is not None:
        output.say(f"wrote {trace}; next: moe-tool simulate {trace}")
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
