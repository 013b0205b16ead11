"""Analytics events: accept, keep and deliver them."""
