"""Runs: discovery, the folder of a run, runs opened again, unseen prompts, files of others."""
