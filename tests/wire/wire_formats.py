"""The formats and shapes with which codecs are tested."""

import itertools
from dataclasses import replace

from flashcomm.wire.format import GROUPS, WIDTHS, StepFormat

ALL = [StepFormat(b, g, h) for b, g, h in itertools.product(WIDTHS, GROUPS, (False, True))]
FORMATS = [s for s in ALL if s.group == 64 or (s.bits > 3 and (s.hadamard or s.group in (32, 128)))]
"""The formats that are tested one by one. Left out are 2 and 3 bits with groups other than 64,
and plain groups of 16 and 256.

Randomized tests draw from ALL."""

HADAMARD = [step for step in FORMATS if step.hadamard]
IN_HADAMARD_DOMAIN = [replace(step, in_hadamard_domain=True) for step in ALL if step.hadamard]

SHAPES = [(5, 576), (3, 7), (1, 1000), (4, 256), (2, 1), (2, 2880), (1,), (640,), (3, 600)]


def name(v: object) -> str:
    """For pytest's ids."""
    return f"{v}-in-domain" if getattr(v, "in_hadamard_domain", False) else str(v)
