"""ONNX Runtime sessions of a bundle: how they are set, loaded and run."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from worker.errors import BundleError, Refusal
from worker.manifest import CARRY, TensorSpec, signature

#: Most histories of one run: what a run needs grows with them, and the arena keeps it; and with
#: more, what passes between the layers falls out of the processor's cache.
MAX_RUN_ROWS = 64
_ORT_TYPES = {"tensor(int64)": "int64", "tensor(float)": "float32"}
_PIPE_BYTES = 1 << 20
_PROVIDERS = ["CPUExecutionProvider"]
#: A few bytes of a graph can be a constant of gigabytes. Weights of 4 bits, as float32, are eight
#: times as large; releases of ONNX Runtime that do not know the setting pass over it.
_FOLDING_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"
_FOLDED, _SMALL_FOLD = 8, 64 << 20


def session_options(intra_op_threads: int) -> ort.SessionOptions:
    """How every bundle is run; why so is in `worker.bundle.open_bundle`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what fails is raised; nothing is printed
    return options


def load_session(
    name: str, model: Iterator[bytes], intra_op_threads: int, *, file_bytes: int
) -> ort.InferenceSession:
    """Load a graph from a stream of its bytes.

    ONNX Runtime parses the stream as it comes, through a pipe. Given `bytes`, it would keep them
    besides what it makes of them, for as long as the session lives; given a path, it would read
    a file that may have changed since it was checked.

    Args:
        name: for the message.
        model: what it raises at its end, such as for a wrong checksum, discards the session.
        file_bytes: the size of the file, which bounds what its constants may be folded to.

    Raises:
        BundleError: what `model` raises, or that ONNX Runtime does not load it.
    """
    options = session_options(intra_op_threads)
    options.add_session_config_entry(_FOLDING_LIMIT, str(max(_FOLDED * file_bytes, _SMALL_FOLD)))
    reading, writing = os.pipe()
    feed = _Feed(model, writing)
    problem: Exception | None = None
    session = None
    feed.start()
    try:
        session = ort.InferenceSession(f"/dev/fd/{reading}", options, providers=_PROVIDERS)
    except Exception as error:
        problem = error
    finally:
        # A feed that ONNX Runtime stopped reading ends by this.
        os.close(reading)
        feed.join()
    if feed.problem is not None:
        raise feed.problem
    if session is None:
        raise BundleError(
            f"ONNX Runtime does not load {name}: {first_line(problem)}", Refusal.NOT_ONNX
        )
    return session


class _Feed(threading.Thread):
    """Writes the chunks to a pipe, then closes it."""

    def __init__(self, chunks: Iterator[bytes], writing: int) -> None:
        super().__init__(name="model-feed", daemon=True)
        self._chunks = chunks
        self._writing = writing
        #: What the chunks raised.
        self.problem: Exception | None = None

    def run(self) -> None:
        # Fewer turns between the two threads; where it is not allowed, the pipe stays small.
        with suppress(OSError):
            fcntl.fcntl(self._writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            for chunk in self._chunks:
                left = memoryview(chunk)
                while left:
                    left = left[os.write(self._writing, left) :]
        except BrokenPipeError:
            pass  # the reader failed, and says why
        except Exception as error:
            self.problem = error
        finally:
            os.close(self._writing)


def graph_inputs(model: bytes) -> list[TensorSpec]:
    """Inputs of a graph, types as ONNX Runtime names them; none where it does not load, which is
    left to the checks."""
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model, options, providers=_PROVIDERS)
    except Exception:
        return []
    return [
        TensorSpec(
            node.name, _ORT_TYPES.get(node.type, node.type), [dim or "" for dim in node.shape]
        )
        for node in session.get_inputs()
    ]


def check_tensors(
    name: str,
    session: ort.InferenceSession,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> None:
    """All of `outputs` must be there, and no input but `inputs`.

    Raises:
        BundleError: one is missing, is of another type or rank, or too many.
    """
    for kind, found, wanted in (
        ("inputs", session.get_inputs(), inputs),
        ("outputs", session.get_outputs(), outputs),
    ):
        by_name = {node.name: node for node in found}
        for spec in wanted:
            node = by_name.pop(spec.name, None)
            if node is None:
                raise BundleError(f"{name} has no {kind[:-1]} {spec.name!r}", Refusal.CONTRACT)
            if _ORT_TYPES.get(node.type) != spec.dtype or len(node.shape) != len(spec.shape):
                raise BundleError(
                    f"{kind[:-1]} {spec.name} is {node.type} {node.shape};"
                    f" the contract is {signature([spec])}",
                    Refusal.CONTRACT,
                )
        if by_name and kind == "inputs":
            raise BundleError(
                f"{name} wants inputs beyond the contract: {', '.join(by_name)}", Refusal.CONTRACT
            )


def fresh_carry(batch: int, width: int) -> NDArray[np.float32]:
    """Carries of users of whom nothing was read yet: zeros float32 `[batch, width]`."""
    return np.zeros((batch, width), dtype=np.float32)


def run_model(
    session: ort.InferenceSession,
    outputs: Sequence[str],
    history: NDArray[np.int64],
    k: int,
    *,
    carry_width: int | None,
    carry: NDArray[np.float32] | None = None,
) -> list[Any]:
    """One run: the tensors named by `outputs`.

    Args:
        history: int64 `[batch, length]`.
        carry_width: of a recurrent model, else None.
        carry: float32 `[batch, carry_width]`; None for users of whom nothing was read yet.
    """
    feeds: dict[str, Any] = {"history": history, "k": np.array([k], dtype=np.int64)}
    if carry_width is not None:
        feeds[CARRY] = fresh_carry(len(history), carry_width) if carry is None else carry
    return list(session.run(outputs, feeds))


def first_line(error: BaseException | None) -> str:
    """What ONNX Runtime says, without its trace."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
