"""Side-by-side measurements against peers; never part of the library or of a user's installation."""
