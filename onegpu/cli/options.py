"""Options that several verbs share, and what they mean for `from_pretrained` and `generate`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from onegpu.errors import bad_argument


class QuantType(str, Enum):
    """The two 4-bit code books."""

    nf4 = "nf4"
    fp4 = "fp4"


class DType(str, Enum):
    """Types of the weights that are not quantised."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


_WEIGHTS, _SAMPLING, _OUTPUT = "Model", "Sampling", "Output"

Model = Annotated[str, typer.Argument(help="A folder, a name on the hub, or a .gguf file.", metavar="MODEL")]
GgufFile = Annotated[
    str | None, typer.Option(help="A GGUF file in the folder or repository MODEL.", rich_help_panel=_WEIGHTS)
]
LoadIn4Bit = Annotated[bool, typer.Option("--load-in-4bit", help="Quantise to 4 bits.", rich_help_panel=_WEIGHTS)]
LoadIn8Bit = Annotated[bool, typer.Option("--load-in-8bit", help="Quantise to 8 bits.", rich_help_panel=_WEIGHTS)]
Quant = Annotated[
    QuantType | None, typer.Option(help="4-bit code book, with --load-in-4bit.  [fp4]", rich_help_panel=_WEIGHTS)
]
DoubleQuant = Annotated[
    bool, typer.Option("--double-quant", help="Quantise the 4-bit scales as well.", rich_help_panel=_WEIGHTS)
]
Type = Annotated[
    DType | None, typer.Option(help="Type of the other weights.  [the checkpoint's]", rich_help_panel=_WEIGHTS)
]
DeviceMap = Annotated[str | None, typer.Option(help='"auto", "balanced", "cpu", "cuda:0", …', rich_help_panel=_WEIGHTS)]
MaxMemory = Annotated[
    list[str] | None,
    typer.Option(help="Limit of one device, such as 0=6GB or cpu=30GiB; repeatable.", rich_help_panel=_WEIGHTS),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with MODEL.", rich_help_panel=_WEIGHTS),
]
CacheDir = Annotated[Path | None, typer.Option(help="Where converted GGUF files are kept.", rich_help_panel=_WEIGHTS)]

MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens to make.  [256]", rich_help_panel=_SAMPLING)]
Sample = Annotated[
    bool | None,
    typer.Option("--do-sample/--greedy", help="Draw tokens at random, or take the best.", rich_help_panel=_SAMPLING),
]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.", rich_help_panel=_SAMPLING)]
TopK = Annotated[int | None, typer.Option(min=0, rich_help_panel=_SAMPLING)]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, rich_help_panel=_SAMPLING)]
MinP = Annotated[float | None, typer.Option(min=0.0, max=1.0, rich_help_panel=_SAMPLING)]
TypicalP = Annotated[float | None, typer.Option(min=0.0, max=1.0, rich_help_panel=_SAMPLING)]
RepetitionPenalty = Annotated[float | None, typer.Option(min=0.01, rich_help_panel=_SAMPLING)]
NoRepeatNgramSize = Annotated[int | None, typer.Option(min=0, rich_help_panel=_SAMPLING)]
NumBeams = Annotated[
    int | None, typer.Option(min=1, help="Beam search; the answer is then not streamed.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.", rich_help_panel=_SAMPLING)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.", rich_help_panel=_OUTPUT)]

_SIZE = re.compile(r"\d+(\.\d+)?\s*([KMGT]i?)?B?", re.IGNORECASE)


@dataclass
class ModelOptions:
    """Which model, and how it is loaded."""

    model: str
    gguf_file: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    quant_type: QuantType | None = None
    double_quant: bool = False
    dtype: DType | None = None
    device_map: str | None = None
    max_memory: list[str] | None = None
    trust_remote_code: bool = False
    cache_dir: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`; only what the user asked for.

        Raises:
            ArgumentError: options that contradict each other or mean nothing.
        """
        if self.load_in_4bit and self.load_in_8bit:
            raise bad_argument("--load-in-4bit", True, "and --load-in-8bit exclude each other", "Use one of them")
        given = {"--quant-type": self.quant_type and self.quant_type.value, "--double-quant": self.double_quant}
        for name, value in given.items():
            if value and not self.load_in_4bit:
                raise bad_argument(name, value, "belongs to 4-bit weights", "Add --load-in-4bit, or leave it out")
        arguments: dict[str, Any] = {}
        if self.load_in_4bit:
            arguments["load_in_4bit"] = True
        if self.load_in_8bit:
            arguments["load_in_8bit"] = True
        if self.quant_type is not None:
            arguments["bnb_4bit_quant_type"] = self.quant_type.value
        if self.double_quant:
            arguments["bnb_4bit_use_double_quant"] = True
        if self.dtype is not None:
            arguments["dtype"] = self.dtype.value
        if self.device_map is not None:
            arguments["device_map"] = int(self.device_map) if self.device_map.isdecimal() else self.device_map
        if self.max_memory:
            arguments["max_memory"] = parse_max_memory(self.max_memory)
            arguments.setdefault("device_map", "auto")  # a limit without a map would limit nothing
        if self.trust_remote_code:
            arguments["trust_remote_code"] = True
        return arguments


def parse_max_memory(pairs: list[str]) -> dict[int | str, str | int]:
    """`["0=6GB", "cpu=30GiB"]` to `{0: "6GB", "cpu": "30GiB"}`.

    Raises:
        ArgumentError: not KEY=SIZE; a size that is none; a GPU that does not exist.
    """
    from onegpu.hardware import check_device

    limits: dict[int | str, str | int] = {}
    for pair in pairs:
        key, equals, size = (part.strip() for part in pair.partition("="))
        fix = "Write DEVICE=SIZE, such as 0=6GB or cpu=30GiB"
        if not equals or not (key.isdecimal() or key in ("cpu", "disk", "mps")):
            raise bad_argument("--max-memory", pair, "does not name a device (0, 1, …, cpu, disk) and a size", fix)
        if not _SIZE.fullmatch(size):
            raise bad_argument("--max-memory", pair, f"gives {size!r} as a size", fix)
        place: int | str = int(key) if key.isdecimal() else key
        check_device(place, name="--max-memory")
        limits[place] = int(size) if size.isdecimal() else size
    return limits


@dataclass
class SamplingOptions:
    """How the answer is made; None leaves a setting to the model's generation config."""

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    seed: int | None = None
    stop: list[str] | None = None
    settings: dict[str, float | int | None] = field(default_factory=dict)  # temperature, top_k, …

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `generate`, less `max_new_tokens`, the seed and the stop strings.

        Raises:
            ArgumentError: values that `generate` would refuse.
        """
        given = {name: value for name, value in self.settings.items() if value is not None}
        sample = self.do_sample
        if given.get("temperature") == 0:
            if sample:
                raise bad_argument("--temperature", 0, "is greedy, and --do-sample is given", "Use one of them")
            sample = False
            del given["temperature"]
        shaping = [name for name in ("temperature", "top_k", "top_p", "min_p", "typical_p") if name in given]
        if shaping and sample is None:
            sample = True  # whoever shapes the distribution means to draw from it
        elif shaping and sample is False and self.do_sample is False:
            name = "--" + shaping[0].replace("_", "-")
            raise bad_argument(name, given[shaping[0]], "has no effect with --greedy", "Leave one of them out")
        arguments: dict[str, Any] = dict(given)
        if sample is not None:
            arguments["do_sample"] = sample
        return arguments
