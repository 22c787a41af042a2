"""What backup heads and interactions show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from acdc.evidence.interactions import Interactions
    from acdc.evidence.self_repair import HeadRepair, Measure, RoleRepair, SelfRepair
    from acdc.measure.gates import Gate

__all__ = ["interactions_tables", "self_repair_tables"]

_TOP_OTHERS = 5


_ROUNDING = 1e-5
"""Growth below this share of the largest direct effect is no more than rounding."""


def self_repair_tables(found: SelfRepair, title: str) -> Iterator[Any]:
    """Yield a table per role, and who backs it up."""
    yield (
        f"{title}: {found.settings.task} in {found.settings.model}, {found.n_prompts} prompts "
        f"({found.task_info['prompts']}), metric "
        f"{found.settings.metric}, {found.settings.direction}, "
        f"{found.settings.intervention} ablation"
    )
    if found.match is not None:
        other = "roles of ANOTHER MODEL: " if found.match.same is False else ""
        yield other + found.match.says
    for role in found.roles:
        yield _role_table(role)
    for name, heads in found.backups.items():
        yield f"backup of {name!r}: {', '.join(heads)}"
    if not found.backups:
        yield (
            f"no backup: no head answers with at least {found.min_share:.0%} of what ablating the "
            "others takes away"
        )


def interactions_tables(found: Interactions, title: str, n: int = 20) -> Iterator[Any]:
    """Yield how many pairs are of which kind, and the table of gates."""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in found.counts.items())
    left_out = f"; {found.n_left_out:,} more of lower scores not tested" if found.n_left_out else ""
    yield (
        f"{title}: {found.n_prompts} prompts, metric {found.settings.metric}, "
        f"{found.settings.intervention} ablation"
    )
    yield f"{len(found.pairs):,} pairs: {counts}{left_out}"
    for gate in ("AND", "OR"):
        own = [one for one in found.candidates if one.gate == gate]
        if own:
            held = [one.receiver for one in own if one.holds]
            tested = sum(one.holds is not None for one in own)
            named = f" ({', '.join(held)})" if held else ""
            yield (
                f"candidates for {gate}: {len(held)} of {tested} tested hold{named}, "
                f"{len(own)} in all"
            )
    gates = [pair for pair in found.pairs if pair.noising.is_gate or pair.denoising.is_gate]
    if not gates:
        yield "no interaction: every pair that was tested adds up, as far as these prompts tell"
        return
    more = f" (first {n})" if len(gates) > n else ""
    table = Table(title=f"gates{more}", title_justify="left", caption_justify="left")
    level = f"{1 - found.alpha:.0%}"
    table.caption = f"interaction, its {level} interval of all pairs together; a dash: adds up"
    for column in ("edges", "gate", "noising", "denoising"):
        table.add_column(column)
    for pair in gates[:n]:
        table.add_row(
            escape(f"{pair.a}\n{pair.b}"), pair.kind, _gate(pair.noising), _gate(pair.denoising)
        )
    yield table


def _gate(gate: Gate) -> str:
    if not gate.is_gate:
        return "-"
    return f"{gate.kind} {gate.interaction:.3g} ({gate.low:.3g} to {gate.high:.3g})"


def _role_table(role: RoleRepair) -> Table:
    loss = f"ablating all takes {_interval(role.taken)} from the logits directly"
    if role.repaired is None:
        loss += ", next to nothing: there is nothing to repair"
    else:
        loss += f", {role.total.mean:.3g} in the end: {role.repaired:.0%} is repaired"
    if not role.members:
        loss += "; it is alone in its role, so that there are no others to ablate for it"
    title = f"role {role.role!r}: {', '.join(role.heads)}; {loss}"
    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    for column in ("head", "before", "after", "growth", "response", "share", "verdict"):
        table.add_column(column, justify="left" if column in ("head", "verdict") else "right")
    for row in role.members:
        table.add_row(*_repair_cells(row))
    table.add_section()
    rows = (*role.members, *role.others)
    rounding = _ROUNDING * max((abs(row.before) for row in rows), default=0.0)
    grown = [row for row in role.others if row.growth.sign and abs(row.growth.mean) > rounding]
    grown.sort(key=lambda row: (row.verdict is None, -abs(row.growth.mean)))
    shown = grown[:_TOP_OTHERS]
    for row in shown:
        table.add_row(*_repair_cells(row))
    above = "after: above the line the others of the role ablated, below it the whole role"
    below = f"{len(grown) - len(shown)} more heads change" if len(grown) > len(shown) else ""
    after = above if role.members else "after: the role ablated"
    table.caption = "; ".join(part for part in ("direct effects", after, below) if part)
    if not all(row.in_circuit for row in (*role.members, *shown)):
        table.caption += "; *: not in the circuit"
    return table


def _repair_cells(row: HeadRepair) -> list[str]:
    verdict = f"[bold]{row.verdict.upper()}[/bold]" if row.verdict == "backup" else row.verdict
    return [
        row.head + ("" if row.in_circuit else " *"),
        f"{row.before:.3g}",
        f"{row.after:.3g}",
        _interval(row.growth),
        f"{row.response.mean:.3g}",
        "-" if row.share is None else f"{row.share:.0%}",
        verdict or "-",
    ]


def _interval(measure: Measure) -> str:
    return f"{measure.mean:.3g} ({measure.low:.3g} to {measure.high:.3g})"
