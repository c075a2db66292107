#!/usr/bin/env python3
"""Runs a program on a machine without symbolic links: the kernel refuses to make one, as FAT and some network disks do.

usage: without_symlinks.py PROGRAM WORD...
"""
import ctypes
import os
import struct
import sys

SYMLINK, SYMLINKAT = 88, 266  # x86_64
ALLOW, EPERM = 0x7FFF0000, 0x00050000 | 1
LOAD, JUMP_IF, RETURN = 0x20, 0x15, 0x06
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 38, 22, 2

program = b"".join(
    struct.pack("HBBI", *line)
    for line in [
        (LOAD, 0, 0, 0),
        (JUMP_IF, 1, 0, SYMLINK),
        (JUMP_IF, 0, 1, SYMLINKAT),
        (RETURN, 0, 0, EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
)
text = ctypes.create_string_buffer(program)
filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 5, ctypes.addressof(text)))
libc = ctypes.CDLL(None, use_errno=True)
for call in [(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, FILTER, ctypes.byref(filter_), 0, 0)]:
    if libc.prctl(*call) != 0:
        sys.exit(f"prctl{call[:2]}: {os.strerror(ctypes.get_errno())}")
try:
    os.symlink("x", "/tmp/without-symlinks-probe")
except PermissionError:
    os.execv(sys.argv[1], sys.argv[1:])
sys.exit("the filter does not work")
