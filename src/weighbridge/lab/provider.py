"""A lab endpoint: llama.cpp's server with one variant, and the front that a customer talks to."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weighbridge.lab.front import Front, Lies
from weighbridge.lab.llamacpp import LlamaServer
from weighbridge.lab.variants import Variant
from weighbridge.lab.weights import lab_folder, require_extra, weight_file


@contextmanager
def lab_backend(variant: Variant, say: Callable[[str], None]) -> Iterator[LlamaServer]:
    """llama.cpp's server with one variant, without a front.

    Raises
    ------
    LabError
        If the extra is missing, the model cannot be fetched or the server does not start.
    """
    require_extra()
    model = weight_file(variant.weights, say)
    with LlamaServer(model, variant.template, variant.settings, lab_folder() / "log" / f"{variant.name}.log") as server:
        yield server


@contextmanager
def lab_endpoint(
    variant: Variant,
    lies: Lies,
    say: Callable[[str], None],
    *,
    diverted_to: Variant | None = None,
    port: int = 0,
) -> Iterator[Front]:
    """A lab endpoint; its `Front` says where it is.

    Parameters
    ----------
    variant : Variant
        What is served.
    lies : Lies
        What the front misreports.
    say : callable
        Receives a line for each step that takes long.
    diverted_to : Variant, optional
        What serves the share ``lies.divert_share`` of requests instead.
    port : int
        The front's port; 0 for any free one.
    """
    with contextlib.ExitStack() as stack:
        main = stack.enter_context(lab_backend(variant, say))
        other = stack.enter_context(lab_backend(diverted_to, say)) if diverted_to is not None else None
        yield stack.enter_context(Front(main.port, lies, diverted_port=other.port if other else None, port=port))
