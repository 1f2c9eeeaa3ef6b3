"""What every process and every client of vfleet shares. Imports neither daemon."""

import os

# gRPC's Python has no setting for the lowest version of TLS. But without a cipher suite that both ends could use there
# is no TLS 1.2: those that TLS 1.3 has are not in this list, and this one takes a pre-shared key, of which there is
# none. gRPC reads it when it is first imported, so it is set before anything else of vfleet is.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-AES128-CBC-SHA"
