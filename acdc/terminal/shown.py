"""Results that show themselves: as tables on a terminal, as HTML in a notebook."""

from __future__ import annotations

__all__ = ["Shown"]


class Shown:
    """What every result of the package can do."""

    def show(self) -> None:
        """Print what the command of the same name prints; in a notebook, display it.

        Examples
        --------
        >>> import acdc
        >>> acdc.discover("ioi", method="eap-ig", n_edges=80).show()  # doctest: +SKIP
        """
        import acdc  # by its name there: what makes tables knows of every result

        acdc.show(self)

    def _repr_html_(self) -> str:
        import acdc

        return acdc.as_html(self)
