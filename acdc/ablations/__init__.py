"""What ablated edges carry; :data:`ABLATIONS` has it by name."""

from acdc.ablations.base import ABLATIONS, OTHER_RUN, ZERO, Ablation, ablation

__all__ = ["ABLATIONS", "OTHER_RUN", "ZERO", "Ablation", "ablation"]
