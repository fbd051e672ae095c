"""Compress re-rankers: tree ensembles, linear models and SVMs in ONNX files (docs/rankers.md).

Everything works on the ONNX graph, so that models of any exporter are taken. A compression method
is a pure function from a model (and calibration rows) to a model; `models.rankers.recipe` chains
them.
"""
