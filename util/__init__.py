"""Helpers shared by models, data sets and commands: one subject a file."""
