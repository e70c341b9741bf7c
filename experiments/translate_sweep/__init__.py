"""Sweeps: translators trained at every combination of listed values, as one job that resumes."""
