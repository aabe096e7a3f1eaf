"""Turn sites and a configuration into a plan, carry it out, and report."""
