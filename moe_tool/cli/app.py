"""Typer app, with the conversion of errors to exit codes.

0 ok, 1 our bug (traceback), 2 usage, 3 bad input, 4 does not fit, 130 interrupted,
141 stdout was closed by its reader.
"""

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from moe_tool import __version__
from moe_tool.cli import (
    bench,
    buddies,
    calibrate,
    demo,
    eval_harness,
    evaluate,
    hardware,
    inspect,
    pack,
    plan,
    profile,
    run,
    simulate,
    tune_pruning,
    tune_weights,
)
from moe_tool.cli.console import write_json
from moe_tool.cli.plugin_help import PluginVerb
from moe_tool.errors import DiskFullError, MoeToolError, StorageError, UsageError
from moe_tool.kept_work import is_kept

BUG, INTERRUPTED, PIPE_CLOSED = 1, 130, 141
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name="moe-tool",
    help="Profile, pack and run mixture-of-experts models that are larger than memory.",
    epilog="In the order of a session: profile, buddies, hardware, simulate, plan, pack, run, "
    "evaluate. `moe-tool demo` does profile, buddies, pack, run and evaluate in a minute or two.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _verb in (
    profile.profile,
    buddies.buddies,
    hardware.hardware,
    simulate.simulate,
    plan.plan,
    pack.pack,
    run.run,
    evaluate.evaluate,
    calibrate.calibrate,
    eval_harness.eval_harness,
    bench.bench,
    inspect.inspect,
    demo.demo,
):
    app.command(cls=PluginVerb)(_verb)
_tune = typer.Typer(
    help="Train parts of a bundle: codes of experts, mask routers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_tune.command("weights")(tune_weights.tune_weights)
_tune.command("pruning")(tune_pruning.tune_pruning)
app.add_typer(_tune, name="tune")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(UsageError.exit_code)


def main() -> None:
    """Run the command line of this process and exit with its code."""
    # Set before torch is loaded: by default its idle threads spin for seconds; beside reader
    # threads or other programs, two threads are then many times slower than one.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    code = run_command(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _close_stdout()
    sys.exit(code)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line, report its error if there is one, and return the exit code."""
    as_json = "--json" in arguments
    try:
        command = typer.main.get_command(app)
        with command.make_context("moe-tool", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, typer.Abort) as stop:
        error = _interrupted(arguments, has_kept=is_kept(stop))
        return _report(error, as_json=as_json, code=INTERRUPTED)
    except BrokenPipeError:
        return _close_stdout()
    except TyperException as error:
        return _report(_usage_error(error), as_json=as_json)
    except MoeToolError as error:
        return _report(error, as_json=as_json)
    except MemoryError:
        return _report(_out_of_memory(), as_json=as_json, code=4)
    except OSError as error:
        return _report(_storage_error(error), as_json=as_json)
    except Exception as error:
        if "can't allocate memory" in str(error):  # torch's CPU allocator raises a RuntimeError
            return _report(_out_of_memory(), as_json=as_json, code=4)
        return _report_bug(error, as_json=as_json)
    return 0


def _report(error: MoeToolError, *, as_json: bool, code: int | None = None) -> int:
    """Print an error on stderr, and with --json also as JSON on stdout."""
    exit_code = error.exit_code if code is None else code
    print(f"error: {error}" if exit_code != INTERRUPTED else error, file=sys.stderr)
    if as_json:
        kind = "Interrupted" if exit_code == INTERRUPTED else type(error).__name__
        _write_error(kind, error.message, error.hint, exit_code)
    return exit_code


def _report_bug(error: Exception, *, as_json: bool) -> int:
    traceback.print_exception(error)
    print("\nThis is a bug in moe-tool; the lines above say where.", file=sys.stderr)
    if as_json:
        _write_error(type(error).__name__, str(error), None, BUG)
    return BUG


def _write_error(kind: str, message: str, hint: str | None, exit_code: int) -> None:
    fields = {"type": kind, "message": message, "hint": hint, "exit_code": exit_code}
    write_json({"error": fields}, sys.stdout)


def _interrupted(arguments: Sequence[str], *, has_kept: bool) -> MoeToolError:
    if not has_kept:
        return MoeToolError("interrupted")
    verb = next((argument for argument in arguments if not argument.startswith("-")), "")
    again = ["moe-tool", *arguments]
    if verb == "profile" and "--resume" not in again:
        again.append("--resume")
    return MoeToolError(f"interrupted; finished work is kept: resume with\n    {shlex.join(again)}")


def _usage_error(error: TyperException) -> UsageError:
    context = getattr(error, "ctx", None)
    path = "moe-tool" if context is None else context.command_path
    message = error.format_message().replace("Value error, ", "").strip().rstrip(".")
    return UsageError(message[:1].lower() + message[1:], hint=f"{path} --help")


def _out_of_memory() -> MoeToolError:
    return MoeToolError(
        "out of memory",
        hint="set a smaller budget with --memory, e.g. --memory 2GiB, or free some memory",
    )


def _storage_error(error: OSError) -> StorageError:
    what = error.strerror or str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in _DISK_FULL:
        return DiskFullError(f"{where}{what}", hint="free some space or write to another disk")
    return StorageError(f"{where}{what}", hint="check that the path exists and may be used")


def _close_stdout() -> int:
    """Send the interpreter's last flush to /dev/null, as the reader of stdout has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED
