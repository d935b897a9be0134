"""`onegpu chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from onegpu.cli import options as opt
from onegpu.cli.failure import guarded, say_error
from onegpu.errors import OneGPUError, bad_argument

COMMANDS = """/reset         forget the conversation, keep the system message
/system TEXT   set the system message and forget the conversation; without TEXT show it
/save FILE     write the conversation as JSON
/help          this list
/exit          leave (Ctrl-D does too)
Ctrl-C ends an answer; at the prompt it leaves."""


@guarded
def chat(
    model: opt.Model,
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    gguf_file: opt.GgufFile = None,
    load_in_4bit: opt.LoadIn4Bit = False,
    load_in_8bit: opt.LoadIn8Bit = False,
    quant_type: opt.Quant = None,
    double_quant: opt.DoubleQuant = False,
    dtype: opt.Type = None,
    device_map: opt.DeviceMap = None,
    max_memory: opt.MaxMemory = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    cache_dir: opt.CacheDir = None,
    max_new_tokens: opt.MaxNewTokens = None,
    do_sample: opt.Sample = None,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    json_output: opt.Json = False,
) -> None:
    """Talk with a model that has a chat template. Commands while you chat: /help lists them.

    With --json every line of stdin is a message and every answer one JSON object on a line of stdout.

    Examples:

        onegpu chat Qwen/Qwen2.5-0.5B-Instruct --load-in-4bit

        onegpu chat ./model.gguf --system "Answer in one sentence." --temperature 0.7
    """
    weights = opt.ModelOptions(
        model, gguf_file, load_in_4bit, load_in_8bit, quant_type, double_quant, dtype, device_map, max_memory,
        trust_remote_code, cache_dir,
    )  # fmt: skip
    settings = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    sampling = opt.SamplingOptions(max_new_tokens, do_sample, seed, stop, settings)
    sampling.arguments()
    from onegpu.cli.loading import load, prepare

    prepared = prepare(weights, progress=not json_output)
    if not prepared.tokenizer.chat_template:
        raise bad_argument(
            "MODEL", model, "has no chat template", "Use an instruction-tuned model, or `onegpu generate`"
        )
    loaded, load_s = load(prepared)
    conversation = Conversation(loaded, prepared.tokenizer, sampling, name=model, system=system, load_s=load_s)
    talk(conversation, json_output)


@dataclass
class Conversation:
    """A model, what was said so far, and how to go on."""

    model: Any
    tokenizer: Any
    sampling: opt.SamplingOptions
    name: str = ""
    system: str | None = None
    load_s: float = 0.0
    turns: list[dict[str, str]] = field(default_factory=list)
    saved: Path | None = None

    def messages(self) -> list[dict[str, str]]:
        """System message and turns, as the chat template takes them."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + self.turns

    def reply(self, text: str, write: Any) -> Any:
        """Answers `text`, and remembers both, also if Ctrl-C ended the answer.

        Raises:
            ArgumentError: the conversation does not fit the model's context; it is as it was before.
        """
        from onegpu.cli.answer import answer, encode, plan_length

        question = {"role": "user", "content": text}
        inputs = encode(self.tokenizer, [*self.messages(), question])
        length = plan_length(int(inputs["input_ids"].shape[1]), self.model.config, self.sampling.max_new_tokens)
        result = answer(self.model, self.tokenizer, inputs, self.sampling, length, write, interruptible=True)
        self.turns += [question, {"role": "assistant", "content": result.text}]
        return result

    def save(self, file: Path) -> None:
        """Writes the conversation as JSON, whole or not at all; only a file of this conversation is written over.

        Raises:
            ArgumentError: the file exists, or cannot be written.
        """
        if file.exists() and file != self.saved:
            raise bad_argument("/save", str(file), "exists", "Choose another name")
        content = json.dumps({"model": self.name, "messages": self.messages()}, indent=1, ensure_ascii=False)
        try:
            handle, temporary = tempfile.mkstemp(prefix=".onegpu-", dir=file.parent)
        except OSError as error:
            raise bad_argument("/save", str(file), f"cannot be written: {error.strerror}", "Check the path") from error
        try:
            with open(handle, "w", encoding="utf-8") as stream:
                stream.write(content)
            os.replace(temporary, file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self.saved = file


def talk(conversation: Conversation, json_output: bool = False) -> None:
    """Reads messages and commands from stdin until it ends or /exit."""
    from onegpu.cli.answer import as_json, speed_line
    from onegpu.cli.generate import write

    if not json_output:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  once imported, input() has line editing and history
        typer.secho("/help lists the commands, /exit leaves.", dim=True, err=True)
    while True:
        try:
            line = input("" if json_output or not sys.stdin.isatty() else "> ").strip()
        except EOFError:
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                if not command(conversation, line):
                    return
                continue
            result = conversation.reply(line, None if json_output else write)
        except OneGPUError as error:  # a mistake in one line does not end the conversation
            say_error(error, json_output)
            continue
        if json_output:
            typer.echo(json.dumps(as_json(result, conversation.model, conversation.load_s)))
        else:
            typer.echo()
            typer.secho(speed_line(result), dim=True, err=True)


def command(conversation: Conversation, line: str) -> bool:
    """Does what a line that begins with / asks for; False if that is to leave.

    Raises:
        ArgumentError: no such command, or one that lacks its argument.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit"):
        return False
    if name == "/help":
        typer.echo(COMMANDS, err=True)
    elif name == "/reset":
        conversation.turns.clear()
        typer.secho("forgotten", dim=True, err=True)
    elif name == "/system":
        if rest:
            conversation.system = rest
            conversation.turns.clear()
        typer.secho(f"system message: {conversation.system or 'none'}", dim=True, err=True)
    elif name == "/save":
        if not rest:
            raise bad_argument("/save", rest, "names no file", "Write /save FILE")
        conversation.save(Path(rest).expanduser())
        typer.secho(f"saved to {rest}", dim=True, err=True)
    else:
        raise bad_argument("command", name, "does not exist", "/help lists the commands")
    return True
