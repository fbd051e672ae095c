"""streamrec worker: Kafka events in, recommendations out."""

import os

__version__ = "0.1.0"

# ONNX Runtime's wheels for Linux report their use to Microsoft, and keep a device id below the home
# directory, unless this is set before it is imported: of data that passes here nothing may leave.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
