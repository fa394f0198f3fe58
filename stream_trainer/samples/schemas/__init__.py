"""Records that a Schema Registry has the schemas of: `registry` fetches these, `readers` read by them."""
