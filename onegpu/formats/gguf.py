"""GGUF input: a `.gguf` file is expanded once into an ordinary checkpoint folder, which then loads like any other.

transformers can read GGUF, but slowly (SmolLM2-135M: 20 s), wholly in memory, and never together with a quantisation
config. So its reader runs once for each file, its result is checked and written as safetensors into a private cache
(`gguf_cache`), and from then on the loader streams and quantises that folder as it does any checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onegpu import hardware
from onegpu.errors import CheckpointError, MemoryBudgetError, bad_argument
from onegpu.formats.gguf_cache import (
    CacheEntry,
    building,
    cache_root,
    clear_cache,
    entry_key,
    file_digest,
    is_complete,
    known_digest,
    list_cache,
    seal,
)
from onegpu.formats.gguf_header import Header, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CacheEntry", "clear_cache", "find_file", "is_gguf", "list_cache", "materialize"]


def is_gguf(path: str | os.PathLike[str], gguf_file: str | None = None) -> bool:
    """Whether a model argument means GGUF input: `gguf_file` is given, or the path itself ends in `.gguf`."""
    return gguf_file is not None or os.fspath(path).lower().endswith(".gguf")


def materialize(
    path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    hub_options: Mapping[str, Any] | None = None,
) -> Path:
    """Expands a GGUF file into a checkpoint folder, or finds the one made before.

    Args:
        path: a `.gguf` file; or, with `gguf_file`, a folder or a repository on the Hugging Face hub.
        gguf_file: name of the file in that folder or repository.
        cache_dir: where conversions are kept; default: the user's cache (see `gguf_cache.cache_root`).
        progress: say on stderr that a conversion runs, and show its progress bars.
        hub_options: `revision`, `token`, `local_files_only`, … for a file that has to be downloaded.

    Returns:
        A folder with config.json, safetensors weights and the tokenizer, for `from_pretrained`. The weights have the
        float type the file was written in; float32 if it holds quantised blocks.

    Raises:
        ArgumentError: there is no such file, or the cache's disk has no room for the result.
        CheckpointError: not GGUF, cut short, not supported by transformers, weights missing or not finite.
        MemoryBudgetError: the expanded weights are larger than the free memory of the machine.
    """
    file = find_file(path, gguf_file, hub_options)
    root = cache_root(cache_dir)
    digest = known_digest(file, root)
    header = None
    if digest is None:
        header = read_header(file)  # a broken file is refused before all of it is read
        digest = file_digest(file, root)
    dtype = _known_dtype(root, digest)
    if dtype is None:
        header = header or read_header(file)
        dtype = header.dtype
    key = entry_key(digest, dtype, _transformers_version())
    if is_complete(root / key):
        return root / key
    header = header or read_header(file)
    with building(root, key) as build:
        if build is not None:
            _check_room(header, root)
            if progress:
                print(f"Converting {file.name} to safetensors, once; it is kept in {root}", file=sys.stderr)
            with contextlib.nullcontext() if progress else _no_progress_bars():
                _convert(header, build)
            seal(build, source=str(file.resolve()), sha256=digest, dtype=dtype, transformers=_transformers_version())
    return root / key


def find_file(
    path: str | os.PathLike[str], gguf_file: str | None = None, hub_options: Mapping[str, Any] | None = None
) -> Path:
    """The GGUF file that the arguments of `materialize` mean, downloaded if it lies on the hub.

    Raises:
        ArgumentError: there is no such file.
    """
    place = Path(path)
    if gguf_file is None:
        if place.is_file():
            return place
        if place.is_dir():
            raise bad_argument("path", str(place), "is a folder", f"Name the file: {_choices(place)}")
        raise bad_argument("path", str(place), "does not exist", "Check the path")
    if place.is_dir() or os.path.isabs(gguf_file):
        file = place / gguf_file
        if not file.is_file():
            raise bad_argument("gguf_file", gguf_file, f"does not exist in {place}", f"Name one of: {_choices(place)}")
        return file
    if place.is_file():
        raise bad_argument("gguf_file", gguf_file, f"is given, but {place} is a file itself", "Leave gguf_file out")
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(str(path), gguf_file, **(hub_options or {}))
        assert found is not None  # None is for calls that ask not to raise
    except (OSError, ValueError) as error:  # not found, no network, no access, not a repository name
        raise bad_argument("gguf_file", gguf_file, f"was not found in {path}: {error}", "Check both names") from error
    return Path(found)


def _choices(folder: Path) -> str:
    names = sorted(file.name for file in folder.glob("*.gguf")) if folder.is_dir() else []
    return ", ".join(names) or "(there is no .gguf file in it)"


def _known_dtype(root: Path, digest: str) -> str | None:
    """The dtype in the key of an entry made from this content, which saves reading the header again."""
    version = _transformers_version()
    for dtype in ("float32", "float16", "bfloat16"):
        if (root / entry_key(digest, dtype, version)).is_dir():
            return dtype
    return None


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


def _check_room(header: Header, root: Path) -> None:
    import torch

    needed = header.elements * getattr(torch, header.dtype).itemsize
    free_disk = shutil.disk_usage(root).free
    if free_disk < needed + (64 << 20):
        raise bad_argument(
            "cache_dir",
            str(root),
            f"has {free_disk / 1e9:.1f} GB free, {header.path.name} needs {needed / 1e9:.1f} GB when expanded",
            "Free space, run `onegpu cache clear`, or name a cache_dir on a larger disk",
        )
    free_memory = hardware.free_host_bytes()
    if free_memory is not None and free_memory < needed:
        missing = (needed - free_memory) / 1e9
        raise MemoryBudgetError(
            f"{header.path.name} takes {needed / 1e9:.1f} GB of memory while it is expanded and "
            f"{free_memory / 1e9:.1f} GB are free: {missing:.1f} GB are missing. Convert it on a machine with more "
            "memory, or use the model's original safetensors checkpoint, which loads shard by shard."
        )


def _convert(header: Header, build: Path) -> None:
    """Runs transformers' reader over the file and saves model and tokenizer into the folder `build`."""
    import torch
    import transformers

    folder, name = str(header.path.parent), header.path.name
    auto = {"t5": transformers.AutoModelForSeq2SeqLM, "t5encoder": transformers.AutoModel}.get(
        header.architecture, transformers.AutoModelForCausalLM
    )
    with _reader_errors(header.path):
        model, info = auto.from_pretrained(
            folder,
            gguf_file=name,
            dtype=getattr(torch, header.dtype),
            # For some architectures the reader can keep blocks packed, and such a model cannot be saved.
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # then they are reported, and the error below can name the tensor
        )
    _check_weights(header, model, info)
    _stop_at_end_of_turn(header, model)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # what is saved is a plain checkpoint
    model.save_pretrained(build, max_shard_size="2GB")
    del model
    if "tokenizer.ggml.model" in header.metadata:
        with _reader_errors(header.path):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        _name_special_tokens(header, tokenizer)
        tokenizer.save_pretrained(build)


@contextlib.contextmanager
def _reader_errors(file: Path) -> Iterator[None]:
    """Turns whatever transformers' GGUF reader raises on a file it cannot use into one error that names the file."""
    try:
        yield
    except ImportError as error:
        reason = f"reading this architecture needs a package that is not installed ({error})"
        raise CheckpointError(file=file, reason=reason, fix="pip install 'onegpu[gguf]'") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OSError) as error:
        reason = f"transformers {_transformers_version()} cannot read it: {type(error).__name__}: {error}"
        fix = "Use the model's safetensors checkpoint, or a GGUF of an architecture that transformers supports"
        raise CheckpointError(file=file, reason=reason, fix=fix) from error


def _check_weights(header: Header, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    import torch

    again = "Download or convert the file again"
    if missing := sorted(info.get("missing_keys", ())):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        reason = f"the model needs it and it is not in the file{more}"
        raise CheckpointError(file=header.path, tensor=missing[0], reason=reason, fix=again)
    # transformers 5.17 does not compare shapes here: it puts whatever the file holds into the module.
    with torch.device("meta"):
        expected = type(model)(model.config).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.shape != expected[name].shape or name in _mismatched(info):
            reason = f"its shape is not {tuple(expected[name].shape)}, which the file's own figures ask for"
            raise CheckpointError(file=header.path, tensor=name, reason=reason, fix=again)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                file=header.path,
                tensor=name,
                reason=f"{count} of its {tensor.numel()} values are NaN or infinite",
                fix=again,
            )


def _mismatched(info: Mapping[str, Any]) -> set[str]:
    """Names in transformers' loading info, which lists them alone or with the two shapes."""
    return {item if isinstance(item, str) else item[0] for item in info.get("mismatched_keys", ())}


def _name_special_tokens(header: Header, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the special tokens that the file names: the reader of transformers 5.17 gets SmolLM2's end token wrong."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            setattr(tokenizer, f"{name}_token", tokens[number])


def _stop_at_end_of_turn(header: Header, model: PreTrainedModel) -> None:
    """Adds the file's end-of-turn token to the tokens that end generation; the reader knows only end-of-text."""
    turn = header.metadata.get("tokenizer.ggml.eot_token_id")
    settings = getattr(model, "generation_config", None)
    if settings is None or not isinstance(turn, int):
        return
    ends = settings.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if turn not in ends:
        settings.eos_token_id = [*ends, turn]


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silences the bars of transformers' reader, one of which heeds no switch and writes to whatever stderr is.

    Log messages still come out: logging handlers hold the stream that was there when they were made.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        yield
