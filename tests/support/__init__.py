"""Code that several tests share; no test imports another test or conftest."""
