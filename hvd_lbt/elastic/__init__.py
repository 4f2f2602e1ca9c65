"""Training while workers come, go and fail (docs/elastic.md); who may speak: SECURITY.md.

decisions: who is started, who is in the world (pure) · discovery: which hosts there are · messages:
signed requests and answers · rendezvous: the driver's server and the worker's relay · processes:
starting workers here and on other hosts · cli: `hvd_lbt elastic` · worker: a worker's part of it.
"""
