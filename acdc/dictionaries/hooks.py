"""Where a dictionary reads and writes: TransformerLens' hook names as (site, layer).

::

    site            hook name                        what it holds, [batch, pos, d]
    resid_pre       blocks.L.hook_resid_pre          raw stream that enters block L
    attn_z          blocks.L.attn.hook_z             heads before W_O, flattened to head * d_head
    attn_out        blocks.L.hook_attn_out           what the stream gains from attention (with b_O)
    resid_mid       blocks.L.hook_resid_mid          raw stream between attention and MLP
    mlp_in          blocks.L.hook_mlp_in             raw stream that the MLP's norm reads
    ln2_normalized  blocks.L.ln2.hook_normalized     the same, normalised, before scale and bias
    ln2_out         blocks.L.ln2.hook_out            the same, after scale and bias
    mlp_out         blocks.L.hook_mlp_out            what the stream gains from the MLP
    resid_post      blocks.L.hook_resid_post         raw stream that leaves block L

A TransformerBridge has further names for some of them (``blocks.L.mlp.hook_out``); they are read
too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from acdc.errors import DictionaryError, did_you_mean

__all__ = ["READ_SITES", "SITES", "WRITE_SITES", "Hook", "parse_hook"]

SITES: dict[str, str] = {
    "resid_pre": "hook_resid_pre",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "hook_mlp_in",
    "ln2_normalized": "ln2.hook_normalized",
    "ln2_out": "ln2.hook_out",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""Site -> its name in TransformerLens after ``blocks.L.``."""

READ_SITES = ("mlp_in", "ln2_normalized", "ln2_out")
"""What a transcoder may read; it writes ``mlp_out`` of the same layer."""

WRITE_SITES = tuple(site for site in SITES if site not in READ_SITES)
"""What an SAE may read and write."""

_BRIDGE_NAMES = {
    "hook_in": "resid_pre",
    "attn.o.hook_in": "attn_z",
    "attn.hook_out": "attn_out",
    "ln2.hook_in": "resid_mid",
    "mlp.hook_in": "ln2_out",
    "mlp.hook_out": "mlp_out",
    "hook_out": "resid_post",
}
_BY_NAME = {name: site for site, name in SITES.items()} | _BRIDGE_NAMES
_HOOK = re.compile(r"blocks\.(\d{1,6})\.(.+)")


@dataclass(frozen=True, order=True)
class Hook:
    """One activation of the model.

    Parameters
    ----------
    layer
        Block, from 0.
    site
        A key of :data:`SITES`.
    """

    layer: int
    site: str

    @property
    def name(self) -> str:
        """TransformerLens' name.

        Examples
        --------
        >>> Hook(3, "mlp_out").name
        'blocks.3.hook_mlp_out'
        """
        return f"blocks.{self.layer}.{SITES[self.site]}"

    @property
    def part(self) -> tuple[str, int]:
        """What of the model a dictionary here replaces; two dictionaries may not share it.

        ``("attn", layer)``, ``("mlp", layer)``, ``("mid", layer)``, or ``("resid", n)``: the
        stream in front of block n, which is also behind block n - 1.

        Examples
        --------
        >>> Hook(2, "resid_post").part == Hook(3, "resid_pre").part
        True
        """
        if self.site == "resid_post":
            return "resid", self.layer + 1
        parts = {"resid_pre": "resid", "resid_mid": "mid", "attn_z": "attn", "attn_out": "attn"}
        return parts.get(self.site, "mlp"), self.layer


def parse_hook(name: str) -> Hook:
    """Return the hook of TransformerLens' name.

    Raises
    ------
    DictionaryError
        If dictionaries there are not supported; the message names those that are.

    Examples
    --------
    >>> parse_hook("blocks.1.ln2.hook_normalized")
    Hook(layer=1, site='ln2_normalized')
    """
    found = _HOOK.fullmatch(name)
    if found is None:
        raise DictionaryError(
            f"hook {name!r} is no activation of a block: expected a name as 'blocks.3.hook_mlp_out'"
        )
    layer, point = int(found[1]), found[2]
    if point not in _BY_NAME:
        raise DictionaryError(f"hook {name!r} is not supported: {did_you_mean(point, _BY_NAME)}")
    return Hook(layer, _BY_NAME[point])
