"""The command line: a command is a function in a module here, and its options are its parameters.

Nothing heavy (torch, numba) is imported before a command runs, so that ``acdc --help`` is instant.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from typing import Annotated, Any, NoReturn

import typer

from acdc.cli.asked import Command, MethodCommand
from acdc.cli.circuits import export, latents
from acdc.cli.comparison import compare
from acdc.cli.demo import demo
from acdc.cli.development import develop
from acdc.cli.discovery import conditions, discover, stability, sweep
from acdc.cli.doses import dose
from acdc.cli.evidence import evaluate, report, self_repair
from acdc.cli.groups import groups
from acdc.cli.heads import heads
from acdc.cli.interactions import interactions
from acdc.cli.listing import list_
from acdc.cli.matching import match
from acdc.cli.processes import check_shared, ends, processes, quiet
from acdc.cli.sharing import shared
from acdc.cli.study import study
from acdc.cli.what_if import what_if
from acdc.engine.allocator import keep_large_pieces_apart
from acdc.terminal.loudness import Loudness, loudness, set_loudness

__all__ = ["app", "main"]

# click's UsageError; typer has it from click or from a copy of its own, depending on its version.
_UsageError: Any = typer.BadParameter.__mro__[1]

_SURROGATE = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no text

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="Find circuits in transformers.\n\nExample: acdc discover ioi",
)
_COMMANDS: dict[str, Callable[..., None]] = {  # in the order of acdc --help
    "discover": discover,
    "sweep": sweep,
    "study": study,
    "evaluate": evaluate,
    "stability": stability,
    "conditions": conditions,
    "groups": groups,
    "develop": develop,
    "self-repair": self_repair,
    "interactions": interactions,
    "heads": heads,
    "dose": dose,
    "what-if": what_if,
    "export": export,
    "latents": latents,
    "report": report,
    "compare": compare,
    "shared": shared,
    "match": match,
    "list": list_,
    "demo": demo,
}
_WITH_METHODS = ("discover", "study", "stability", "conditions", "groups", "develop")
for _name, _command in _COMMANDS.items():
    app.command(_name, cls=MethodCommand if _name in _WITH_METHODS else Command)(_command)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"acdc {version('acdc-circuits')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """What is asked without a command."""
    check_shared(context.invoked_subcommand)


class _TerminatedError(BaseException):
    """The process was told to end; no handler but :func:`main` has it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on standard error and status 2.

    A process that is told to end (SIGTERM) removes what it has half written, says so and ends with
    status 143, as the system has it (128 + 15).  Of several processes that ``torchrun`` starts one
    says it.
    """
    # Before torch is loaded: idle OpenMP threads sleep instead of spinning.  On a busy machine
    # small models run ten times faster so.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_large_pieces_apart()
    with processes():
        _run(arguments)


def _run(arguments: Sequence[str] | None) -> NoReturn:
    """Run a command and end the process."""
    _check_text(sys.argv[1:] if arguments is None else arguments)
    set_loudness(Loudness.NORMAL)
    _add_plugins()
    command = typer.main.get_command(app)
    try:
        with _ends_when_told(), quiet():
            status = command.main(args=arguments, prog_name="acdc", standalone_mode=False)
    except _TerminatedError:
        ends(
            "told to end: nothing half-written is left; the same command goes on from its "
            "checkpoint if it has one, or starts again",
            128 + signal.SIGTERM,
        )
    except ValueError as error:
        from graphs.errors import InputError  # not at the top: graphs brings in numba

        if not isinstance(error, InputError):
            raise
        if loudness() is Loudness.VERBOSE:
            traceback.print_exception(error)
        _fail(str(error))
    except _UsageError as error:
        _fail(f"{error.format_message() or 'no command'} (see acdc --help)")
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
        if not isinstance(error, MemoryError) and " memory" not in str(error):
            raise
        _fail("out of memory: lower --batch-size, --memory or --n-prompts")
    except OSError as error:  # a name too long, a full disk, a folder that may not be read
        _fail(f"{error.filename or 'file'}: {error.strerror or error}")
    else:
        if status == 130:
            ends("stopped", 130)
        sys.exit(status if isinstance(status, int) else 0)


@contextmanager
def _ends_when_told() -> Iterator[None]:
    """Leave a block by an exception when the process is told to end, so that it tidies up."""
    known = signal.getsignal(signal.SIGTERM)
    ours = threading.current_thread() is threading.main_thread() and known is signal.SIG_DFL
    if not ours:  # who runs this as a part has said what is to be done
        yield
        return

    def leave(number: int, frame: object) -> NoReturn:
        raise _TerminatedError

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, known)


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse what no file or terminal can take: bytes that are no text, a null character."""
    for argument in arguments:
        if "\0" in argument or (not argument.isascii() and _SURROGATE.search(argument)):
            _fail(f"argument {argument!r} is no UTF-8 text: rename the file, or correct the locale")


def _add_plugins() -> None:
    """Add the commands that other packages offer under the entry point ``acdc.commands``."""
    known = {group.name for group in app.registered_groups}
    for point in entry_points(group="acdc.commands"):
        if point.name not in known:
            app.add_typer(point.load(), name=point.name)


def _fail(message: str) -> NoReturn:
    from graphs.text import one_line

    ends(one_line(message), 2)
