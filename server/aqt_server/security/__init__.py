"""Who calls, what they may do, and how the connection is kept from others."""
