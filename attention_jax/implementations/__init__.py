"""The ways to compute one head of attention; none imports another."""
