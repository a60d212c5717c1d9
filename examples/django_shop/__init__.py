"""A shop in Django: an order and the tasks that belong to it are stored together, or not at all."""
