"""`make mutants`: every mutant in a copy of the tree, with its tests; each has to make one fail.

Arguments, if any, are words of the names of those to be tried.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
_COPIED = ("moe_tool", "tests", "pyproject.toml")
_PASSED, _FAILED = 0, 1
"""Exit codes of pytest; others are of tests that could not run"""


def main(words: list[str]) -> int:
    """Return 0 if every mutant was noticed."""
    chosen = [each for each in MUTANTS if all(word in each.name for word in words)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        _copy(tree)
        code, output = _run(tree, sorted({each.tests for each in chosen}))
        if code != _PASSED:
            print(output, "the tests do not pass without a mutant", sep="\n", file=sys.stderr)
            return 1
        print(f"{len(chosen)} mutants: their tests pass without them", flush=True)
        unnoticed = [each for each in chosen if not _is_noticed(tree, each)]
    for each in unnoticed:
        print(f"not noticed: {each.name} ({each.tests})", file=sys.stderr)
    return 1 if unnoticed else 0


def _copy(tree: Path) -> None:
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)


def _is_noticed(tree: Path, mutant: Mutant) -> bool:
    path = tree / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        print(f"{mutant.file} has {mutant.old!r} {text.count(mutant.old)} times", file=sys.stderr)
        return False
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        code, output = _run(tree, [mutant.tests])
    finally:
        path.write_text(text)
    is_noticed = code == _FAILED and " failed" in output
    print(f"{'noticed' if is_noticed else 'NOT NOTICED'}: {mutant.name}", flush=True)
    if not is_noticed:
        print(output, file=sys.stderr)
    return is_noticed


def _run(tree: Path, tests: list[str]) -> tuple[int, str]:
    """The exit code and the words of pytest."""
    # Compiled files could outlive a change of the same size in the same second.
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
