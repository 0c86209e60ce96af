"""The chat: its commands, its history, stopping an answer, a real process behind a pipe and one behind a terminal."""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from oriole.apps import chat as chat_module
from oriole.apps.api import Oriole
from oriole.apps.chat import ChatSettings, Leave, Session, chat
from oriole.apps.thinking import Piece
from oriole.errors import ConfigError, ModelError


@pytest.fixture
def session(oriole: Oriole) -> Session:
    return Session(oriole, ChatSettings(temperature=0.0, max_new_tokens=15))


def say(session: Session, text: str) -> str:
    return "".join(session.ask(text))


def test_a_conversation_remembers_and_forgets(oriole: Oriole, session: Session) -> None:
    options: Any = {"temperature": 0.0, "max_new_tokens": 15}
    first = say(session, "sing")
    assert first == oriole.generate("sing", **options)
    second = say(session, "sing")
    assert second == oriole.generate("sing", [("sing", first)], **options) != first
    assert session.history == [("sing", first), ("sing", second)]
    assert session.command("/system 唱歌") == "The system prompt is set."
    assert say(session, "窗") == oriole.generate("窗", session.history[:2], system="唱歌", **options)
    assert session.command("clear") == session.command("/clear") == "The conversation is forgotten."
    assert say(session, "sing") == oriole.generate("sing", system="唱歌", **options) != first
    session.command("/system")
    session.command("/clear")
    assert say(session, "sing") == first


@pytest.mark.parametrize("word", ["!exit", "quit", "exit", "/quit", "/exit"])
def test_words_that_leave(session: Session, word: str) -> None:
    with pytest.raises(Leave):
        session.command(word)


@pytest.mark.parametrize("text", ["quit smoking", "clear sky", "please exit", "/etc/hosts 是什么", "// x", "!exit now"])
def test_a_question_is_no_command(session: Session, text: str) -> None:
    assert session.command(text) is None


def test_help_stats_and_unknown_commands(session: Session) -> None:
    assert session.command("/stats") == "Nothing was said yet."
    say(session, "sing")
    stats = session.command("/stats")
    assert stats and re.search(r"15 tokens in .* [\d.]+ tokens/s.*\n.*1 turns, \d+ of 160 tokens", stats)
    assert "/system TEXT" in (session.command("/help") or "")
    assert "no command /sing" in (session.command("/sing x") or "")


class Terminal:
    """Stands for the person: gives lines to `input`, collects what the console prints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lines: list[str | BaseException]) -> None:
        self.out = io.StringIO()
        self._lines = iter(lines)
        monkeypatch.setattr("builtins.input", self._input)
        monkeypatch.setattr(chat_module, "Console", lambda **_: Console(file=self.out, width=80, highlight=False))

    def _input(self, prompt: str) -> str:
        line = next(self._lines)
        if isinstance(line, BaseException):
            raise line
        return line


def test_ctrl_c_stops_the_answer_only(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Oriole.answers

    def stopped(*args: Any, **named: Any) -> Iterator[Any]:
        for n, event in enumerate(real(*args, **named)):
            if n == 6:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(Oriole, "answers", stopped)
    terminal = Terminal(monkeypatch, ["sing", "/stats", KeyboardInterrupt()])
    chat_module._on_terminal(session)
    [(asked, answered)] = session.history
    out = terminal.out.getvalue()
    assert asked == "sing" and answered and "[stopped]" in out
    assert "1 turns" in out and "Goodbye" in out


def test_model_and_user_text_is_never_markup_or_control(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def evil(*_: Any, **__: Any) -> Iterator[Any]:
        yield 0, Piece("[red]x[/red] \x1b[2J\x07[/]", False)
        yield 0, Piece("\tok\n", True)

    monkeypatch.setattr(Oriole, "answers", evil)
    terminal = Terminal(monkeypatch, ["[bold]hi[/bold] [/]", "", "/x [/]", EOFError()])
    chat_module._on_terminal(session)
    out = terminal.out.getvalue()
    assert "[red]x[/red] \ufffd[2J\ufffd[/]" in out and "\x1b" not in out
    assert session.history == [("[bold]hi[/bold] [/]", "[red]x[/red] \x1b[2J\x07[/]\tok\n")]


def test_a_question_that_is_too_long_does_not_end_the_chat(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, ["窗" * 500, "sing", EOFError()])
    chat_module._on_terminal(session)
    assert "model's context is 160" in terminal.out.getvalue().replace("\n", " ")
    assert [q for q, _ in session.history] == ["sing"]


def test_settings_and_models_that_do_not_fit(
    model_folder: Path, tmp_path: Path, save_tiny: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match="oriole chat: unknown key 'temp'"):
        chat(model_folder, ["temp=1"])
    with pytest.raises(ModelError, match="cannot chat yet"):
        chat(save_tiny(tmp_path / "base", chat=False))


TALK = "import sys; from oriole.apps.chat import chat; chat(sys.argv[1], sys.argv[2:])"


def test_a_pipe_gets_plain_answers(model_folder: Path, oriole: Oriole) -> None:
    words = ["temperature=0", "max_new_tokens=15", "device=cpu"]
    lines = "sing\n\n窗含西岭\nclear\nsing\n!exit\nnever\n"
    done = subprocess.run(
        [sys.executable, "-c", TALK, str(model_folder), *words],
        input=lines.encode(), capture_output=True, timeout=120, env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    options: Any = {"temperature": 0.0, "max_new_tokens": 15}
    first = oriole.generate("sing", **options)
    second = oriole.generate("窗含西岭", [("sing", first)], **options)
    assert done.stdout.decode() == f"{first}\n{second}\nThe conversation is forgotten.\n{first}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_prompt_and_a_goodbye(model_folder: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TALK, str(model_folder), "temperature=0", "max_new_tokens=5", "device=cpu"],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    out = b""
    try:
        for waits_for, types in (("you ›", b"sing\n"), ("oriole ›", b""), ("you ›", b"\x04")):
            start = len(out)
            while waits_for.encode() not in out[start:]:
                out += os.read(ours, 4096)
            os.write(ours, types)
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while piece := os.read(ours, 4096):
                out += piece
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "再见".encode() in out
