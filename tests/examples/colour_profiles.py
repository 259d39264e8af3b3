"""Adobe RGB, as cameras use it: what its numbers mean, and its ICC profile."""

import functools
import struct

import numpy as np
from PIL import ImageCms

# Columns: what red, green and blue are in XYZ under D50, by the definitions of the two spaces.
SRGB = [[0.43607, 0.38506, 0.14308], [0.2225, 0.71688, 0.06062], [0.01393, 0.0971, 0.71417]]
ADOBE = [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
GAMMA = 2.19921875  # of Adobe RGB


@functools.cache  # it holds the time at which it was made
def adobe_profile():
    """An ICC profile of Adobe RGB: that of sRGB with other primaries and another curve."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", data, 128)
    places = dict(struct.unpack_from(">4sI", data, 132 + 12 * i) for i in range(count))
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), np.transpose(ADOBE), strict=True):
        struct.pack_into(">3i", data, places[name] + 8, *(round(v * 65536) for v in column))
    for name in (b"rTRC", b"gTRC", b"bTRC"):
        struct.pack_into(">4sIHHi", data, places[name], b"para", 0, 0, 0, round(GAMMA * 65536))
    return bytes(data)
