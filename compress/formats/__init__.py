"""File formats of quantized weights: pure packing and unpacking, one file a format.

They sit below everything that opens a model, because every stage must be able to read what another wrote.
"""
