"""The page about the reproduction: results as tables, pictures and verdicts, beside the printed numbers."""
