"""What GPU code a library or object holds, read from its fatbins (there may be no cuobjdump)."""

import struct
from pathlib import Path

# A fatbin: magic, version, size of this header, size of the entries after it. An entry: kind (1 is
# PTX, 2 machine code), size of its header, size of its payload, and at byte 28 the architecture.
MAGIC = b"\x50\xed\x55\xba"
KINDS = {1: "compute", 2: "sm"}


def architectures(path):
    """Names such as sm_90 and compute_120, one for each entry of each fatbin in a file."""
    data = Path(path).read_bytes()
    found = []
    start = data.find(MAGIC)
    while start >= 0:
        version, header, size = struct.unpack_from("<HHQ", data, start + 4)
        if (version, header) == (1, 16):
            at, end = start + header, start + header + size
            while at < end:
                kind, _, own, payload = struct.unpack_from("<HHIQ", data, at)
                (number,) = struct.unpack_from("<I", data, at + 28)
                found.append(f"{KINDS.get(kind, kind)}_{number}")
                at += own + payload
        start = data.find(MAGIC, start + len(MAGIC))
    return found
