"""Launching a Triton kernel again without working out again what it is specialised for.

Triton looks at every argument of every launch to find the compiled kernel that it found the last time: 9 to 16
microseconds of Python for each of ours, 6 times in a layer, which together is two thirds of what a fast GPU takes for a
decode step of one sequence. Which kernel it is depends on little: the tensors' dtypes, whether they begin at multiples
of 16 bytes, and a few integers. That is looked at here; all else, the first launch of a kind above all, is Triton's.

As with Triton's own, the function that looks is made for a kernel's parameters: going over them in a loop takes longer
than the rest. **Not run on a GPU yet**; tested with Triton's launcher replaced (`tests/kernels/test_launch.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_log = logging.getLogger(__name__)

_AGAIN = """
def again(grid, {arguments}):
    {addresses}
    device = {first}.get_device()
    known = kernels.get((device, {kinds}))
    if known is None or ({alignments}) % 16 or enter.calls or leave.calls:
        return launch_and_note(grid, {arguments})
    run, function, metadata = known
    try:
        run(*grid, stream_of(device), function, metadata, None, None, None, {values}, *constants)
    except TypeError as error:
        give_up(error, grid, {arguments})
"""


class Launcher:
    """One kernel for one set of constants. Any thread; launches go to its current stream."""

    def __init__(self, kernel: Any, constants: Mapping[str, Any], **options: int) -> None:
        """`kernel`: of `triton.jit`, its constants behind all other parameters. `options`: `num_warps` and the like."""
        self._kernel = kernel
        self._constants = constants
        self._settings = {**constants, **options}
        self._again: Callable[..., Any] | None = None
        self._kernels: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        """How to launch what was compiled: by device, dtypes and specialised integers, for aligned tensors."""
        self._aligned: list[int] = []
        """Places of tensors whose alignment is specialised for."""
        self._kinds: tuple[list[int], list[int]] = [], []
        """Places of all tensors, and of the integers that are specialised for."""

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch with the kernel's arguments, in order and without the constants; a place has a tensor always or never,
        the first one always."""
        if self._again is None:
            self._again = self._made_for(args)
        self._again(grid, *args)

    def _launch(self, grid: tuple[int, int, int], *args: Any) -> Any:
        """Triton's way."""
        return self._kernel[grid](*args, **self._settings)

    def _made_for(self, args: Sequence[Any]) -> Callable[..., Any]:
        """What launches with arguments like these."""
        if not isinstance(self._kernel, JITFunction):
            return self._launch  # in Triton's interpreter
        params = self._kernel.params[: len(args)]
        tensors = [param for param, arg in zip(params, args, strict=True) if isinstance(arg, torch.Tensor)]
        aligned = [one for one in tensors if not (one.do_not_specialize or one.do_not_specialize_on_alignment)]
        numbers = [
            param
            for param, arg in zip(params, args, strict=True)
            if isinstance(arg, int) and not param.do_not_specialize  # of the others only their 32 bits count
        ]
        self._aligned = [one.num for one in aligned]
        self._kinds = [one.num for one in tensors], [one.num for one in numbers]
        source = _AGAIN.format(
            arguments=", ".join(one.name for one in params),
            addresses="; ".join(f"{one.name}_at = {one.name}.data_ptr()" for one in tensors),
            first=params[0].name,
            kinds=", ".join([*(f"{one.name}.dtype" for one in tensors), *(one.name for one in numbers)]),
            alignments=" | ".join(f"{one.name}_at" for one in aligned),
            values=", ".join(f"{one.name}_at" if one in tensors else one.name for one in params),
        )
        try:
            known: dict[str, Any] = {
                "kernels": self._kernels,
                "launch_and_note": self._launch_and_note,
                "give_up": self._give_up,
                "stream_of": driver.active.get_current_stream,
                "enter": _hooks("launch_enter_hook"),
                "leave": _hooks("launch_exit_hook"),
                "constants": [self._constants[one.name] for one in self._kernel.params[len(args) :]],
            }
        except AttributeError as error:
            return self._without_short_cut(error)
        assert known.keys().isdisjoint(one.name for one in params)
        exec(source, known)
        return known["again"]  # type: ignore[no-any-return]

    def _launch_and_note(self, grid: tuple[int, int, int], *args: Any) -> None:
        """By Triton, which compiles at the first time; what it took is known from then on."""
        compiled = self._launch(grid, *args)
        if compiled is not None and not any(args[place].data_ptr() % 16 for place in self._aligned):
            tensors, numbers = self._kinds
            key = (args[0].get_device(), *(args[place].dtype for place in tensors), *(args[place] for place in numbers))
            self._kernels[key] = compiled.run, compiled.function, compiled.packed_metadata

    def _give_up(self, error: TypeError, grid: tuple[int, int, int], *args: Any) -> None:
        """This Triton wants to be launched otherwise; nothing was launched."""
        self._again = self._without_short_cut(error)
        self._launch(grid, *args)

    def _without_short_cut(self, error: Exception) -> Callable[..., Any]:
        _log.warning("kernels are launched the slow way: Triton %s is not what it was (%s)", triton.__version__, error)
        return self._launch


def _hooks(name: str) -> Any:
    """What profilers want to be called. Raises AttributeError where they are kept in another way."""
    hooks = getattr(triton.knobs.runtime, name)
    _ = hooks.calls
    return hooks
