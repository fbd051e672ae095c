"""Commands of `streamrec models`, one module per topic; models/cli.py puts them together."""
