"""The worker beside a plain aiokafka loop: same machine, same run, same backlog, same model.

Each is timed over ML-100K's events lying in the topic, from the first event read to the last one
done, several times in turn; medians and spread are printed and written to bench-results.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import onnxruntime

from worker.demo import NAME, time_backlog
from worker.local.kafka import KafkaBroker
from worker.local.ml100k import load_ml100k
from worker.local.tansu import TansuBroker
from worker.registry import serving_version
from worker.replay import ml100k_events, send_events
from worker.settings import load_settings
from worker.startup import ensure_topics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain-events", type=int, default=10_000)
    parser.add_argument("--real-kafka", action="store_true")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="streamrec-bench-"))
    ours, plain = [], []
    with ExitStack() as parts:
        broker = (KafkaBroker if options.real_kafka else TansuBroker)(directory / "broker")
        parts.enter_context(broker)
        settings = load_settings(kafka=broker.bootstrap, create_topics=True)
        asyncio.run(ensure_topics(settings))
        count = asyncio.run(send_events(settings, ml100k_events(load_ml100k())))
        version = serving_version(settings.registry, NAME)
        for round_ in range(options.rounds):
            worker, loop = time_backlog(
                directory,
                settings,
                version,
                count=count,
                plain_events=options.plain_events,
                tag=str(round_),
            )
            ours.append(worker)
            plain.append(loop)
            print(f"round {round_ + 1}: worker {ours[-1]:,.0f}, plain {plain[-1]:,.0f} events/s")
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    results = {
        "broker": "Apache Kafka" if options.real_kafka else "Tansu",
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "model": f"{NAME}@{version}",
        "worker_events_per_s": ours,
        "plain_loop_events_per_s": plain,
        "ratio": ratios,
    }
    Path("bench-results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, values in (("worker", ours), ("plain aiokafka loop", plain), ("ratio", ratios)):
        print(
            f"{name:<20} median {statistics.median(values):,.1f}"
            f"  ({min(values):,.1f} to {max(values):,.1f})"
        )
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
