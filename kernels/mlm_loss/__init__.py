"""Loss of masked language modelling over the masked rows."""
