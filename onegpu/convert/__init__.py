"""Changing instances of transformers models by what they are made of, and giving the originals back."""

from onegpu.convert.optimize import optimize, restore
from onegpu.convert.report import Change, Report

__all__ = ["Change", "Report", "optimize", "restore"]
