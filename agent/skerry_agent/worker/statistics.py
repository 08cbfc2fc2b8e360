"""What a model has done since its worker began, in the shape of Triton's statistics extension.

All figures come from the recorder, so they agree with the windows. ``success`` is exactly the sum of its four parts:
``compute_input`` is the transforms' time, of outputs as well, ``compute_infer`` the runtime's, ``compute_output`` the rest, which is reading the request and
building its answer. ``fail`` is every request for the model that got no answer: refused, failed or shed. Sizes of batches are not counted apart, so
``batch_stats`` is empty.
"""

from __future__ import annotations

from skerry_agent import workerwire as ww
from skerry_agent.worker.totals import Totals

Json = dict[str, object]


def statistics_of(name: str, version: str, totals: Totals, cold: ww.Cold) -> Json:
    """The ``$model_stat`` object of one model, and beside Triton's fields ``cold_start`` of one that is loaded on demand."""
    counts = totals.counts
    total, queue, transform, infer = (
        totals.answered_ns[part] for part in ("total_ns", "queue_ns", "transform_ns", "infer_ns")
    )
    unanswered = counts.invalid + counts.failed + counts.shed

    def ok(ns: int) -> Json:
        return {"count": counts.ok, "ns": ns}

    return {
        "name": name,
        "version": version,
        "last_inference": totals.last_ms,
        "inference_count": counts.rows,
        "execution_count": counts.ok - counts.cached,
        "inference_stats": {
            "success": ok(total),
            "fail": {"count": unanswered, "ns": totals.unanswered_ns},
            "queue": ok(queue),
            "compute_input": ok(transform),
            "compute_infer": ok(infer),
            "compute_output": ok(total - queue - transform - infer),
            "cache_hit": {"count": counts.cached, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [],
        **(
            {"cold_start": {"count": cold.starts, "last_ms": cold.last_ms, "max_ms": cold.max_ms}}
            if cold.starts
            else {}
        ),
    }
