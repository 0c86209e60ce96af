"""`oriole chat`: talk to a model in the terminal, or through a pipe, one question a line."""

import contextlib
import io
import re
import sys
import time
import unicodedata
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, final

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from oriole.apps.api import Generation, Oriole, Placement
from oriole.apps.conversation import conversation
from oriole.apps.thinking import Piece
from oriole.config import apply_overrides, parse_overrides, validate
from oriole.errors import OrioleError
from oriole.log import human

__all__ = ["ChatSettings", "Session", "chat"]

HELP = """\
/clear        forget the conversation (also: clear)
/system TEXT  set the system prompt; without TEXT there is none
/stats        speed and length of the conversation
/help         this list
/quit         leave (also: quit, exit, !exit, Ctrl-D)
Ctrl-C stops an answer; at the prompt it leaves."""

_LEAVE = {"/quit", "/exit", "quit", "exit", "!exit"}
_COMMAND = re.compile(r"/[A-Za-z]+(\s|$)")  # so that a question may begin with a path like /etc/hosts


class ChatSettings(Generation, Placement):
    """The keys of `oriole chat`."""

    system: str = ""
    """The system prompt; none by default."""


class Leave(Exception):
    """The user wants to go."""


def chat(path: str | Path, settings: Sequence[str] = ()) -> None:
    """Talk to the model at `path` until the user leaves; `settings` are `key=value` of `ChatSettings`.

    On a terminal with decoration; where input or output is a pipe, only the answers are printed, one after each line.
    """
    given: dict[str, Any] = {}
    apply_overrides(given, parse_overrides(settings))
    how = validate(ChatSettings, given, "oriole chat")
    oriole = Oriole(path).place(how)
    oriole.require_chat()
    session = Session(oriole, how)
    if sys.stdin.isatty() and sys.stdout.isatty():
        _on_terminal(session)
    else:
        _through_pipe(session)


@final
class Session:
    """A conversation: its history, its system prompt and how fast it goes."""

    def __init__(self, oriole: Oriole, how: ChatSettings) -> None:
        self.oriole = oriole
        self.how = how
        self.system = how.system
        self.history: list[tuple[str, str]] = []
        self._tokens = 0
        self._seconds = self._first = 0.0

    def ask(self, query: str) -> Iterator[str]:
        """The answer, piece by piece, without what was thought before it. It becomes part of the history as far as it
        came, also when it is stopped."""
        with contextlib.closing(self.pieces(query)) as pieces:
            yield from (piece.text for piece in pieces if not piece.thought)

    def pieces(self, query: str) -> Generator[Piece]:
        """`ask`, with the thoughts."""
        start = time.perf_counter()
        prompt = self.oriole.prompt(conversation(query, self.history, self.system or None), self.how)
        self._tokens, self._first = 0, 0.0
        answer = ""
        try:
            for _, piece in self.oriole.answers([prompt], self.how, batch=1):
                self._tokens += 1
                self._first = self._first or time.perf_counter() - start
                answer += "" if piece.thought else piece.text
                if piece.text:
                    yield piece
        finally:
            self._seconds = time.perf_counter() - start
            if answer:
                self.history.append((query, answer))

    def command(self, line: str) -> str | None:
        """What to reply if the line is a command, None if it is a question; `Leave` if it says goodbye."""
        if line in _LEAVE:
            raise Leave
        if line == "clear":
            line = "/clear"
        if not _COMMAND.match(line):
            return None
        name, _, rest = line.partition(" ")
        match name:
            case "/clear":
                self.history.clear()
                return "The conversation is forgotten."
            case "/system":
                self.system = rest.strip()
                return "The system prompt is set." if self.system else "There is no system prompt now."
            case "/stats":
                return self._stats()
            case "/help":
                return HELP
            case _:
                return f"There is no command {name}.\n{HELP}"

    def _stats(self) -> str:
        if not self._tokens:
            return "Nothing was said yet."
        used = len(self.oriole.prompt(conversation("", self.history, self.system or None), self.how))
        after = self._tokens - 1
        rate = after / (self._seconds - self._first) if after and self._seconds > self._first else 0.0
        return (
            f"last answer: {self._tokens} tokens in {self._seconds:.2f} s, {rate:.1f} tokens/s "
            f"after the first, which took {self._first * 1000:.0f} ms\n"
            f"conversation: {len(self.history)} turns, {used} of {self.oriole.context} tokens"
        )


def _through_pipe(session: Session) -> None:
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale says, a pipe carries UTF-8
            stream.reconfigure(encoding="utf-8", errors=errors)
    with contextlib.suppress(Leave):
        for line in map(str.strip, sys.stdin):
            if not line:
                continue
            if (reply := session.command(line)) is not None:
                print(reply, flush=True)
                continue
            for piece in session.ask(line):
                print(piece, end="", flush=True)
            print(flush=True)


def _on_terminal(session: Session) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - its import gives input() line editing and history
    console = Console(highlight=False)
    config = session.oriole.model.config
    device = next(session.oriole.model.parameters()).device
    about = f"{session.oriole.folder}\n{human(config.num_params())} parameters on {device}, context {config.context}"
    console.print(
        Panel(Text(about + "\n/help lists the commands"), title="oriole", expand=False, border_style="yellow")
    )
    while True:
        console.print()
        try:
            line = input("you › ").strip()
            reply = session.command(line) if line else None
        except (EOFError, KeyboardInterrupt, Leave):
            console.print(Text("\nGoodbye. 再见。", style="dim"))
            return
        if reply is not None:
            console.print(Text(reply, style="dim"))
        elif line:
            _answer(session, line, console)


def _answer(session: Session, line: str, console: Console) -> None:
    """Print the answer as it comes. Text of the model is data: neither markup nor control codes work in it."""
    console.print(Text("oriole › ", style="bold yellow"), end="")
    try:
        thought = False
        for piece in session.pieces(line):
            gap = "\n\n" if thought and not piece.thought else ""
            thought = piece.thought
            console.print(Text(gap + _visible(piece.text), style="dim" if thought else ""), end="", soft_wrap=True)
    except KeyboardInterrupt:
        console.print(Text(" [stopped]", style="dim"), end="")
    except OrioleError as error:
        console.print(Text(str(error), style="red"), end="")
    console.print()


def _visible(text: str) -> str:
    """The text without control characters other than line break and tab: an escape code could rewrite the screen."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
