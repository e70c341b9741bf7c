"""Train translators that differ only in their attention score, and compare them."""
