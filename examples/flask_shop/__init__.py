"""A shop in Flask: an order and the tasks that belong to it are stored together, or not at all."""
