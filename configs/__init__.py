"""The typed configuration, and one YAML a row of the results table."""
