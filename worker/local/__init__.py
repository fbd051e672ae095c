"""Parts that demo, tests and bench start or read on this machine; the worker imports none."""
