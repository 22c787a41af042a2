"""One small language model that does every built-in task, trained from scratch.

====================  ======================================================================
:mod:`~.words`        word lists beyond those of :mod:`acdc.tasks.words`
:mod:`~.documents`    generated text: a task and a form -> documents, held-out pairs of words
:mod:`~.source`       real text: the source and the docstrings of Python's standard library
:mod:`~.tokenizer`    a byte-pair tokenizer that keeps the tasks' words whole
:mod:`~.data`         rows of tokens, targets' weights, and the batch of a step
:mod:`~.model`        the architecture, half-precision folders and loading them
:mod:`~.train`        training that can be stopped and goes on bit by bit as if it had not been
:mod:`~.probes`       accuracy by task and form on pairs of words that training never had
:mod:`~.behaviour`    what heads do: roles by attention, edges between heads, path patching
:mod:`~.card`         the model card
====================  ======================================================================

``python -m benchmarks.language train --out FOLDER`` trains, the same line goes on after a stop.
"""
