"""Sweeps: train translators at every combination of listed values, as one resumable job."""
