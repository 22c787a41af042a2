"""What processes of :class:`killed.Acdc` begin with: all modules, and no thread but one."""

import matplotlib.figure
import torch

import acdc.cli
import acdc.pages
import benchmarks.accuracy_report
from acdc.models import load_model

torch.set_num_threads(1)  # a pool of threads does not survive the fork
load_model("ioi-small")  # what it imports comes late otherwise

__all__ = ["acdc", "benchmarks", "matplotlib"]
