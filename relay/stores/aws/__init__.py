"""AWS, as all stores there reach it: region, credentials and clients."""
