"""DynamoDB data store, in the layout that SDKs read."""
