"""A small re-ranker, MODEL.onnx, and rows to calibrate it by, for docs/rankers.md."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from skl2onnx import to_onnx
from sklearn.ensemble import GradientBoostingRegressor

rng = np.random.default_rng(7)
rows = rng.normal(size=(400, 4)).astype(np.float32)
clicked = (rows[:, 0] + rows[:, 1] * rows[:, 2] > 0).astype(np.int64)
ranker = GradientBoostingRegressor(n_estimators=20, random_state=7).fit(rows, clicked)
Path("MODEL.onnx").write_bytes(to_onnx(ranker, rows[:1]).SerializeToString())
table = pa.table(
    {f"f{at}": rows[:, at] for at in range(4)}
    | {"clicked": clicked, "query": np.repeat(np.arange(40), 10)}
)
pyarrow.parquet.write_table(table, "calibration.parquet")
