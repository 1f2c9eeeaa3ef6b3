"""What is on a holder's two sockets: the header of a VMM's messages, and the frames to and from hostd.

Imported by the holder and by hostd: it imports nothing of vfleet.
"""

import struct
from enum import IntEnum
from typing import Final

# vfio-user: identifier, command, bytes of the message, flags, error.
HEADER = struct.Struct("<HHIII")
MAX_MESSAGE_BYTES = 1 << 13
MAX_DESCRIPTORS = 16
"""As many as a message of a VMM may bring."""
TYPE = 0xF
REPLY = 1
NO_REPLY = 1 << 4
FAILED = 1 << 5
REGION_READ, REGION_WRITE = 9, 10
REGION_ACCESS = struct.Struct("<QII")  # offset, region, bytes

VERSION: Final = 1
"""Of what follows, by HELLO: it grows with whatever a holder or a hostd of before would take for something else.

A holder may be older than its hostd, or newer. FRAME, QUIT and HELLO's data stay as they are for ever.
"""

# A frame to or from hostd: kind, bytes of the key, number, position; then key and data.
FRAME = struct.Struct("<IIQQ")
MAX_FRAME_BYTES = FRAME.size + 256 + MAX_MESSAGE_BYTES
HELLO_DATA = struct.Struct("<QI")
"""The last message that is queued, and the VERSION. Holders of before there was one say the first alone."""
SAID = struct.Struct("<QQ")
"""How many messages were said to VMMs, and the last DMA write that was said, whole."""


class Kind(IntEnum):
    """What a frame says: from HELLO on the holder to hostd, from ANSWER on hostd to the holder."""

    HELLO = 1  # the last message that is done, and its position; the key is SAID, the data HELLO_DATA
    KEPT = 2  # a key, what was kept by it, and its descriptor if there is one
    READY = 3  # that was all that is kept
    CONNECTED = 4  # a VMM has connected; numbered, as messages are
    MESSAGE = 5  # a message of the VMM, with its descriptors; the position is how many others came with it
    GONE = 6  # the VMM has closed its socket
    ANSWER = 16  # the answer to a message, by its number
    DONE = 17  # all messages up to a number are done; the position is given back by HELLO
    KEEP = 18  # keep this, with the descriptor that comes with it, in the place of what the key had
    DROP = 19  # keep it no longer
    QUIT = 20  # end
    RING = 21  # tell of an interrupt by the eventfd that is kept by a key
    SAY = 22  # a message to the VMM that has CONNECTED by this number; the position: of the DMA write that it completes
