"""The Grafana dashboards, as code: `make dashboards` writes them to `dashboards/`, beside this."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from deploy.grafana.model import Annotation, Dashboard, Panel, Query, Row, Variable

OUT = Path(__file__).with_name("dashboards")

#: Of recording rules, and of what every worker exports.
JOB = 'namespace=~"$namespace",job=~"$job"'
ALL = JOB + ',instance=~"$instance"'
SURFACE = ALL + ',surface=~"$surface"'
VERSION = SURFACE + ',model_version=~"$model_version"'
RATE = "[$__rate_interval]"


def rate(metric: str, *by: str, where: str = ALL) -> str:
    """Events of a counter a second, summed by labels."""
    labels = f" by ({', '.join(by)})" if by else ""
    return f"sum{labels} (rate({metric}{{{where}}}{RATE}))"


def quantiles(metric: str, *by: str, where: str = ALL, of: str = "") -> Iterator[Query]:
    """Median, 95th and 99th percentile of a histogram."""
    for quantile in (0.5, 0.95, 0.99):
        labels = ", ".join((*by, "le"))
        buckets = f"sum by ({labels}) (rate({metric}_bucket{{{where}}}{RATE}))"
        yield Query(
            f"histogram_quantile({quantile}, {buckets})", f"{of}p{quantile * 100:.0f}".strip()
        )


def bounds(figure: str, role: str) -> list[Query]:
    """A live figure of the version in a role, and the interval that holds at all times."""
    own = f'streamrec_live_quality{{{JOB},surface=~"$surface",role="{role}",figure="{figure}"'
    by = "max by (surface, model_version)"
    return [
        Query(f'{by} ({own},bound="low"}})', f"{role} low"),
        Query(f'{by} ({own},bound="high"}})', f"{role} high", band=True),
        Query(f'{by} ({own},bound="estimate"}})', f"{role} {{{{model_version}}}}"),
    ]


def appeared(role: str) -> str:
    """Has a value while a version is new in a role."""
    now = f'count by (surface, name, version) (streamrec_model_info{{{JOB},role="{role}"}}'
    return f"{now}) unless {now} offset 30s)"


def decided(action: str) -> str:
    """Has a value after the gate has decided so."""
    labels = f'{JOB},action="{action}"'
    return f"sum by (surface, reason) (increase(streamrec_decisions_total{{{labels}}}[1m])) > 0"


VARIABLES = [
    Variable("namespace", "label_values(streamrec_ready, namespace)"),
    Variable("job", "label_values(streamrec_ready, job)"),
    Variable("instance", f"label_values(streamrec_ready{{{JOB}}}, instance)"),
]
STAGE = Variable("stage", f"label_values(streamrec_stage_seconds_count{{{ALL}}}, stage)")
OF_MODELS = [
    *VARIABLES,
    Variable("surface", f"label_values(streamrec_model_info{{{ALL}}}, surface)"),
    Variable(
        "model_version",
        f"label_values(streamrec_recommendations_total{{{SURFACE}}}, model_version)",
    ),
]

ANNOTATIONS = [
    Annotation("Swap", appeared("stable"), "{{surface}}: {{name}}@{{version}} serves", "blue"),
    Annotation("Canary", appeared("canary"), "{{surface}}: canary {{version}} starts", "yellow"),
    Annotation("Promoted", decided("promote"), "{{surface}}: canary promoted", "green"),
    Annotation(
        "Rolled back", decided("rollback"), "{{surface}}: canary rolled back, {{reason}}", "red"
    ),
]

LATE = f"namespace_job:streamrec_late_events:ratio_rate{{}}{{{{{JOB}}}}}"

OVERVIEW = Row(
    "Overview",
    [
        Panel(
            "Workers ready",
            "Workers that say they are ready, of those that are scraped.",
            [
                Query(f"sum(streamrec_ready{{{ALL}}})", "ready"),
                Query(f"count(streamrec_ready{{{ALL}}})", "scraped"),
            ],
            kind="stat", width=4, height=5, limit=1, limit_is_least=True,
        ),
        Panel(
            "Events a second",
            "Events that were answered.",
            [Query(rate("streamrec_events_total"))],
            unit="ops", kind="stat", width=4, height=5,
        ),
        Panel(
            "Oldest unanswered event",
            "Age of the oldest event without a list. Pages above 2 minutes while it grows.",
            [Query(f"max(streamrec_lag_seconds{{{ALL}}})")],
            unit="s", kind="stat", width=4, height=5, limit=60,
        ),
        Panel(
            "Late, last hour",
            "Share of events without a list one second after they were in Kafka; 1 % is allowed.",
            [Query(f"max({LATE.format('1h')})")],
            unit="percentunit", kind="stat", width=4, height=5, limit=0.01,
        ),
        Panel(
            "Dead letters, last hour",
            "Records that could not be used.",
            [Query(f"round(sum(increase(streamrec_dead_letters_total{{{ALL}}}[1h])))")],
            kind="stat", width=4, height=5, limit=1,
        ),
        Panel(
            "Least memory left",
            "Of the worker that has least, against its limit.",
            [
                Query(
                    f"min(streamrec_memory_available_bytes{{{ALL}}}"
                    f" / streamrec_memory_limit_bytes{{{ALL}}})"
                )
            ],
            unit="percentunit", kind="stat", width=4, height=5, limit=0.1, limit_is_least=True,
        ),
        Panel(
            "Freshness: late events by window",
            "Share of events that were late, against what the objective allows (dashed). A page is"
            " sent at 14.4 times that over an hour, or 6 times over 6 hours.",
            [Query(LATE.format(window), window) for window in ("5m", "30m", "1h", "6h", "3d")],
            unit="percentunit", width=12, limit=0.01,
        ),
        Panel(
            "Alerts",
            "Alerts of deploy/prometheus/alerts.yml, pending and firing.",
            [
                Query(
                    'count by (alertname, alertstate) (ALERTS{alertname=~"Streamrec.+"})',
                    "{{alertname}} {{alertstate}}",
                )
            ],
            width=12, stacked=True,
        ),
    ],
)  # fmt: skip

STREAM = Row(
    "Stream",
    [
        Panel(
            "Events by type",
            "Events answered a second.",
            [Query(rate("streamrec_events_total", "event_type"), "{{event_type}}")],
            unit="ops", stacked=True,
        ),
        Panel(
            "Events by outcome",
            "applied: new to the history; duplicate: seen before, such as after a restart; late:"
            " older than the history reaches; failed: a defect, dead-lettered.",
            [Query(rate("streamrec_events_total", "outcome"), "{{outcome}}")],
            unit="ops", stacked=True,
        ),
        Panel(
            "Dead letters",
            "Records that could not be used, a second, by reason (docs/events.md).",
            [Query(rate("streamrec_dead_letters_total", "reason") + " > 0", "{{reason}}")],
            unit="ops", stacked=True,
        ),
        Panel(
            "Lag",
            "Events in Kafka that are not answered, by partition.",
            [
                Query(
                    f"max by (topic, partition) (streamrec_consumer_lag_events{{{ALL}}})",
                    "{{topic}} {{partition}}",
                )
            ],
            stacked=True,
        ),
        Panel(
            "Lag in time",
            "Age of the oldest unanswered event, by partition. One partition alone points to a hot"
            " user or key.",
            [
                Query(
                    f"max by (topic, partition) (streamrec_lag_seconds{{{ALL}}})",
                    "{{topic}} {{partition}}",
                )
            ],
            unit="s", limit=120,
        ),
        Panel(
            "In flight",
            "Events read and not finished, by worker. At STREAMREC_MAX_IN_FLIGHT_EVENTS reading"
            " stops.",
            [Query(f"streamrec_in_flight_events{{{ALL}}}", "{{instance}}")],
            stacked=True,
        ),
        Panel(
            "Commits",
            "Offset commits a second by result.",
            [Query(rate("streamrec_commits_total", "result"), "{{result}}")],
            unit="ops",
        ),
        Panel(
            "Waiting for a commit",
            "Time that the oldest finished event has waited for its offset to be committed.",
            [
                Query(
                    f"max by (topic, partition) (streamrec_commit_age_seconds{{{ALL}}})",
                    "{{topic}} {{partition}}",
                )
            ],
            unit="s", limit=120,
        ),
        Panel(
            "Partitions and rebalances",
            "Partitions of each worker, and assignments from the group in ten minutes.",
            [
                Query(f"streamrec_assigned_partitions{{{ALL}}}", "{{instance}}"),
                Query(
                    f"sum(increase(streamrec_rebalances_total{{{ALL}}}[10m]))",
                    "assignments in 10 min",
                ),
            ],
        ),
        Panel(
            "Batch size",
            "Events in a micro-batch: what came in while the one before was worked on.",
            [*quantiles("streamrec_batch_events")],
        ),
        Panel(
            "Errors of Kafka, cut records, stale writes",
            "Writes to Kafka that were tried again; records cut to what a topic takes"
            " (docs/limits.md); writes refused since another worker had written something newer.",
            [
                Query(rate("streamrec_produce_errors_total"), "write errors"),
                Query(f"{rate('streamrec_truncated_records_total')} or vector(0)", "cut"),
                Query(f"{rate('streamrec_stale_writes_total')} or vector(0)", "stale writes"),
            ],
            unit="ops",
        ),
        Panel(
            "Users forgotten",
            "Users erased by a tombstone, in ten minutes (docs/privacy.md).",
            [Query(f"sum(increase(streamrec_forgotten_users_total{{{ALL}}}[10m]))", "users")],
        ),
    ],
)  # fmt: skip


def heat(metric: str, where: str = ALL) -> list[Query]:
    """Observations a second by bucket."""
    return [Query(f"sum by (le) (rate({metric}_bucket{{{where}}}{RATE}))", "{{le}}")]


LATENCY = Row(
    "Latency",
    [
        Panel(
            "Freshness",
            "From an event's time in Kafka to its list in Redis: what users feel. The objective is"
            " 99 % within a second.",
            [*quantiles("streamrec_freshness_seconds")],
            unit="s", limit=1.0,
        ),
        Panel(
            "Within the worker",
            "From reading an event to its list in Redis; the budget is 250 ms at the 99th"
            " percentile.",
            [*quantiles("streamrec_cached_seconds")],
            unit="s", limit=0.25,
        ),
        Panel(
            "Within the worker, to the topic",
            "From reading an event to its list on the output topic.",
            [*quantiles("streamrec_event_seconds")],
            unit="s",
        ),
        Panel(
            "Freshness, heat map",
            "Events a second by how long after their time in Kafka their list was in Redis.",
            heat("streamrec_freshness_seconds"),
            unit="s", kind="heatmap", width=12,
        ),
        Panel(
            "Time by stage",
            "Seconds of work a second. What is tallest is what more speed is to be had from.",
            [Query(rate("streamrec_stage_seconds_sum", "stage"), "{{stage}}")],
            unit="s", width=12, stacked=True,
        ),
        Panel(
            "Stage: $stage",
            "Batches a second by their time in the stage.",
            heat("streamrec_stage_seconds", f'{ALL},stage="$stage"'),
            unit="s", kind="heatmap", repeat="stage",
        ),
    ],
)  # fmt: skip

REDIS = Row(
    "Redis",
    [
        Panel(
            "Round trips",
            "Time of one batch's round trip at the 99th percentile, by operation.",
            [
                Query(
                    "histogram_quantile(0.99, sum by (operation, le)"
                    f" (rate(streamrec_redis_seconds_bucket{{{ALL}}}{RATE})))",
                    "{{operation}}",
                )
            ],
            unit="s", limit=0.1,
        ),
        Panel(
            "Requests and failures",
            "Round trips a second, and those that failed and were tried again.",
            [
                Query(rate("streamrec_redis_seconds_count", "operation"), "{{operation}}"),
                Query(rate("streamrec_redis_errors_total"), "failed"),
            ],
            unit="ops",
        ),
        Panel(
            "Answers",
            "1 while Redis, and Kafka, answer a worker; the worst of them.",
            [
                Query(
                    f"min by (dependency) (streamrec_dependency_up{{{ALL}}})", "{{dependency}}"
                )
            ],
            most=1.0,
        ),
        Panel(
            "Histories by where they were found",
            "cache: in the worker; nowhere: a new user; damaged: unreadable, begun anew.",
            [Query(rate("streamrec_history_reads_total", "found"), "{{found}}")],
            unit="ops", stacked=True,
        ),
        Panel(
            "Found in the cache",
            "Share of histories that were not read from Redis.",
            [
                Query(
                    rate("streamrec_history_reads_total", where=ALL + ',found="cache"')
                    + " / "
                    + rate("streamrec_history_reads_total"),
                    "cache",
                )
            ],
            unit="percentunit", most=1.0,
        ),
        Panel(
            "Histories in the cache",
            "Histories kept by each worker.",
            [Query(f"streamrec_history_cache_entries{{{ALL}}}", "{{instance}}")],
        ),
    ],
)  # fmt: skip

RESOURCES = Row(
    "Resources",
    [
        Panel(
            "CPU",
            "Cores in use, by worker.",
            [
                Query(
                    f"rate(process_cpu_seconds_total{{{ALL}}}{RATE})"
                    f" and on (namespace, job, instance) streamrec_ready{{{ALL}}}",
                    "{{instance}}",
                )
            ],
        ),
        Panel(
            "Memory",
            "Resident, in models and in the history cache, by worker.",
            [
                Query(
                    f"process_resident_memory_bytes{{{ALL}}}"
                    f" and on (namespace, job, instance) streamrec_ready{{{ALL}}}",
                    "{{instance}} resident",
                ),
                Query(
                    f"sum by (instance) (streamrec_model_memory_bytes{{{ALL}}})",
                    "{{instance}} models",
                ),
                Query(f"streamrec_history_cache_bytes{{{ALL}}}", "{{instance}} histories"),
            ],
            unit="bytes",
        ),
        Panel(
            "Memory left",
            "What the container, or else the machine, leaves each worker, and its limit.",
            [
                Query(f"streamrec_memory_available_bytes{{{ALL}}}", "{{instance}} left"),
                Query(f"streamrec_memory_limit_bytes{{{ALL}}}", "{{instance}} limit"),
            ],
            unit="bytes",
        ),
    ],
)  # fmt: skip

SERVING = Row(
    "Versions",
    [
        Panel(
            "In memory now",
            "Each version that workers have loaded, with its role and how many workers have it.",
            [
                Query(
                    "count by (surface, name, version, precision, role)"
                    f" (streamrec_model_info{{{SURFACE}}})"
                )
            ],
            kind="table", width=12,
            columns=("surface", "name", "version", "precision", "role", "Value"),
        ),
        Panel(
            "Lists by version",
            "Lists written a second.",
            [
                Query(
                    rate("streamrec_recommendations_total", "model_version", where=VERSION),
                    "{{model_version}}",
                )
            ],
            unit="ops", width=12, stacked=True,
        ),
        Panel(
            "Age of the model",
            "Since the stable version was made.",
            [
                Query(
                    f"max by (surface) (streamrec_model_age_seconds{{{SURFACE}}})", "{{surface}}"
                )
            ],
            unit="s",
        ),
        Panel(
            "Model bytes",
            "A bundle on disk, and growth of resident memory by loading it.",
            [
                Query(
                    f"max by (surface, version) (streamrec_model_file_bytes{{{SURFACE}}})",
                    "{{surface}} {{version}} on disk",
                ),
                Query(
                    f"max by (surface, version) (streamrec_model_memory_bytes{{{SURFACE}}})",
                    "{{surface}} {{version}} in memory",
                ),
            ],
            unit="bytes",
        ),
        Panel(
            "Swaps",
            "Median and 99th percentile of an hour: loading, beside the stream, and the switch.",
            [
                Query(
                    f"histogram_quantile({quantile}, sum by (phase, le)"
                    f" (increase(streamrec_model_swap_seconds_bucket{{{ALL}}}[1h])))",
                    f"{{{{phase}}}} {name}",
                )
                for quantile, name in ((0.5, "p50"), (0.99, "p99"))
            ],
            unit="s",
        ),
        Panel(
            "Releases",
            "Revision that workers follow: they agree where highest and lowest are one line.",
            [
                Query(
                    f"max by (surface) (streamrec_release_revision{{{SURFACE}}})",
                    "{{surface}} highest",
                ),
                Query(
                    f"min by (surface) (streamrec_release_revision{{{SURFACE}}})",
                    "{{surface}} lowest",
                ),
            ],
            least=None,
        ),
        Panel(
            "Refused and not followed",
            "Bundles refused in ten minutes, by reason, and workers that cannot follow the"
            " release.",
            [
                Query(
                    "sum by (surface, reason)"
                    f" (increase(streamrec_refused_bundles_total{{{SURFACE}}}[10m])) > 0",
                    "{{surface}} refused: {{reason}}",
                ),
                Query(
                    f"sum by (surface) (1 - streamrec_release_followed{{{SURFACE}}})",
                    "{{surface}} workers not following",
                ),
            ],
        ),
        Panel(
            "Errors of models",
            "Batches a second that a version failed on; others were served instead.",
            [
                Query(
                    rate(
                        "streamrec_inference_errors_total", "model_version", where=SURFACE
                    ),
                    "{{model_version}}",
                )
            ],
            unit="ops",
        ),
    ],
)  # fmt: skip

LISTS = Row(
    "Lists",
    [
        Panel(
            "By source",
            "model, or fallback: what is popular, where the model knows none of a user's items.",
            [
                Query(
                    rate("streamrec_recommendations_total", "source", where=VERSION), "{{source}}"
                )
            ],
            unit="ops", stacked=True,
        ),
        Panel(
            "Time of a model for one list",
            "Mean over lists, by version; those of trials that nobody saw included.",
            [
                Query(
                    rate("streamrec_score_seconds_total", "model_version", where=SURFACE)
                    + " / "
                    + rate("streamrec_scored_lists_total", "model_version", where=SURFACE),
                    "{{model_version}}",
                )
            ],
            unit="s",
        ),
        Panel(
            "Coverage",
            "Share of the model's items that some worker has put on a list since its start.",
            [
                Query(
                    f"max by (model_version) (streamrec_catalogue_coverage_ratio{{{SURFACE}}})",
                    "{{model_version}}",
                )
            ],
            unit="percentunit", most=1.0,
        ),
        Panel(
            "Short lists",
            "Lists a second shorter than asked for, since nothing more was allowed.",
            [
                Query(
                    rate("streamrec_short_recommendations_total", "surface", where=SURFACE),
                    "{{surface}}",
                )
            ],
            unit="ops",
        ),
        Panel(
            "Cold items",
            "Items known by their text alone, and places of lists a second that they took"
            " (docs/text.md). Empty where no model has a text encoder.",
            [
                Query(f"max by (surface) (streamrec_cold_items{{{SURFACE}}})", "{{surface}} items"),
                Query(
                    rate("streamrec_cold_recommended_total", "surface", where=SURFACE),
                    "{{surface}} places a second",
                ),
            ],
        ),
        Panel(
            "Hit rate of an hour",
            "Share of positive events whose item was on the list served before, by the version that"
            " made the list.",
            [
                Query(
                    "namespace_job_surface_model_version:streamrec_hits:ratio_rate1h"
                    f'{{{JOB},surface=~"$surface",model_version=~"$model_version"}}',
                    "{{model_version}}",
                )
            ],
            unit="percentunit",
        ),
    ],
)  # fmt: skip

TRIAL = Row(
    "Canary against incumbent",
    [
        Panel(
            "Hit rate",
            "Of the present trial, over all partitions. The bands hold at all times at once: look"
            " as often as you like (docs/quality.md).",
            [*bounds("hit_rate", "stable"), *bounds("hit_rate", "canary")],
            unit="percentunit", width=12,
        ),
        Panel(
            "Mean reciprocal rank",
            "What the gate decides by; with bands as in hit rate.",
            [*bounds("mrr", "stable"), *bounds("mrr", "canary")],
            width=12,
        ),
        Panel(
            "Share of users",
            "Whom the canary serves; as many others are what it is compared with.",
            [Query(f"max by (surface) (streamrec_canary_share{{{SURFACE}}})", "{{surface}}")],
            unit="percentunit", width=6,
        ),
        Panel(
            "Evidence",
            "Events judged and users on each side.",
            [
                Query(
                    "max by (surface, figure) (streamrec_trial_evidence"
                    f'{{{JOB},surface=~"$surface",figure=~"events|.*users"}})',
                    "{{surface}} {{figure}}",
                )
            ],
            width=6,
        ),
        Panel(
            "What is decided by",
            "Above 0 at its lower bound the canary is promoted, below 0 at its upper bound it is"
            " rolled back: its MRR less what is accepted of the stable version's.",
            [
                Query(
                    "max by (surface, figure) (streamrec_trial_evidence"
                    f'{{{JOB},surface=~"$surface",figure=~"excess.*"}})',
                    "{{surface}} {{figure}}",
                )
            ],
            least=None, width=6,
        ),
        Panel(
            "Time and failures",
            "Canary's time to the stable version's, same inputs; share of its calls that failed.",
            [
                Query(
                    "max by (surface, figure) (streamrec_trial_evidence"
                    f'{{{JOB},surface=~"$surface",figure=~"latency_ratio|error_rate"}})',
                    "{{surface}} {{figure}}",
                )
            ],
            width=6,
        ),
        Panel(
            "Overlap of lists",
            "Users a second by the share of items that both versions' lists have in common.",
            heat("streamrec_trial_overlap_ratio", SURFACE),
            unit="percentunit", kind="heatmap", width=12,
        ),
        Panel(
            "Drift of scores",
            "Best scores of the other version over the stable one's, in standard deviations.",
            [
                Query(
                    f"avg by (surface) (streamrec_trial_score_drift{{{SURFACE}}})", "{{surface}}"
                )
            ],
            least=None, width=6,
        ),
        Panel(
            "Decisions, last day",
            "Canaries that the gate promoted or rolled back.",
            [
                Query(
                    "round(sum by (surface, action, reason)"
                    f" (increase(streamrec_decisions_total{{{SURFACE}}}[1d]))) > 0",
                    "{{surface}} {{action}}: {{reason}}",
                )
            ],
            kind="stat", width=6,
        ),
    ],
)  # fmt: skip

DASHBOARDS = [
    Dashboard(
        "streamrec",
        "streamrec",
        "Workers: objective, stream, latency, Redis, resources. What to do about an alert is in"
        " docs/runbooks.md.",
        [OVERVIEW, STREAM, LATENCY, REDIS, RESOURCES],
        [*VARIABLES, STAGE],
        ANNOTATIONS,
    ),
    Dashboard(
        "streamrec-models",
        "streamrec models",
        "Versions, their lists, what users made of them, and canary against incumbent.",
        [SERVING, LISTS, TRIAL],
        OF_MODELS,
        ANNOTATIONS,
    ),
]


def files() -> dict[str, str]:
    """Text of each file by name."""
    return {f"{board.uid}.json": json.dumps(board.json(), indent=1) + "\n" for board in DASHBOARDS}


def main() -> None:
    """Write them."""
    OUT.mkdir(exist_ok=True)
    for name, text in files().items():
        (OUT / name).write_text(text)


if __name__ == "__main__":
    main()
