"""Numbers that several programs must agree on."""

# Drivers attached to one function: its image keeps the sequences of so many.
MAX_DRIVERS = 16

# Accesses of one driver to one function that are on their way at once, and so answers that a function keeps.
WINDOW = 64

# A driver's main memory: how large it may be, and where it lies in the driver's virtual address space.
MAX_MAIN_MEMORY_BYTES = 1 << 30
MAIN_MEMORY_VIRTUAL_ADDRESS = 1 << 32

# The page of a driver's I/O virtual address space to which MSI-X writes go, and of the root complex's window as well.
INTERRUPT_PAGE_ADDRESS = 0xFEE00000

# How long what goes over a connection whose certificate has been replaced may still take.
OLD_CHANNEL_GRACE_S = 3_600.0

# A guest's driver: how far its memory may reach, for how long a migration may hold it, and after how long without an
# answer its VMM gives the device up (QEMU's own default of x-msg-timeout), each unless something else is asked for.
GUEST_MAIN_MEMORY_BYTES = 512 << 20
GUEST_LONGEST_HOLD_MS = 2_000
GUEST_MESSAGE_TIMEOUT_MS = 5_000

# Bytes of the path of a UNIX socket, as Linux's sockaddr_un has room for.
MAX_SOCKET_PATH_BYTES = 107
