"""Options made of settings: a command names groups of them and receives what was asked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import wraps
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from acdc.cli.completion import Completion, listed, values
from acdc.settings import GROUPS, MISSING, Option, Settings, options_of
from acdc.terminal.loudness import Loudness, set_loudness

__all__ = ["Command", "MethodCommand", "takes"]

_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
_META = "acdc.method_options"


def takes(
    *groups: str, leave: tuple[str, ...] = (), of_run: bool = False, given_alone: bool = False,
    methods: bool = False, **defaults: Any,
) -> Callable[[Callable[..., None]], Callable[..., None]]:  # fmt: skip
    """Give a command the settings of some groups as options; it gets them as ``**asked``.

    Parameters
    ----------
    *groups
        Of :data:`acdc.settings.GROUPS`.
    leave
        Settings of these groups that the command has not.
    of_run
        For commands that take up a run: no defaults, since its own settings hold.  Only what is
        given is in ``asked``.
    given_alone
        For other commands in whose ``asked`` is only what is given.
    methods
        Whether options of methods are taken too; the command's class is :class:`MethodCommand`.
    **defaults
        Other defaults than those of the settings.
    """
    unknown = set(groups) - set(GROUPS)
    assert not unknown, unknown

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        assert own[-1].kind is inspect.Parameter.VAR_KEYWORD
        made = [
            _parameter(
                name,
                kinds,
                _of_run(says) if of_run else says,
                None if of_run or given_alone else defaults.get(name, default),
            )
            for name, kinds, says, default in _settings(groups)
            if name not in leave
        ]
        names = [parameter.name for parameter in made]
        context = inspect.Parameter(
            "context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
        )

        @wraps(command)
        def run(**given: Any) -> None:
            asked = {name: given.pop(name) for name in names}
            asked = {name: value for name, value in asked.items() if value is not None}
            if methods:
                asked |= given.pop("context").meta.get(_META, {})
            command(**given, **asked)

        by_name = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own[:-1]]
        every = [by_name[0], *made, *by_name[1:], *([context] if methods else [])]
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]  # typer reads it
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        return run

    return decorate


def _of_run(says: Option) -> Option:
    """Say that an option that is not given is the run's."""
    return replace(
        says, help=f"{re.sub(r' ?[(]default:.*', '', says.help.rstrip('.'))} (default: the run's)."
    )


def _settings(groups: tuple[str, ...]) -> Iterator[tuple[str, list[str], Option, Any]]:
    defaults = {one.name: one.default for one in fields(Settings)}
    for name, kinds, says in options_of(Settings):
        if says.group in groups:
            default = defaults[name]
            yield name, kinds, says, None if default is MISSING else default


def _parameter(name: str, kinds: list[str], says: Option, default: Any) -> inspect.Parameter:
    flag = (says.flag or name).replace("_", "-")
    kind = _TYPES[kinds[0]]
    declared = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    panel = f"{says.group.capitalize()}" if says.group else "Options of methods"
    annotation = kind if default is not None else kind | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[
            annotation,
            typer.Option(
                declared, help=says.help, rich_help_panel=panel, autocompletion=_completion(says)
            ),
        ],
    )


def _completion(says: Option) -> Completion | None:
    if says.listed:
        return listed(says.listed)
    return values(says.choices) if says.choices else None


class Command(TyperCommand):
    """A command that can be told to say less or more; see :mod:`acdc.terminal.loudness`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False,
                annotation=Annotated[bool, typer.Option(f"--{name}", f"-{name[0]}", help=says)],
            )
            for name, says in _SAID.items()
        ]
        self.params = [*self.params, *_as_params(own, _set_loudness)]


_SAID = {
    "quiet": "No progress, no tables.",
    "verbose": "Seconds and memory of every phase, and where an error comes from.",
}


def _set_loudness(ctx: Any, param: Any, value: Any) -> Any:
    if value:
        set_loudness(Loudness[str(param.name).upper()])
    return value


def _as_params(
    made: Sequence[inspect.Parameter], callback: Callable[[Any, Any, Any], Any]
) -> list[Any]:
    """Return parameters as those of a command, told to a callback and not to the command."""

    def collect() -> None:
        """Carry the options."""

    collect.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]  # for typer
    collect.__annotations__ = {one.name: one.annotation for one in made}
    app = typer.Typer(add_completion=False)
    app.command()(collect)
    names = {one.name for one in made}
    params = [param for param in typer.main.get_command(app).params if param.name in names]
    for param in params:
        param.expose_value, param.callback = False, callback
    return params


class MethodCommand(Command):
    """A command that takes the options of every method, too.

    Methods are imported, which takes seconds, only where an option is none of the command's own or
    its help is asked for.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read arguments; options of methods go to ``ctx.meta``."""
        known = {flag for param in self.params for flag in (*param.opts, *param.secondary_opts)}
        flags = {arg.partition("=")[0] for arg in args if arg.startswith("-") and len(arg) > 1}
        if flags - known:
            self.params = [*self.params, *_method_params(known)]
        return super().parse_args(ctx, args)


def _method_params(known: set[str]) -> list[Any]:
    """Options of all methods that are not known yet, as parameters of a command."""
    from acdc.methods import METHODS

    takers: dict[str, list[str]] = {}
    made: dict[str, inspect.Parameter] = {}
    for method in METHODS.values():
        for name, kinds, says in options_of(method.options):
            if says.shared or f"--{(says.flag or name).replace('_', '-')}" in known:
                continue
            takers.setdefault(name, []).append(method.name)
            made.setdefault(name, _parameter(name, kinds, says, None))

    params = _as_params(list(made.values()), _keep)
    for param in params:
        param.help = f"{param.help} ({', '.join(takers[str(param.name)])})"
    return params


def _keep(ctx: Any, param: Any, value: Any) -> Any:
    if value is not None:
        ctx.meta.setdefault(_META, {})[param.name] = value
    return value
