"""One run that fills the expert cache and one that counts, recorded: for prediction_error.py.

python benchmarks/traced_run.py BUNDLE MEMORY TOKENS EVICTION THREADS TRACE
"""

import json
import sys
from pathlib import Path

from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.runtime.write_trace import write_trace

_PROMPT = "The list of the"


def main() -> None:
    """Run twice, write the trace, print the rate."""
    bundle, memory, tokens, eviction, threads, trace = sys.argv[1:]
    options = run_options(
        memory=memory,
        eviction=eviction,
        threads=int(threads),
        context=2 * int(tokens) + 64,
        record_trace=True,
    )
    generation = GenerateOptions(max_tokens=int(tokens), ignore_eos=True)
    with open_session(Path(bundle), options) as session:
        generate(session, _PROMPT, generation)
        result = generate(session, _PROMPT, generation)
        seconds = (result.generated_tokens - 1) / result.tokens_per_second
        write_trace(session, Path(trace), decode_seconds=seconds)
    print(json.dumps({"tokens_per_second": result.tokens_per_second}))


if __name__ == "__main__":
    main()
