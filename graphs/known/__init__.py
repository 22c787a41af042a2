"""Known circuits: reference files, comparisons, bases side by side, ROC curves."""
