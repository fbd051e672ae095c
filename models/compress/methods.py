"""Every method by the name that recipes use."""

from __future__ import annotations

from collections.abc import Mapping

from models.compress.blocks import blocks
from models.compress.cells import cells
from models.compress.finetune import finetune
from models.compress.half import half
from models.compress.mixed import mixed
from models.compress.pq import pq
from models.compress.prune import prune
from models.compress.recipe import Method
from models.compress.rows import int4, int8, weights
from models.compress.static import static
from models.compress.structure import heads, history, layers, neurons, width
from models.compress.tie import tie
from models.compress.topk import topk

METHODS: Mapping[str, Method] = {
    "tie": tie,
    "prune": prune,
    "heads": heads,
    "neurons": neurons,
    "width": width,
    "layers": layers,
    "history": history,
    "finetune": finetune,
    "half": half,
    "int8": int8,
    "int4": int4,
    "weights": weights,
    "static": static,
    "blocks": blocks,
    "mixed": mixed,
    "pq": pq,
    "cells": cells,
    "topk": topk,
}
