"""A lab endpoint: a model server with one variant, and the front that a customer talks to."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.lab.front import Front, Lies
from weighbridge.lab.llamacpp import LlamaServer
from weighbridge.lab.process import ModelServer
from weighbridge.lab.torch_server import TorchServer
from weighbridge.lab.variants import OFFICIAL_TEMPLATE, TORCH_VARIANTS, VARIANTS, TorchVariant, Variant
from weighbridge.lab.weights import lab_folder, require_extra, weight_file


@contextmanager
def lab_backend(variant: Variant | TorchVariant, say: Callable[[str], None]) -> Iterator[ModelServer]:
    """The server of one variant, without a front: llama.cpp's, or that of the local weights.

    Raises
    ------
    LabError
        If the extra is missing, the model cannot be fetched or the server does not start.
    """
    server: ModelServer
    logs = lab_folder() / "log"
    if isinstance(variant, TorchVariant):
        require_extra("hf")
        template = variant.template or OFFICIAL_TEMPLATE
        server = TorchServer(lab_checkpoint(say), template, variant.setting, logs / f"transformers-{variant.name}.log")
        say("starting the local-weights server")
    else:
        require_extra()
        model = weight_file(variant.weights, say)
        server = LlamaServer(model, variant.template, variant.settings, logs / f"{variant.name}.log")
    with server:
        yield server


@contextmanager
def lab_endpoint(
    variant: Variant | TorchVariant,
    lies: Lies,
    say: Callable[[str], None],
    *,
    diverted_to: Variant | TorchVariant | None = None,
    forged_from: Variant | None = None,
    port: int = 0,
    completions: bool | None = None,
) -> Iterator[Front]:
    """A lab endpoint; its `Front` says where it is.

    Parameters
    ----------
    variant : Variant or TorchVariant
        What is served, and so the engine.
    lies : Lies
        What the front misreports. Where they have the true model answer some requests, it is served as well.
    say : callable
        Receives a line for each step that takes long.
    diverted_to : Variant or TorchVariant, optional
        What serves the share ``lies.divert_share`` of requests instead; of the same engine.
    forged_from : Variant, optional
        Whose logprobs are given out as those of ``variant``, which still writes the text.
    port : int
        The front's port; 0 for any free one.
    completions : bool, optional
        Whether /v1/completions is offered besides the chat; by default where the engine is transformers.
    """
    with contextlib.ExitStack() as stack:
        main = stack.enter_context(lab_backend(variant, say))
        other = stack.enter_context(lab_backend(diverted_to, say)) if diverted_to is not None else None
        original = TORCH_VARIANTS["f32"] if isinstance(variant, TorchVariant) else VARIANTS["f16"]
        true = stack.enter_context(lab_backend(original, say)) if lies.sometimes_true else None
        forger = stack.enter_context(lab_backend(forged_from, say)) if forged_from is not None else None
        front = Front(
            main.port,
            lies,
            diverted_port=other.port if other else None,
            forged_port=forger.port if forger else None,
            true_port=true.port if true else None,
            port=port,
            completions=isinstance(variant, TorchVariant) if completions is None else completions,
        )
        yield stack.enter_context(front)
