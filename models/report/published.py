"""Published figures for known data sets, quoted beside ours with their source."""

from __future__ import annotations

from typing import Any

from models.dataset import LEAVE_ONE_OUT

_RECSYS_A = "Petrov & Macdonald, gSASRec, RecSys 2023"
_RECSYS_B = "Klenitskiy & Vasilev, RecSys 2023"
_LRUREC = "Yue et al., LRURec, WSDM 2024"
_ESASREC = "Tikhonovich et al., eSASRec, RecSys 2025"
#: By words of the data set's name and split: model, HR@10, NDCG@10, source. Full ranking.
_PUBLISHED = {
    (frozenset({"movielens", "1m"}), LEAVE_ONE_OUT): (
        ("SASRec", 0.250, 0.134, _RECSYS_A),
        ("BERT4Rec", 0.284, 0.154, _RECSYS_A),
        ("gSASRec", 0.300, 0.173, _RECSYS_A),
        ("SASRec, 3000 negatives", 0.316, 0.186, _RECSYS_B),
        ("LRURec", 0.326, 0.193, _LRUREC),
        ("eSASRec", 0.313, 0.177, _ESASREC),
    ),
}


def published(data_name: str, split: str) -> list[dict[str, Any]]:
    """Figures for a data set and split; empty where none are known."""
    words = frozenset(data_name.lower().replace("-", " ").split())
    return [
        {"model": model, "hr@10": hit_rate, "ndcg@10": ndcg, "source": source}
        for (name, known_split), rows in _PUBLISHED.items()
        if name <= words and known_split == split
        for model, hit_rate, ndcg, source in rows
    ]
