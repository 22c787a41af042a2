"""``acdc demo``: the whole story in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acdc.cli import options as opt

__all__ = ["demo"]


def demo(
    task: Annotated[str, typer.Argument(help="Built-in task (acdc list tasks).")] = "ioi",
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("runs") / "demo",
    overwrite: opt.Overwrite = False,
) -> None:
    """Show what this package does: find a circuit, test it on unseen prompts, write its report.

    In the model that comes with the package, with eap-ig, which is quick, and fewer random circuits
    than acdc evaluate draws.  Every step says the command that does it alone.

    Example: acdc demo
    """
    from acdc.errors import OptionError, UnknownNameError
    from acdc.evidence.assessment import evaluate
    from acdc.evidence.verdicts import Trials
    from acdc.pages.report import report
    from acdc.runs.discover import discover
    from acdc.runs.folder import check_output
    from acdc.tasks import TASKS
    from acdc.terminal.console import TerminalReporter, say, show, warn
    from acdc.terminal.evidence import verdicts_table

    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    check_output(out, overwrite=overwrite)
    reporter = TerminalReporter()

    say(f"1. Find the circuit: acdc discover {task} --method eap-ig --out {out}")
    run = discover(task, method="eap-ig", reporter=reporter)
    run.save(out, overwrite=overwrite)
    run.show()

    say(f"\n2. Test it on prompts it has not seen: acdc evaluate {out}")
    trials = Trials(n_random=30, n_permutations=200, n_knockouts=10, n_edges=20)
    tested = evaluate(out, trials=trials, reporter=reporter)
    tested.save(out, overwrite=True)
    if tested.judgement is None:
        raise OptionError(f"{out}: no tests were made")
    show(verdicts_table(tested.judgement))
    warn(tested.warnings)

    say(f"\n3. Put all of it on one page: acdc report {out}")
    page = report(out, reporter=reporter).save(out, overwrite=True)
    say(f"open {page} in a browser, and {out / 'circuit.svg'} for the picture alone")
