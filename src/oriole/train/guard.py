"""What is put around the loop: stopping by a signal, work beside it, evaluations without trace, errors with advice."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

import torch
from torch import nn

from oriole.errors import ResourceError
from oriole.train import checkpoint

__all__ = ["Background", "StopRequest", "from_compiler", "memory_errors", "out_of_memory", "undisturbed"]

T = TypeVar("T")


class _BreakOff(BaseException):
    """Leaves `breakable` work when a signal comes."""


class StopRequest:
    """Remembers that SIGINT or SIGTERM came; a second signal meets the handlers that were there before."""

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that came, if any."""
        self._breakable = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the two signals inside the block. Outside of the main thread, where Python has no signals, nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) or signal.SIG_DFL for s in (signal.SIGINT, signal.SIGTERM)}

        def give_back() -> None:
            for signum, handler in before.items():
                signal.signal(signum, handler)

        def ask(signum: int, frame: FrameType | None) -> None:
            self.signum = signum
            give_back()
            if self._breakable:
                raise _BreakOff

        for signum in before:
            signal.signal(signum, ask)
        try:
            yield
        finally:
            give_back()

    def breakable(self, work: Callable[[], T]) -> T | None:
        """The result of `work`, which must have no effects; None when a signal came: it is left at once."""
        if self.signum is not None:
            return None
        try:
            self._breakable = True
            return work()
        except _BreakOff:
            return None
        finally:
            self._breakable = False


class Background:
    """One piece of work at a time in a thread beside the loop; its error comes out where the loop asks.

    The thread is no daemon: an interpreter that ends waits for it instead of cutting it off inside a library.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work` as soon as the work before it has ended."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        thread = threading.Thread(target=run, name=self._name)
        try:
            thread.start()
        except RuntimeError:  # no memory for a stack, or no more threads allowed: then not beside the loop
            run()
        else:
            self._thread = thread

    def check(self) -> None:
        """Raise the error of work that has ended with one; waits for nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the work to end; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever happens inside, random numbers and the modules' modes are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    rng = checkpoint.rng_state(device)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        checkpoint.restore_rng(*rng, device)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a lack of memory, on the host or the device, into a `ResourceError` that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(
            "the device has not enough memory, and cutting the step into single rows does not help; "
            "lower train.length or take a smaller model"
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether this says that the host or the device has no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def from_compiler(error: BaseException) -> bool:
    """Whether torch.compile's own machinery raised this (a cache folder that cannot be written counts)."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
