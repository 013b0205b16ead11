"""Big segments of an environment: segments whose members are in a database (datastore 4.9)."""
