"""The model: encoders, co-attention, heads. Knows no data, no objectives and no DeepSpeed."""
