"""The word lists of the built-in tasks.

Short, common English words, so that many of them are one token in most tokenizers; a task
leaves out those that are not.  The bundled models' vocabularies are built from these lists.
"""

from __future__ import annotations

__all__ = [
    "ARGUMENTS",
    "BOY_NAMES",
    "DESCRIPTIONS",
    "EVENTS",
    "GIRL_NAMES",
    "METHODS",
    "NAMES",
    "NEUTRAL_NAMES",
    "OBJECTS",
    "PLACES",
]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES: tuple[str, ...] = _words(
    """
    Michael Christopher Jessica Matthew Ashley Jennifer Joshua Amanda Daniel David James Robert
    John Joseph Andrew Ryan Brandon Jason Justin Sarah William Jonathan Stephanie Brian Nicole
    Nicholas Anthony Heather Eric Elizabeth Adam Megan Melissa Kevin Steven Thomas Timothy
    Christina Kyle Rachel Laura Lauren Amber Brittany Danielle Richard Kimberly Jeffrey Amy
    Crystal Michelle Tiffany Jeremy Benjamin Mark Emily Aaron Charles Rebecca Jacob Stephen
    Patrick Sean Erin Zachary Jamie Kelly Samantha Nathan Sara Dustin Paul Angela Tyler Scott
    Katherine Andrea Gregory Erica Mary Travis Lisa Kenneth Bryan Lindsey Kristen Jose Alexander
    Jesse Katie Lindsay Shannon Vanessa Courtney Christine Alicia Cody Allison Bradley Samuel
    Alice Anna Jack Kate Peter Simon Tom George Henry Frank Martin Susan Linda Karen Julia Maria
    """
)
"""First names for indirect object identification, most of them from Wang et al. 2022."""

PLACES: tuple[str, ...] = _words("store garden restaurant school hospital office house station")
OBJECTS: tuple[str, ...] = _words("ring kiss bone basketball computer necklace drink snack")

ARGUMENTS: tuple[str, ...] = _words(
    """
    load size file last name path host key value index count mode level state group order style
    color width height depth start end step rate time date code data text line word page view
    item node edge root base rule test task plan role rank cost price total score range scale
    angle speed force power field table query token block frame image video sound title label
    cache store owner user limit shape option filter source target output result format version
    message address number first next parent child
    """
)
"""Argument names for the docstring task."""

METHODS: tuple[str, ...] = _words("port run call send find make open close read write")
"""Function names for the docstring task."""

DESCRIPTIONS: tuple[str, ...] = _words(
    """
    oil column piece crime population unit dark river mountain winter summer garden kitchen
    window music dinner doctor teacher horse bird tree flower stone metal paper glass water fire
    earth wind ocean island bridge tower castle market church village city country forest desert
    valley storm cloud rain snow light night morning evening gold silver iron wood leather
    """
)
"""Words of the descriptions in a docstring; none of them is an argument name."""

EVENTS: tuple[str, ...] = _words(
    """
    war siege battle conflict strike dispute trial reign rule voyage journey expedition campaign
    invasion occupation rebellion revolt drought plague famine epidemic alliance treaty truce
    peace marriage friendship study experiment project program construction investigation
    festival tour exhibition contract agreement partnership decline expansion crisis boom
    """
)
"""What the greater-than task says began and ended in some year."""

GIRL_NAMES: tuple[str, ...] = _words(
    """
    Lily Lucy Mia Sue Sara Anna Emma Molly Amy Jane Jenny Sally Daisy Ella Kate Mary Rose Grace
    Alice Sarah
    """
)
BOY_NAMES: tuple[str, ...] = _words(
    """
    Tim Timmy Tom Tommy Ben Max Sam Jack Bob Billy Joe Jim John Peter Mark Paul David James
    Adam Henry
    """
)

NEUTRAL_NAMES: tuple[str, ...] = _words(
    "Jamie Jesse Kelly Shannon Taylor Jordan Casey Riley Alex Robin Morgan Charlie"
)
"""Names that say neither girl nor boy."""
