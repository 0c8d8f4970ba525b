"""Comparing two implementations: what each must offer, what rounding allows, and the report."""
