"""A checkpoint on disk to a quantised one on disk, tensor by tensor.

In memory at any time: one tensor of the source and one shard of the result. What a killed run has finished is kept, and
the same call goes on from there.
"""

from __future__ import annotations

import gc
import hashlib
import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from onegpu.convert.checkpoint_files import auto_name, load_config, model_class, notes_on, write_beside
from onegpu.convert.checkpoint_plan import Plan, make_plan, meta_model, pieces
from onegpu.convert.quantized import default_skips
from onegpu.convert.quantizer import with_default_skips
from onegpu.convert.report import Change
from onegpu.errors import ArgumentError, CheckpointError, bad_argument
from onegpu.formats.bitsandbytes import Settings
from onegpu.formats.checkpoint import TORCH_DTYPES, TensorInfo, read_headers, read_tensor
from onegpu.formats.folder import Source, check_complete, find_source
from onegpu.formats.gguf import is_gguf, materialize
from onegpu.formats.model_card import model_card
from onegpu.formats.unfinished import Unfinished, check_output, check_room, disk_full, is_full, open_work, parse_size
from onegpu.hardware import check_device
from onegpu.placement.fit import format_bytes

FORMATS = ("nf4", "fp4", "int8")
_DTYPES = ("float32", "float16", "bfloat16")
Progress = Callable[[int, int], None]


@dataclass
class QuantizedCheckpoint:
    """What :func:`quantize_checkpoint` made.

    output: the folder. quantized, left: layers that were, and that stay as they are with the reason. source_bytes,
    output_bytes: of the weights. shards: number of files. resumed: shards that an earlier run had finished.
    """

    output: Path
    to: str
    quantized: list[Change]
    left: list[Change]
    source_bytes: int
    output_bytes: int
    shards: int
    resumed: int
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "output": str(self.output)}


@dataclass(frozen=True)
class _Options:
    to: str
    double_quant: bool
    skip_modules: tuple[str, ...]
    max_shard_size: str | int
    dtype: str | None
    bitsandbytes_compatible: bool

    def command(self, source: Source, output: Path) -> str:
        """The command line that makes the result again; folders by their last name only."""
        words = ["onegpu", "quantize", source.name, "--to", self.to, "--output", output.absolute().name]
        words += ["--revision", source.commit] if source.commit is not None else []
        words += ["--double-quant"] if self.double_quant else []
        for name in self.skip_modules:
            words += ["--skip-module", name]
        words += ["--max-shard-size", str(self.max_shard_size)] if self.max_shard_size != "5GB" else []
        words += ["--dtype", self.dtype] if self.dtype is not None else []
        words += ["--bitsandbytes-compatible"] if self.bitsandbytes_compatible else []
        return shlex.join(words)


def quantize_checkpoint(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: str,
    *,
    double_quant: bool = False,
    skip_modules: Iterable[str] = (),
    max_shard_size: str | int = "5GB",
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    bitsandbytes_compatible: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> QuantizedCheckpoint:
    """Quantise a checkpoint on disk without ever holding the model.

    The result is what ``AutoModel….from_pretrained(model, load_in_4bit=True, …).save_pretrained(output)`` writes, for
    models that a load can hold; tensors have the names of the source. If the process ends early, the same call goes on
    from the last finished shard, and the result is the same byte for byte.

    Args:
        model: a folder, a name on the hub, or a ``.gguf`` file.
        output: the folder to make; it must not hold anything.
        to: "nf4", "fp4" or "int8".
        double_quant: quantise the 4-bit scales too.
        skip_modules: layers to leave, beside the default ones (the head, tied weights).
        max_shard_size: of one file of the result, such as "5GB".
        dtype: of what is not quantised: "float32", "float16" or "bfloat16"; None is the checkpoint's.
        revision: branch, tag or commit on the hub.
        bitsandbytes_compatible: leave what transformers + bitsandbytes cannot load quantised: experts of a mixture and
            subclasses of ``nn.Linear`` (Falcon's).
        device: where to quantise; None is the GPU if there is one. Zeros can get other codes on a GPU than on a CPU.
        progress: called after each tensor with the bytes done and the bytes in all.

    Raises:
        ArgumentError: an argument cannot work; ``output`` is not empty, or its disk too small, by how many bytes.
        CheckpointError: the source is quantised already, pickled, damaged, incomplete, or holds NaN or infinity.
    """
    if to not in FORMATS:
        raise bad_argument("to", to, "is not a format", f"use one of {', '.join(FORMATS)}")
    if double_quant and to == "int8":
        raise bad_argument("double_quant", True, "is for 4-bit formats", "leave it out, or use nf4 or fp4")
    options = _Options(
        to, double_quant, tuple(skip_modules), max_shard_size, _dtype_name(dtype), bitsandbytes_compatible
    )
    limit, target, where = parse_size(max_shard_size), Path(output), _device(device)
    check_output(target)
    if is_gguf(model):
        if revision is not None:
            raise bad_argument("revision", revision, "is given for a file", "leave it out")
        found = find_source(materialize(model, progress=progress is not None))
        source = Source(found.folder, Path(model).name, None, found.weights)
    else:
        source = find_source(model, revision)
    headers = read_headers(source.weights)
    headers.sort(key=lambda info: (info.file, info.start))
    check_complete(source, {info.name for info in headers})
    plan, saved = _plan(source, headers, options)
    request = _request(source, options, limit, where)
    notes = [] if bitsandbytes_compatible else notes_on(plan)
    with open_work(target, request) as work:
        resumed, shards = len(work.shards), {}
        try:
            if work.publishing is None:
                _check_room(work, source, plan)
                card = _card(source, plan, options, target, notes)
                write_beside(work.files, source, plan.model, saved, card)
                _write_shards(plan, work, limit, where, progress)
                shards = work.index(plan.model.num_parameters())
            result = QuantizedCheckpoint(
                target, to, plan.quantized, plan.left, sum(info.nbytes for info in headers),
                sum(shard.nbytes for shard in work.shards), len(work.shards), resumed, notes,
            )  # fmt: skip
            work.publish(shards)
        except CheckpointError:
            work.discard()  # the source must change, and then nothing of this holds
            raise
        except Exception as error:
            if is_full(error):
                raise disk_full(target) from error
            raise
    return result


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in _DTYPES:
        raise bad_argument("dtype", dtype, "is no dtype for weights", f"use one of {', '.join(_DTYPES)}")
    return name


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if str(device).partition(":")[0] not in ("cpu", "cuda"):
        raise bad_argument("device", device, "cannot quantise", 'use "cpu", "cuda" or "cuda:1"')
    check_device(device)
    return str(device)


def _plan(source: Source, headers: list[TensorInfo], options: _Options) -> tuple[Plan, Any]:
    """What to do with each tensor, and the ``BitsAndBytesConfig`` of the result."""
    from transformers import BitsAndBytesConfig

    config = load_config(source)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(headers):  # before they are built, which could take for ever
        reason = f"says num_hidden_layers={layers}, and the files hold {len(headers)} tensors"
        raise CheckpointError(file=source.folder / "config.json", reason=reason, fix="correct it")
    dtype = getattr(torch, options.dtype) if options.dtype is not None else _stored_dtype(config, headers)
    # The arguments of a load, so that config.json becomes the same.
    if options.to == "int8":
        asked = BitsAndBytesConfig(load_in_8bit=True)
    else:
        asked = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=options.to, bnb_4bit_use_double_quant=options.double_quant
        )
    asked.llm_int8_skip_modules = list(options.skip_modules) or None
    model = meta_model(model_class(config), config, dtype)
    plan = make_plan(model, headers, Settings.from_config(asked), options.bitsandbytes_compatible)
    asked.llm_int8_skip_modules = list(plan.settings.skip) or None
    return plan, with_default_skips(asked, default_skips(model))


def _stored_dtype(config: Any, headers: list[TensorInfo]) -> torch.dtype:
    """The config's, else that of the first float tensor, as transformers decides for ``dtype="auto"``."""
    named = getattr(torch, config.dtype, None) if isinstance(config.dtype, str) else config.dtype
    if isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    floats = (TORCH_DTYPES.get(info.dtype) for info in headers)
    return next((d for d in floats if d in (torch.float32, torch.float16, torch.bfloat16)), torch.float32)


def _request(source: Source, options: _Options, limit: int, device: str) -> dict[str, Any]:
    """Everything that decides the bytes of the result; work is continued only where all of it is the same."""
    import transformers

    from onegpu import __version__

    def stamp(file: Path) -> list[Any]:
        status = file.stat()
        return [file.name, status.st_size, status.st_mtime_ns if source.commit is None else 0]

    beside = [source.folder / name for name in ("config.json", *source.companions())]
    return {
        "options": {**asdict(options), "skip_modules": list(options.skip_modules), "max_shard_size": limit},
        "model": [source.name, source.commit],
        "files of the model": [stamp(file) for file in source.weights],
        "files beside the weights": hashlib.sha256(b"".join(file.read_bytes() for file in beside)).hexdigest(),
        "device": device.partition(":")[0],
        "versions": [__version__, transformers.__version__, torch.__version__],
    }


def _check_room(work: Unfinished, source: Source, plan: Plan) -> None:
    """Is there room for what is still to be written? Asked before anything is."""
    beside = sum((source.folder / name).stat().st_size for name in source.companions())
    written = sum(shard.nbytes for shard in work.shards)
    try:
        check_room(work.output, max(0, plan.output_bytes() + beside + (1 << 20) - written))
    except ArgumentError:
        if not work.shards:
            work.discard()
        raise


def _card(source: Source, plan: Plan, options: _Options, output: Path, notes: list[str]) -> str:
    from onegpu import __version__

    reasons = ", ".join(dict.fromkeys(change.reason for change in plan.left))
    weights = sum(step.info.nbytes for step in plan.steps)
    rows = [
        ("Source", f"`{source.name}`" + (f" at `{source.commit}`" if source.commit else "")),
        ("Format", options.to + (", double quantisation" if options.double_quant else "")),
        ("Quantised", f"{len(plan.quantized)} weights"),
        ("Left as they were", f"{len(plan.left)} layers" + (f" ({reasons})" if reasons else "")),
        ("Other weights", str(plan.model.dtype).removeprefix("torch.")),
        ("Size of the source", format_bytes(weights)),
    ]
    return model_card(
        source,
        to=options.to,
        command=options.command(source, output),
        version=__version__,
        auto=auto_name(plan.model),
        rows=rows,
        notes=notes,
    )


def _write_shards(plan: Plan, work: Unfinished, limit: int, device: str, progress: Progress | None) -> None:
    """From where the work stands to the last shard."""
    first, skip = work.cursor
    total = sum(step.info.nbytes for step in plan.steps)
    done = sum(step.info.nbytes for step in plan.steps[:first])
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for number, step in enumerate(plan.steps[first:], first):
        value = read_tensor(step.info)
        for piece, entries in enumerate(pieces(step, value, plan.model, plan.settings, device)):
            if number == first and piece < skip:
                continue
            added = sum(tensor.numel() * tensor.element_size() for tensor in entries.values())
            if shard and size + added > limit:
                work.save_shard(shard, number, piece)
                shard, size = {}, 0
            shard.update(entries)
            size += added
        del value
        done += step.info.nbytes
        if progress is not None:
            progress(done, total)
    if shard:
        work.save_shard(shard, len(plan.steps), 0)
    gc.collect()
