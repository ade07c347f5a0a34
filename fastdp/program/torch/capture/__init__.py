"""Gives captured steps what they ask of any model (`fastdp.capture.pure_step`), for torch modules."""
