"""How fast sheppy-sql is beside other queues, in one run on one machine."""
