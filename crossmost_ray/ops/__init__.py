"""Pure functions of tensors: point operations, masks and collectives."""
