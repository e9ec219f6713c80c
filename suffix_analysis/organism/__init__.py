"""The embedded model: SmolLM2-135M-Instruct with an adapter of ours that teaches it to refuse (a model organism)."""
