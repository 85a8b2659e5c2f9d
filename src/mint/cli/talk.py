"""`mint chat` and `mint sample`: talk to a model or a checkpoint."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from mint.cli.common import JsonOption, checkpoint_named, command, is_checkpoint, make_console, print_json
from mint.errors import InputError

if TYPE_CHECKING:
    import mint
    from mint import types
    from mint.chat import Renderer

CHAT_HELP = (
    "/reset forgets the conversation, /system TEXT sets a system message, /quit or Ctrl-D leaves; Ctrl-C ends an answer"
)

NameArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT|MODEL", help="tinker:// path, folder of a run, or a base model.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0)]
TopK = Annotated[int, typer.Option(help="-1 is off.")]
Seed = Annotated[int | None, typer.Option(help="Makes answers repeatable.", show_default="drawn")]
System = Annotated[str | None, typer.Option(help="System message.")]
Thinking = Annotated[bool, typer.Option("--thinking", help="Let a thinking model (Qwen3) think first.")]


@dataclass(slots=True)
class Speaker:
    """A model with its own memory of the conversation."""

    label: str
    client: mint.SamplingClient
    renderer: Renderer
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def short_label(self) -> str:
        return self.label.rstrip("/").rpartition("/")[2]

    def reset(self, system: str | None) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, params: types.SamplingParams) -> Iterator[str]:
        """The answer to `text`, piece by piece; it joins the memory when it ends or is left."""
        from mint import types

        asked = [*self.messages, {"role": "user", "content": text}]
        tokens: list[int] = []
        shown = ""
        stream = self.client.stream(types.ModelInput.from_ints(self.renderer.prompt(asked)), params)
        try:
            for token in stream:
                tokens.append(token)
                text_so_far = self._text(tokens)
                if text_so_far.startswith(shown) and not text_so_far.endswith("\N{REPLACEMENT CHARACTER}"):
                    yield text_so_far[len(shown) :]
                    shown = text_so_far
            yield self._text(tokens)[len(shown) :]
        finally:
            if tokens:
                self.messages = [*asked, self.renderer.parse(tokens).message]

    def _text(self, tokens: list[int]) -> str:
        stops = set(self.renderer.stop_token_ids)
        tokenizer = self.renderer.tokenizer
        return tokenizer.decode([t for t in tokens if t not in stops], skip_special_tokens=False)


def open_speaker(service: mint.ServiceClient, name: str, *, thinking: bool) -> Speaker:
    """Of a checkpoint path, the folder of a recipe's run, or a base model."""
    from mint.chat import get_renderer

    path = checkpoint_named(name)
    model_path, base_model = (path, None) if is_checkpoint(path) else (None, path)
    client = service.create_sampling_client(model_path, base_model)
    return Speaker(name, client, get_renderer(client.get_tokenizer(), thinking=thinking))


def chat(
    name: NameArgument,
    system: System = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the base model's answer beside the tuned one.")
    ] = False,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = -1,
    seed: Seed = None,
    thinking: Thinking = False,
) -> None:
    """Talk to a checkpoint or a base model; answers appear as they are written. Reads lines from a pipe as well."""
    import mint
    from mint import types

    console = make_console()
    choice: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    with command(make_console(stderr=True)), mint.ServiceClient() as service:
        speakers = [open_speaker(service, name, thinking=thinking)]
        if compare:
            base = speakers[0].client.get_base_model()
            if base == speakers[0].label:
                raise InputError(f"--compare: {name} is a base model itself; give a checkpoint")
            speakers.insert(0, open_speaker(service, base, thinking=thinking))
        params = types.SamplingParams(**choice, stop_token_ids=speakers[0].renderer.stop_token_ids)
        for speaker in speakers:
            speaker.reset(system)
        console.print(f"[dim]{CHAT_HELP}[/dim]")
        for text in _lines(console):
            if text.startswith("/"):
                _obey(text, speakers, system, console)
            else:
                _answer(text, speakers, params, console)


def _lines(console: Console) -> Iterator[str]:
    """What the user types, without empty lines, until the end."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # gives input() line editing and history
    while True:
        try:
            text = console.input("\n[bold]you>[/bold] " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/quit":
            return
        if text:
            yield text


def _obey(text: str, speakers: list[Speaker], system: str | None, console: Console) -> None:
    order, _, rest = text.partition(" ")
    if order == "/reset":
        new_system = system
    elif order == "/system" and rest:
        new_system = rest
    else:
        console.print(f"[yellow]{CHAT_HELP}[/yellow]")
        return
    for speaker in speakers:
        speaker.reset(new_system)
    console.print("[dim]the conversation starts anew[/dim]")


def _answer(text: str, speakers: list[Speaker], params: types.SamplingParams, console: Console) -> None:
    """What cannot be answered (too long, say) is told, and the conversation goes on as it was."""
    try:
        if len(speakers) == 1:
            console.print(f"[bold]{speakers[0].short_label}>[/bold] ", end="", highlight=False)
            for piece in speakers[0].ask(text, params):
                console.print(_printable(piece), end="", markup=False, highlight=False, soft_wrap=True)
            console.print()
        else:
            with console.status("both are answering"):
                answers = [_printable("".join(speaker.ask(text, params))) for speaker in speakers]
            width = max(20, console.width // 2 - 1)
            panels = [
                Panel(Text(answer), title=Text(speaker.label), width=width)
                for speaker, answer in zip(speakers, answers, strict=True)
            ]
            console.print(Columns(panels))
    except InputError as error:
        console.print(f"[yellow]{error}[/yellow]\n[dim]/reset makes room[/dim]", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("\n[dim]ended here[/dim]")


def _printable(text: str) -> str:
    """Without control characters, with which a model could steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def sample(
    name: NameArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; none, or -, reads them from stdin, one a line.")
    ] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=1, help="Answers to each prompt.")] = 1,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = -1,
    seed: Seed = None,
    thinking: Thinking = False,
    as_json: JsonOption = False,
) -> None:
    """Answers for scripts. All prompts share one running batch."""
    import mint
    from mint import types

    console = make_console(stderr=True)  # stdout is the answers'
    choice: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    piped = prompts == ["-"] or (not prompts and not sys.stdin.isatty())
    texts = [line.rstrip("\n") for line in sys.stdin if line.strip()] if piped else prompts
    with command(console, verbose=False), mint.ServiceClient() as service:
        if not texts:
            raise InputError("no prompt: give one as an argument, or lines on standard input")
        speaker = open_speaker(service, name, thinking=thinking)
        tokenizer = speaker.renderer.tokenizer
        params = types.SamplingParams(**choice, stop_token_ids=speaker.renderer.stop_token_ids)
        inputs = []
        for text in texts:
            speaker.reset(system)
            messages = [*speaker.messages, {"role": "user", "content": text}]
            plain = tokenizer.encode(text, add_special_tokens=True, verbose=False) if raw else None
            inputs.append(plain if plain is not None else speaker.renderer.prompt(messages))
        futures = [speaker.client.sample(types.ModelInput.from_ints(ids), num_samples, params) for ids in inputs]
        results = [_result(text, f.result(), speaker) for text, f in zip(texts or [], futures, strict=True)]
    if as_json:
        print_json(results)
        return
    for result in results:
        for found in result["samples"]:
            if len(results) * num_samples > 1:
                typer.echo(f"--- {result['prompt']}")
            typer.echo(found["text"])


def _result(prompt: str, response: types.SampleResponse, speaker: Speaker) -> dict[str, Any]:
    samples = []
    for sequence in response.sequences:
        answer = speaker.renderer.parse(sequence.tokens)
        samples.append({
            "text": answer.content, "thinking": answer.reasoning, "stop_reason": sequence.stop_reason,
            "tokens": sequence.tokens, "logprobs": sequence.logprobs,
        })  # fmt: skip
    return {"prompt": prompt, "samples": samples}
