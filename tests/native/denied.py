"""Runs a Python program in which the kernel refuses io_uring, as containers' seccomp profiles do:

    python -m tests.native.denied PROGRAM.py [ARGUMENT...]

A filter of this process alone; needs no privilege.
"""

from __future__ import annotations

import ctypes
import errno
import runpy
import struct
import sys

_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_FIRST, _LAST = 425, 427
"""io_uring_setup, io_uring_enter and io_uring_register: the same numbers on every architecture."""


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def deny_uring() -> None:
    """From now on, and for good. Raises OSError where filters cannot be had."""
    lines = [
        (_LOAD, 0, 0, 0),  # the system call's number
        (_JUMP_IF_AT_LEAST, 0, 2, _FIRST),
        (_JUMP_IF_AT_LEAST, 1, 0, _LAST + 1),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = _Program(len(lines), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_NO_NEW_PRIVS, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "no seccomp filter")


if __name__ == "__main__":
    deny_uring()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
