"""Modules that hold quantised weights and call one op each, with bitsandbytes' names and constructors."""

from onegpu.nn.embedding import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4
from onegpu.nn.experts import ExpertStack4bit, ExpertStack8bit
from onegpu.nn.linear_4bit import Linear4bit, LinearFP4, LinearNF4
from onegpu.nn.linear_8bit import Int8Params, Linear8bitLt
from onegpu.nn.params_4bit import Params4bit

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "ExpertStack4bit",
    "ExpertStack8bit",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
]
