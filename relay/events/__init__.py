"""Analytics events: accepted, kept and delivered."""
