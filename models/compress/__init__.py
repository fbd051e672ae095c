"""Compression methods: each a small transformation of a bundle, composed by recipes.

`draft.py` says what a method works on, `recipe.py` how methods are named and joined, `methods.py`
which there are; every other module here is one method, or one way to store a weight.
"""
