"""The systems that are compared. One module each, run as a process of its own:
`python -m benchmarks.cases.NAME CONFIG.json`, until it is ended."""
