"""Circuits by path: the folder of a run, or a circuit file of any format.

Nothing heavy is imported before it is needed, as the command line reads circuits with this.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphs import Circuit

__all__ = ["circuit_file", "load_circuit", "read_circuit"]


def circuit_file(path: str | Path) -> Path:
    """File of a circuit, given itself or the folder of its run."""
    from acdc.errors import CircuitFileError

    path = Path(path)
    if not path.exists():
        raise CircuitFileError(f"{path}: no such folder or file; give a run or a circuit file")
    if not path.is_dir():
        return path
    file = path / "circuit.json"
    if not file.exists():
        from acdc.runs.folder import check_single  # torch takes seconds

        check_single(path)
    return file


def load_circuit(path: str | Path) -> Circuit:
    """Read the circuit of a run's folder, or a circuit file: JSON, or MIB's ``.pt``.

    Raises
    ------
    CircuitFileError
        If there is none, or it cannot be read.

    Examples
    --------
    >>> import acdc
    >>> acdc.load_circuit("runs/my-ioi").n_edges  # doctest: +SKIP
    """
    return read_circuit(circuit_file(path))


def read_circuit(file: Path) -> Circuit:
    """Read a circuit file, which need not be there; errors as of :func:`load_circuit`."""
    if file.suffix.lower() == ".pt":
        from acdc.runs.pt import read_pt  # torch takes seconds

        return read_pt(file)
    from graphs.files.formats import load_circuit as read

    return read(file)
