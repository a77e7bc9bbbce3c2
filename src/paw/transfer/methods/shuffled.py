"""Placebo: another method fitted on positions that are paired at random. What it recovers, the pairing of text did not give."""

from __future__ import annotations

from paw.transfer.methods import Placebo, unspoilt

METHOD = Placebo(unspoilt)  # its evidence is spoilt, not its result
