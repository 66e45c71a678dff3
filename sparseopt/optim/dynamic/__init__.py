"""Masks that change while training: where entries may lie, how many each layer has, which leave and which come."""
