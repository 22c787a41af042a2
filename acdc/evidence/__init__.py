"""How far to believe a circuit: tests, repetitions, directions, frontiers, references."""
