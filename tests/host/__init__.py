"""sheppy's own features on our backend, by its own Queue, Worker and router."""
