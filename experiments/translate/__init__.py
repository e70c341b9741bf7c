"""Train translators that differ in nothing but their attention score, and compare them."""
