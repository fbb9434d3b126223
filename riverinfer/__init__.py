"""riverinfer: a standalone inference engine for decoder-only language models."""
