"""Latents of dictionaries (sparse autoencoders, transcoders) as nodes of a component graph.

A *site* is the place where a dictionary is attached, with the latents that are nodes there.
The rest of what the site writes is its error node.  The neurons of an MLP are an exact dictionary
of its output: their error node writes the bias and the neurons that are no nodes.

============= ======== ========================================================================
kind          nodes    what changes
============= ======== ========================================================================
mlp_out       m3.f12   sender ``m3`` is split; receiver ``m3`` feeds every part
neurons       m3.n12   the same, for the neurons of the MLP itself
attn_out      a3.f12   the layer's heads are no senders any more; their q, k and v receivers
attn_z                 feed every latent of the layer and its error node
neuron_inputs m3.n12   as transcoder, for the neurons of the MLP itself
transcoder    m3.f12   ``m3`` is split, and every latent (and ``m3.err``) is a receiver of its own
experts       m3.e2    the experts of a mixture are the senders in the place of ``m3``, each with a
                       receiver of its own; there is no error node
routed        m3.e2    the same; a further receiver, ``m3.router``, feeds all of them
cross_layer   m3.f12   as transcoder, for all layers at once: a latent writes to the MLP outputs of
                       its layer and of all later ones, and an edge from it carries what it has
                       written before the reader; ``m3.err`` feeds the later error nodes, too
resid_pre     r3.f12   a cut in front of layer 3: receiver ``r3`` reads all that was written
resid_mid     r3mid.f1 since the last cut (in the middle of layer 3: between attention and MLP)
                       and later receivers read the parts of ``r3`` alone
============= ======== ========================================================================

The stream behind the last layer is ``resid_pre`` of the layer that would follow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphs.errors import GraphError
from graphs.spans import split_span

__all__ = [
    "ALONE",
    "EXPERTS",
    "NEURONS",
    "SITE_KINDS",
    "Site",
    "check_sites",
    "parse_latent",
    "sites_from_config",
    "sites_from_text",
    "sites_to_text",
]

NEURONS = ("neurons", "neuron_inputs")
"""Kinds whose nodes are neurons."""
EXPERTS = ("experts", "routed")
"""Kinds whose nodes are experts."""
ALONE = ("transcoder", "cross_layer", "neuron_inputs", *EXPERTS)
"""Kinds of which every node is a receiver of its own."""
SITE_KINDS = (
    *("mlp_out", "neurons", "neuron_inputs", "transcoder", "cross_layer", *EXPERTS),
    *("attn_out", "attn_z", "resid_pre", "resid_mid"),
)
_LETTER = dict.fromkeys(("mlp_out", *NEURONS, *EXPERTS, "transcoder", "cross_layer"), "m")
_LETTER |= {"attn_out": "a", "attn_z": "a"}
_SITE = re.compile(r"(\w+):([0-9]{1,9}):([0-9,]*)")
_LATENT = re.compile(r"([amr])([0-9]{1,9})(mid)?(?:\.(?:([fne])([0-9]{1,9})|(err|router)))?")
_MOST_LATENTS = 10**9


@dataclass(frozen=True)
class Site:
    """Where a dictionary is attached, and which of its latents are nodes.

    Parameters
    ----------
    kind
        One of :data:`SITE_KINDS`.
    layer
        Layer of the component, or layer that the cut stands in (or in front of).
    latents
        Indices of the latents in the dictionary, ascending.

    Examples
    --------
    >>> Site("mlp_out", 3, (5, 12)).nodes
    ('m3.f5', 'm3.f12', 'm3.err')
    """

    kind: str
    layer: int
    latents: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in SITE_KINDS:
            raise GraphError(f"site kind {self.kind!r}: expected one of {', '.join(SITE_KINDS)}")
        if list(self.latents) != sorted({int(i) for i in self.latents}) or (
            self.latents and not 0 <= self.latents[0] <= self.latents[-1] < _MOST_LATENTS
        ):
            raise GraphError(
                f"latents of {self.name}: expected different numbers from 0, ascending, "
                f"below {_MOST_LATENTS:,}"
            )

    @property
    def name(self) -> str:
        """What its nodes begin with: ``m3``, ``a2``, ``r4`` or ``r4mid``."""
        mid = "mid" if self.kind == "resid_mid" else ""
        return f"{_LETTER.get(self.kind, 'r')}{self.layer}{mid}"

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of its latents and of its error node, which comes last; experts have none."""
        name = self.name
        if self.kind in EXPERTS:
            return tuple(f"{name}.e{i}" for i in self.latents)
        letter = "n" if self.kind in NEURONS else "f"
        return (*(f"{name}.{letter}{i}" for i in self.latents), f"{name}.err")

    @property
    def is_cut(self) -> bool:
        """Whether it replaces the whole stream."""
        return self.kind.startswith("resid")

    def to_config(self) -> dict[str, Any]:
        """Return plain values for a circuit file."""
        return {"kind": self.kind, "layer": self.layer, "latents": list(self.latents)}


def check_sites(
    sites: Sequence[Site], n_layers: int, *, has_mlp: bool, parallel: bool
) -> dict[str, Site]:
    """Return sites by name.

    Raises
    ------
    GraphError
        If the graph lacks a site's place, or two sites are at one place.
    """
    found: dict[str, Site] = {}
    for site in sites:
        last = n_layers if site.kind == "resid_pre" else n_layers - 1
        if not 0 <= site.layer <= last:
            raise GraphError(
                f"site {site.kind} of layer {site.layer}: the graph has {n_layers} layers, "
                f"expected 0 to {last}"
            )
        if site.name[0] == "m" and not has_mlp:
            raise GraphError(f"site {site.kind} of layer {site.layer}: the model has no MLPs")
        if site.kind == "resid_mid" and (parallel or not has_mlp):
            raise GraphError(
                f"site resid_mid of layer {site.layer}: in this model nothing lies between "
                "attention and MLP"
            )
        if site.name in found:
            raise GraphError(
                f"two sites at {site.name}: {found[site.name].kind} and {site.kind}; "
                "attach one dictionary to each place"
            )
        found[site.name] = site
    _check_cross_layer(sites, n_layers)
    return found


def _check_cross_layer(sites: Sequence[Site], n_layers: int) -> None:
    """Check that a cross-layer transcoder is at every MLP, and that no cut hides what it wrote."""
    layers = {site.layer for site in sites if site.kind == "cross_layer"}
    if not layers:
        return
    if len(layers) < n_layers:
        raise GraphError(
            f"cross-layer transcoder at {len(layers)} of {n_layers} MLPs: expected one at each"
        )
    cuts = [site.name for site in sites if site.is_cut]
    if cuts:
        raise GraphError(
            f"a cross-layer transcoder and a cut at {cuts[0]}: what latents write behind the cut "
            "is not defined, leave one of them out"
        )


def sites_from_config(value: Any) -> tuple[Site, ...]:
    """Read the ``sites`` of a circuit file's ``cfg``; GraphError if they are none."""
    if not isinstance(value, list):
        raise GraphError(f"circuit cfg has sites={str(value)[:60]!r}: expected a list")
    return tuple(_site_from_config(entry) for entry in value)


def sites_to_text(sites: Sequence[Site]) -> str:
    """Return sites as one word, for files whose attributes are texts.

    Examples
    --------
    >>> sites_to_text([Site("mlp_out", 3, (5, 12)), Site("attn_z", 1, ())])
    'mlp_out:3:5,12;attn_z:1:'
    """
    return ";".join(f"{s.kind}:{s.layer}:{','.join(map(str, s.latents))}" for s in sites)


def sites_from_text(text: str) -> tuple[Site, ...]:
    """Read what :func:`sites_to_text` wrote; GraphError if it is something else."""
    found = []
    for part in text.split(";"):
        match = _SITE.fullmatch(part)
        if match is None:
            raise GraphError(f"site {part[:60]!r}: expected kind:layer:latents, as mlp_out:3:5,12")
        numbers = [i for i in match[3].split(",") if i]
        if any(len(i) > 9 for i in numbers):
            raise GraphError(f"site {part[:60]!r}: expected latents below {_MOST_LATENTS}")
        latents = tuple(map(int, numbers))
        found.append(Site(match[1], int(match[2]), latents))
    return tuple(found)


def _site_from_config(entry: Any) -> Site:
    fields = {"kind": str, "layer": int, "latents": list}
    if not isinstance(entry, dict) or any(type(entry.get(k)) is not t for k, t in fields.items()):
        raise GraphError(
            f"circuit cfg has a site {str(entry)[:60]!r}: expected kind, layer and latents"
        )
    kind, layer, latents = (entry[name] for name in fields)
    if any(type(i) is not int for i in latents):
        raise GraphError(f"circuit cfg: latents of site {kind!r} are no whole numbers")
    return Site(kind, layer, tuple(latents))


def parse_latent(name: str) -> tuple[str, str, int, int] | None:
    """Return ``(kind, place, layer, latent)`` of a latent, neuron or expert, else None.

    Also of an error node, a cut or a router; whatever its span.

    Examples
    --------
    >>> parse_latent("m3.f12@IO"), parse_latent("r4mid.err"), parse_latent("r4")
    (('latent', 'm', 3, 12), ('error', 'rmid', 4, -1), ('cut', 'r', 4, -1))
    """
    match = _LATENT.fullmatch(split_span(name)[0])
    if match is None or (match[3] and match[1] != "r"):
        return None
    if (match[4] in ("n", "e") or match[6] == "router") and match[1] != "m":
        return None
    place, layer = match[1] + (match[3] or ""), int(match[2])
    if match[4] is not None:
        return "expert" if match[4] == "e" else "latent", place, layer, int(match[5])
    if match[6]:
        return "error" if match[6] == "err" else "router", place, layer, -1
    return ("cut", place, layer, -1) if match[1] == "r" else None
