"""Pack a MoLE in every form of its rows and measure what each costs: loss, table, bytes a token.

python benchmarks/mole_rows.py CHECKPOINT --eval eval.txt
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from mole_training import loss_on

from moe_tool.demo.training import token_stream
from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.lookup.disk_rows import load_model
from moe_tool.lookup.pack_lookup import ROW_BITS, pack_lookup
from moe_tool.models.locate import LocatedModel
from moe_tool.models.tokenizer import load_tokenizer


def main() -> None:
    """Print a row of the table for each form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--eval", type=Path, required=True, nargs="+", help="UTF-8 texts")
    given = parser.parse_args()
    texts = [path.read_text(encoding="utf-8") for path in given.eval]
    stream = token_stream(load_tokenizer(given.checkpoint), texts)
    print("| rows | table, bytes | bytes a token | loss, nats per token |")
    print("| --- | ---: | ---: | ---: |")
    folder = Path(tempfile.mkdtemp())
    try:
        for bits in ROW_BITS:
            located = LocatedModel(folder=given.checkpoint, name=given.checkpoint.name)
            report = pack_lookup(located, bits=bits, out=folder / bits)
            model, table = load_model(LookupBundle.open(folder / bits))
            loss = loss_on(model, stream)
            table.rows.close()
            print(
                f"| {bits} | {report.table_bytes} | {report.row_bytes} | {loss:.4f} |", flush=True
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
