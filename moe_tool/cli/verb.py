"""Commands that take their arguments as one dataclass."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moe_tool.cli.console import Output, open_output
from moe_tool.cli.options import JsonOption
from moe_tool.errors import UsageError

Arguments = TypeVar("Arguments")
Options = TypeVar("Options")


def verb(work: Callable[[Arguments, Output], None]) -> Callable[..., None]:
    """Return the command that typer should see: an argument or option per field of the dataclass
    that `work` takes first, and --json, which sets up the output that it takes second."""
    kind = next(iter(inspect.get_annotations(work).values()))

    def command(*, json: bool, **given: Any) -> None:
        with open_output(as_json=json) as output:
            work(kind(**{name: _expanded(value) for name, value in given.items()}), output)

    as_json = inspect.Parameter(
        "json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption
    )
    parameters = [*inspect.signature(kind).parameters.values(), as_json]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__name__, command.__doc__ = work.__name__, work.__doc__
    return command


def _expanded(value: object) -> object:
    """Return a path with ~ replaced, as a shell does in most places, but not after `--out=`."""
    if not isinstance(value, Path):
        return value
    try:
        return value.expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{value}: there is no such home folder",
            hint=f"write the whole path; ./{value} is a folder of that name here",
        ) from error


def options_from(arguments: object, make: Callable[..., Options], **others: object) -> Options:
    """Return what a dataclass or function makes of `others` and, for all its other parameters, of
    the fields of `arguments`.

    Raises:
        AttributeError: a parameter is in neither.
    """
    names = inspect.signature(make).parameters.keys() - others.keys()
    return make(**{name: getattr(arguments, name) for name in names}, **others)
