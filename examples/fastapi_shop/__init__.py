"""A shop: an order and the task that sends its receipt are stored together, or neither is."""
